"""What every file keeps: documented public names, imports that follow the data flow, names used once."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from package_modules import PACKAGE, modules

import torchzygote
import torchzygote.native

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

NAMES = sorted(torchzygote.__all__)
RESULTS = ("WithGradient", "WithJacobian", "WithHessian")  # named tuples: the functions have the examples

# The way of a call: modules and packages import from their own stage and from those above.
STAGES: dict[str, str] = {
    "ground": """
        _argument_text _cached_draws _call_options _cost_model _distributed _dtypes _filling
        _hidden_derivatives _memory_layout _operators _other_ways _packing _random _stop_iteration
        _structure_matching _torch_private _version _warning native
    """,
    "state": """
        _after_fork _custom_backwards _deriving_traced _dropped_graphs _exchange _flags _forward_mode_lock
        _linear_node _linear_node_traced _metadata _overlap _pullback_traced _state _tensor_holders
        _unfused
    """,
    "arguments": """
        _arguments _buffer _create_graph _error_notes _numbers _outputs _real_arguments _tangent_fitting
    """,
    "values": """
        _arithmetic _call_arguments _entries _grad_fields _grad_norms _identity_mapping _members
        _multi_tensor _set_operations _sparse_operands clipping graddict grads params vectors
    """,
    "engine": "_double_backward _engine _entry_point _forward",
    "structure": "_block_layout _recorded _structure coloring pictures sparsity",
    "products": """
        _cotangents _first_order _parts _products _pulling _pushing _row_cost _second_order _transposed
        _updates
    """,
    "utilities": """
        _checkpoint _cotangent_hook _cotangent_hook_traced _dropping _dropping_traced buffer
        checkpointing eager forward_mode hooks nondifferentiable
    """,
    "assembly": "_assembly",
    "certificate": """
        _affine_check _certificate _colored _complete_rows _crosscheck _repetition _separable
        _structure_heuristics _symmetric_blocks
    """,
    "results": """
        _affine_products _compressed _curvature _dense_hessians _dense_jacobians _factored _layer_rows
        _row_blocks _stencil_sums _whole_hessian
    """,
    "public": "_plans gradients hessians jacobians plans",
}
STAGE_OF = {unit: i for i, units in enumerate(STAGES.values()) for unit in units.split()}
# What a stage must not know, as its own docstring says.
MUST_NOT_REACH = {
    "_cost_model": ("*",),
    "_arguments": ("_engine",),
    "_outputs": ("_engine",),
    "_engine": ("_cost_model", "_products", "_assembly", "coloring", "sparsity", "native"),
    "_products": ("_assembly", "_cost_model", "coloring", "sparsity", "gradients"),
    "_assembly": ("_engine", "_products", "_cost_model", "gradients"),
    "coloring": ("_engine", "_products", "gradients"),
    "sparsity": ("_engine", "_products", "gradients", "coloring"),
    "native": ("_engine", "_state", "_arguments", "gradients", "coloring", "sparsity"),
    "graddict": ("_engine", "gradients", "params"),
    "params": ("_engine", "gradients"),
}


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of the package that ``name`` imports, wherever in the file that happens."""
    within = [part for part in name.split(".") if part]
    base = within if path.name == "__init__.py" else within[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = base[: len(base) - node.level + 1]
            module = [*start, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                deeper = ".".join([*module, alias.name])
                yield deeper if deeper in known else ".".join(module)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchzygote":
            yield ".".join((node.module or "").split(".")[1:])


@cache
def graph() -> dict[str, frozenset[str]]:
    known = modules()
    return {name: frozenset(imported(name, path, known)) - {name} for name, path in known.items()}


def reached_from(name: str) -> set[str]:
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        for following in graph().get(waiting.pop(), ()):
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return seen


def within(package: str) -> list[str]:
    return [name for name in graph() if name == package or name.startswith(package + ".")]


# ---- imports -----------------------------------------------------------------------------------------------


def test_every_module_has_a_stage() -> None:
    assert {name.split(".")[0] for name in modules()} - {""} == set(STAGE_OF)


@pytest.mark.parametrize("name", sorted(set(modules()) - {""}))
def test_no_module_imports_from_a_later_stage(name: str) -> None:
    own = STAGE_OF[name.split(".")[0]]
    later = {found for found in graph()[name] if found and STAGE_OF[found.split(".")[0]] > own}
    assert not later, f"{name} imports {', '.join(sorted(later))}"


def test_packages_have_no_cycle() -> None:
    """Each is one stop on the way: what one imports doesn't import it."""
    units = {unit: {name.split(".")[0] for m in within(unit) for name in graph()[m]} for unit in STAGE_OF}
    for unit in units:
        seen, waiting = set(), [following for following in units[unit] if following != unit]
        while waiting:
            if (current := waiting.pop()) not in seen:
                seen.add(current)
                waiting.extend(units.get(current, ()))
        assert unit not in seen, f"{unit} is imported by what it imports"


@pytest.mark.parametrize("stage", sorted(MUST_NOT_REACH))
def test_a_stage_does_not_know_what_it_must_not_know(stage: str) -> None:
    assert within(stage), f"{stage} is gone: change this table and docs/architecture.md"
    for name in within(stage):
        reached = reached_from(name)
        if MUST_NOT_REACH[stage] == ("*",):
            assert not reached
            continue
        for forbidden in MUST_NOT_REACH[stage]:
            assert not reached & set(within(forbidden)), f"{name} reaches {forbidden}"


def test_imports_have_no_cycle() -> None:
    for name in graph():
        assert name not in reached_from(name), f"{name} is imported by what it imports"


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_is_short_and_says_what_it_is_for(name: str) -> None:
    text = modules()[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, "split it by what its parts do"
    assert ast.get_docstring(ast.parse(text))


def test_the_name_of_a_class_is_used_once() -> None:
    """Leading underscores or not: who reads it knows which one is meant."""
    homes: dict[str, list[str]] = {}
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(name)
    assert not {kind: names for kind, names in homes.items() if len(names) > 1}


# ---- public names ------------------------------------------------------------------------------------------


def test_all_is_sorted_and_nothing_else_is_public() -> None:
    assert torchzygote.__all__ == sorted(torchzygote.__all__)
    loose = {
        name
        for name, value in vars(torchzygote).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert loose == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_has_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(torchzygote, name)) or ""
    assert text.split("\n")[0].endswith("."), "the first line is a sentence that says what it is"
    if name not in RESULTS:
        assert "Examples\n--------" in text
        assert ">>>" in text


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(torchzygote, name))])
def test_public_methods_have_docstrings(name: str) -> None:
    """Those that take something also have an example, or refer to a method that has."""
    for attribute, value in public_attributes(getattr(torchzygote, name)):
        text = inspect.getdoc(value)
        assert text, f"{name}.{attribute}"
        if not isinstance(value, property) and len(inspect.signature(value).parameters) > 1:
            shown = "Examples\n--------" in text and ">>>" in text
            assert shown or re.search(r":meth:`[\w.]+`", text), f"{name}.{attribute} has no example"


def public_attributes(kind: type) -> Iterator[tuple[str, Any]]:
    """Methods, as plain functions, and properties, also of the bases that are of this package."""
    for base in kind.__mro__:
        if base.__module__.split(".")[0] == "torchzygote":
            for attribute, value in vars(base).items():
                value = getattr(value, "__func__", value)
                if not attribute.startswith("_") and (callable(value) or isinstance(value, property)):
                    yield attribute, value


NATIVE = sorted(set(torchzygote.native.__all__) - {"loaded_devices", "reference"})


@pytest.mark.parametrize("name", NATIVE)
def test_an_operator_has_a_docstring_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(torchzygote.native, name)) or ""
    assert text.split("\n")[0].endswith(".")
    assert not inspect.signature(getattr(torchzygote.native, name)).parameters or ">>>" in text


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isfunction(getattr(torchzygote, name))])
def test_public_functions_are_annotated_and_say_their_parameters(name: str) -> None:
    function = getattr(torchzygote, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    text = inspect.getdoc(function) or ""
    refers = re.search(r"[Pp]arameters,?( result)? and errors are those of", text)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name
        assert refers or re.search(rf"\b{parameter.name}\b", text), f"{parameter.name} isn't described"


@cache
def api_pages() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_in_the_api_reference(name: str) -> None:
    directive = "autoclass" if inspect.isclass(getattr(torchzygote, name)) else "autofunction"
    assert re.search(rf"^\.\. {directive}:: {name}$", api_pages(), re.MULTILINE)


def test_the_api_reference_names_nothing_that_is_gone() -> None:
    listed = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", api_pages(), re.MULTILINE)
    assert set(listed) - {"info"} == set(NAMES)


# ---- pages -------------------------------------------------------------------------------------------------


def test_the_code_of_every_page_is_executed() -> None:
    """Every page with Python in it is collected, block by block, and hardly anything in it is skipped."""
    listing = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "README.md", "docs"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    ).stdout
    pages = [ROOT / "README.md", *(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        blocks = len(re.findall(r"^```python$", text, re.MULTILINE))
        collected = len(re.findall(rf"^{re.escape(str(page.relative_to(ROOT)))}::", listing, re.MULTILINE))
        assert collected >= blocks, page.name
        assert not re.search(r"<!--\s*skip", text), f"{page.name} skips code"
        assert text.count("# doctest: +SKIP") <= 1, f"{page.name} skips more than what depends on the machine"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]:
        if "_build" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_importing_everything_leaves_the_version_of_the_importing_module() -> None:
    module = {"__version__": "1.2"}
    exec("from torchzygote import *", module)
    assert module["__version__"] == "1.2"
    assert "gradient" in module


def test_the_version_is_written_in_one_place_and_cited() -> None:
    version = torchzygote.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(version)}\]", changelog, re.MULTILINE)
    holders = [
        path.name
        for path in [*PACKAGE.rglob("*.py"), ROOT / "pyproject.toml", DOCS / "conf.py"]
        if re.search(rf"[\"']{re.escape(version)}[\"']", path.read_text(encoding="utf-8"))
    ]
    assert holders == ["_version.py"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in citation
    released = re.search(rf"^## \[{re.escape(version)}\] - (\S+)$", changelog, re.MULTILINE)
    assert released is not None
    assert f"\ndate-released: {released[1]}\n" in citation
