"""What a plan asks of ``torch.compile`` besides its program: fewer guards, and pads without masks.

Guards: before each call Dynamo compares everything it read as it traced, a thousand things for a plan, most
of them functions and modules of this package and of ``torch.func``, which nobody exchanges. That takes a
quarter of a millisecond.

Pads: the derivative of a slice is a vector of zeros with a part written into it. Inductor's code for the CPU
computes that element by element under a mask, which takes three to four times as long as plain arithmetic of
the same length (2.13). As a concatenation of the part and of zeros, each is a plain loop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = ["compiler_options"]

_aten = torch.ops.aten

# How Dynamo writes where it found a thing: a global of this package (without `__import_` it is one of the
# module whose code is compiled), of what `torch.func` is written in, or of Python. Whatever is reached
# through them by more steps (`torch.nn.functional.gelu`) isn't left out.
_INTERNAL = re.compile(
    r"G\['(?:__import_torchzygote\w*|__import_torch_dot__functorch\w*|__import_torch_dot_utils_dot__pytree"
    r"|__builtins_dict___\d+|(?!__)\w+)'\](?:\.\w+|\['\w+'\])?"
)
_CODE = frozenset(
    {"BUILTIN_MATCH", "CLASS_MATCH", "CLOSURE_MATCH", "DUPLICATE_INPUT", "FUNCTION_MATCH", "MODULE_MATCH"}
)


def _kept_guards(entries: Sequence[Any]) -> list[bool]:
    """Which guards to keep: all but those on code of this package, of ``torch.func`` and of Python."""
    return [one.guard_type not in _CODE or _INTERNAL.fullmatch(one.name) is None for one in entries]


class _PlainPads(CustomGraphPass):
    """Writing into a slice of zeros becomes a concatenation."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=_aten.slice_scatter.default):
            pad = _as_concatenation(graph, node)
            if pad is not None:
                node.replace_all_uses_with(pad)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """The key of this pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


def _as_concatenation(graph: torch.fx.Graph, node: Any) -> torch.fx.Node | None:
    """The node to put in its place, or ``None`` where it isn't such a pad."""
    arguments: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
    base, part, dim, start, end, step = arguments
    whole, written = node.meta["val"], part.meta["val"]
    is_zero = base.target == _aten.full.default and base.args[1] == 0
    sizes = [*whole.shape, *written.shape]
    if node.kwargs or not is_zero or step != 1:
        return None
    if whole.device.type != "cpu" or not all(type(n) is int for n in sizes):
        return None
    size = whole.shape[dim]
    start, end, _ = slice(start, end).indices(size)
    expected = [max(end - start, 0) if i == dim % whole.dim() else n for i, n in enumerate(whole.shape)]
    if written.dtype != whole.dtype or list(written.shape) != expected or start >= end:
        return None

    def zeros(n: int) -> torch.fx.Node:
        shape = [n if i == dim % whole.dim() else m for i, m in enumerate(whole.shape)]
        one = graph.call_function(_aten.full.default, (shape, 0), dict(base.kwargs))
        one.meta["val"] = whole.new_zeros(shape)
        return one

    with graph.inserting_before(node):
        before = [zeros(start)] if start > 0 else []
        after = [zeros(size - end)] if end < size else []
        pad = graph.call_function(_aten.cat.default, ([*before, part, *after], dim))
    pad.meta.update(node.meta)
    return pad


_PLAIN_PADS = _PlainPads()


def compiler_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those for :func:`torch.compile`, and what a plan adds where Inductor compiles it in its default mode.

    ``options``: the caller's, which stay.
    """
    if options.get("backend", "inductor") != "inductor" or options.get("mode") is not None:
        return options
    added = {"guard_filter_fn": _kept_guards, "post_grad_custom_post_pass": _PLAIN_PADS}
    return {**options, "options": {**added, **(options.get("options") or {})}}
