"""Private PyTorch APIs are used in ``_torch_private``, which has the reasons, and nowhere else."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import torch
from package_modules import modules

# Python's own (frames, locks and who waits for one, named tuples); ``torch._foreach_*`` is meant to be used.
NOT_PYTORCHS = re.compile("_foreach_.*|_getframe|_at_fork_reinit|_waiters|_replace")
# What tensors, nodes, storages, operators and modules have.
EXAMPLE = torch.ones(1, requires_grad=True)
OBJECTS = (
    EXAMPLE,
    (EXAMPLE * 2).grad_fn,
    EXAMPLE.untyped_storage(),
    torch.ops.aten.add.Tensor,
    torch.nn.Module(),
)
PYTORCHS = {name for thing in OBJECTS for name in dir(thing) if re.match("_[^_]", name)} | {"_forward_cls"}
# Of these, what ours have as well, and where: the values of a GradDict, the indices of a pattern.
OURS = {"_values": ("graddict", "vectors", "_identity_mapping"), "_indices": ("sparsity.pattern",)}
# Which argument is the name, where attributes are asked for by their names.
BY_NAME = {
    "getattr": 1,
    "hasattr": 1,
    "setattr": 1,
    "delattr": 1,
    "attrgetter": 0,
    "methodcaller": 0,
    "get": 0,
}


def private_uses(path: Path) -> list[str]:
    """``torch._something`` in a file: attributes and imports; ``torch._foreach_*`` is meant to be used."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = ""
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            text = f"{node.module}."
        elif isinstance(node, ast.Import):
            text = " ".join(alias.name for alias in node.names)
        match = re.match(r"torch(\.\w+)*?\.(_(?!_)\w+)", text)
        if match and not match.group(2).startswith("_foreach_"):
            found.append(f"{path.name}:{node.lineno} {match.group(0)}")
    return found


@cache
def own_attributes() -> frozenset[str]:
    """Names that the package gives to anything: whatever else is private belongs to somebody else."""
    found: set[str] = set()
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
                found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return frozenset(found)


def private_attributes(name: str, path: Path) -> list[str]:
    """Private attributes of PyTorch's objects in a module: of all but ``self``, also asked for by name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        attribute = ""
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            attribute = "" if own else node.attr
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func).rpartition(".")[2]
            at = BY_NAME.get(called, len(node.args))
            given = node.args[at] if at < len(node.args) else None
            if isinstance(given, ast.Constant):
                attribute = str(given.value)
            elif called == "getattr" and re.search(r"\bnode$", ast.unparse(node.args[0])):
                attribute = "_saved_"  # or whatever a node is asked for
        if (
            not re.match("_[^_]", attribute)
            or NOT_PYTORCHS.fullmatch(attribute)
            or name in OURS.get(attribute, ())
        ):
            continue
        if attribute in PYTORCHS or attribute not in own_attributes():
            found.append(f"{path.name}:{node.lineno} {attribute}")
    return found


def test_private_pytorch_apis_are_used_in_one_place() -> None:
    found = []
    for name, path in modules().items():
        if name.split(".")[0] != "_torch_private":
            found += private_uses(path) + private_attributes(name, path)
    assert not found


def test_our_own_checkpoint_is_told_by_the_module_that_it_is_in() -> None:
    from torchzygote._torch_private import checkpoints

    assert checkpoints._CHECKPOINTS[1].removeprefix("torchzygote.") in modules()


def test_the_check_for_private_apis_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "f.py"
    file.write_text(
        "import torch\nfrom torch._C import _functorch\ntorch.autograd._functions\ntorch._foreach_add(1, 2)\n"
    )
    assert [found.split(" ")[0] for found in private_uses(file)] == ["f.py:2", "f.py:3"]


def test_the_check_for_private_attributes_finds_them(tmp_path: Path) -> None:
    file = tmp_path / "f.py"
    file.write_text(
        "x._version, y.grad_fn._saved_other\ngetattr(place.node, name)\nhasattr(node, '_forward_cls')\n"
        "module.__dict__.get('_buffers')\nself._values, sys._getframe, new._values, pair._replace\n"
    )
    assert [found.split(" ")[0] for found in private_attributes("graddict", file)] == [
        "f.py:2",
        "f.py:3",
        "f.py:4",
        "f.py:1",
        "f.py:1",
    ]
