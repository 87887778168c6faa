"""What a plan asks of ``torch.compile`` besides its program: fewer guards, and pads without masks.

Guards: before each call Dynamo compares everything it read as it traced, a thousand things for a plan, most
of them functions and modules of this package and of ``torch.func``, which nobody exchanges. That takes a
quarter of a millisecond.

Pads: the derivative of a slice is a vector of zeros with a part written into it. Inductor's code for the CPU
computes that element by element under a mask, which takes three to four times as long as plain arithmetic of
the same length (2.13). As a concatenation of the part and of zeros, each is a plain loop. A gradient sums up
such vectors, one for each slice: as a concatenation of the pieces between all ends it is written once, and
the parts never are.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

__all__ = ["compiler_options"]

_aten = torch.ops.aten
_Node = Any  # torch.fx.Node, whose arguments may be anything
_MOST_PIECES = 32  # each is a loop of its own

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
    """Writing into a slice of zeros becomes a concatenation, and so does a sum of several of these."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in reversed(graph.find_nodes(op="call_function", target=_aten.add.Tensor)):
            if node.users:  # not what has just gone into a larger sum
                _replace(graph, node, _sum_as_concatenation(graph, node))
        for node in graph.find_nodes(op="call_function", target=_aten.slice_scatter.default):
            _replace(graph, node, _as_concatenation(graph, node))

    def uuid(self) -> Any:
        """The key of this pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


class _Pad(NamedTuple):
    """``part`` at ``start`` to ``end`` along ``dim``, and zeros around it."""

    part: _Node
    dim: int
    start: int
    end: int


def _replace(graph: torch.fx.Graph, node: _Node, by: _Node | None) -> None:
    if by is None:
        return
    by.meta.update(node.meta)
    node.replace_all_uses_with(by)
    unused = [node]
    while unused:
        last = unused.pop()
        if not last.users and last.op == "call_function":
            before = last.all_input_nodes
            graph.erase_node(last)
            unused.extend(before)


def _pad_of(node: Any) -> _Pad | None:
    """What ``slice_scatter`` writes into zeros; ``None`` for anything else."""
    if not isinstance(node, torch.fx.Node) or node.target != _aten.slice_scatter.default or node.kwargs:
        return None
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
    base, part, dim, start, end, step = given
    whole, written = node.meta["val"], part.meta["val"]
    if base.target != _aten.full.default or base.args[1] != 0 or step != 1:
        return None
    numbers = [*whole.shape, *written.shape, *(n for n in (dim, start, end) if n is not None)]
    if whole.device.type != "cpu" or not all(type(n) is int for n in numbers):
        return None
    dim %= whole.dim()
    start, end, _ = slice(start, end).indices(whole.shape[dim])
    expected = [max(end - start, 0) if i == dim else n for i, n in enumerate(whole.shape)]
    if written.dtype != whole.dtype or list(written.shape) != expected or start >= end:
        return None
    return _Pad(part, dim, start, end)


def _zeros(graph: torch.fx.Graph, like: Tensor, dim: int, count: int) -> _Node:
    shape = [count if i == dim else n for i, n in enumerate(like.shape)]
    kinds: dict[str, Any] = {
        "dtype": like.dtype,
        "layout": torch.strided,
        "device": like.device,
        "pin_memory": False,
    }
    one = graph.call_function(_aten.full.default, (shape, 0), kinds)
    one.meta["val"] = like.new_zeros(shape)
    return one


def _as_concatenation(graph: torch.fx.Graph, node: _Node) -> _Node | None:
    """The node to put in the place of a pad, or ``None`` where it is none."""
    pad = _pad_of(node)
    return None if pad is None else _in_pieces(graph, node, [(node, pad)], pad.dim)


def _terms(node: _Node) -> list[_Node]:
    """What a chain of plain additions adds up, in its order."""
    found: list[_Node] = []
    while node.target == _aten.add.Tensor and not node.kwargs and (not found or len(node.users) == 1):
        first, second = node.args
        if not (isinstance(first, torch.fx.Node) and isinstance(second, torch.fx.Node)):
            break
        found.append(second)
        node = first
    return [node, *reversed(found)]


def _sum_as_concatenation(graph: torch.fx.Graph, node: _Node) -> _Node | None:
    """A sum of pads as its pieces between their ends, each of which is a plain sum: nothing is written twice.

    ``None`` where it is no such sum of tensors that are all alike, or where pieces are many.
    """
    whole, terms = node.meta["val"], _terms(node)
    # A pad that others use, too, is written anyway: it counts as any other term.
    pads = [_pad_of(one) if len(one.users) == 1 else None for one in terms]
    dims = [pad.dim for pad in pads if pad is not None]
    if len(dims) < 2:
        return None
    if not whole.is_contiguous() or not all(_is_alike(one.meta["val"], whole) for one in terms):
        return None
    dim = dims[0]
    parts = [
        (one, pad if pad is not None and pad.dim == dim else None)
        for one, pad in zip(terms, pads, strict=True)
    ]
    return _in_pieces(graph, node, parts, dim)


def _in_pieces(
    graph: torch.fx.Graph, node: _Node, terms: Sequence[tuple[_Node, _Pad | None]], dim: int
) -> _Node | None:
    """The sum of the terms, which ``node`` is, as a concatenation along ``dim``, the axis of all pads."""
    whole = node.meta["val"]
    ends = sorted({0, whole.shape[dim], *(n for _, pad in terms if pad for n in (pad.start, pad.end))})
    if len(ends) > _MOST_PIECES:
        return None
    with graph.inserting_before(node):
        pieces = [_piece(graph, terms, whole, dim, lo, hi) for lo, hi in itertools.pairwise(ends)]
        return graph.call_function(_aten.cat.default, (pieces, dim))


def _is_alike(value: Any, whole: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == whole.shape and value.dtype == whole.dtype


def _piece(
    graph: torch.fx.Graph,
    terms: Sequence[tuple[_Node, _Pad | None]],
    whole: Tensor,
    dim: int,
    lo: int,
    hi: int,
) -> _Node:
    """Elements ``lo`` to ``hi`` of a sum, in between of which none of the pads begins or ends."""
    total: _Node | None = None
    for term, pad in terms:
        source, offset = term, 0
        if pad is not None:
            if hi <= pad.start or pad.end <= lo:
                continue
            source, offset = pad.part, pad.start
        piece = source
        if source.meta["val"].shape[dim] != hi - lo:
            piece = graph.call_function(_aten.slice.Tensor, (source, dim, lo - offset, hi - offset))
            piece.meta["val"] = source.meta["val"].narrow(dim, lo - offset, hi - lo)
        if total is None:
            total = piece
        else:
            value = total.meta["val"] + piece.meta["val"]
            total = graph.call_function(_aten.add.Tensor, (total, piece))
            total.meta["val"] = value
    return _zeros(graph, whole, dim, hi - lo) if total is None else total


_PLAIN_PADS = _PlainPads()


def compiler_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those for :func:`torch.compile`, and what a plan adds where Inductor compiles it in its default mode.

    ``options``: the caller's, which stay.
    """
    if options.get("backend", "inductor") != "inductor" or options.get("mode") is not None:
        return options
    added = {"guard_filter_fn": _kept_guards, "post_grad_custom_post_pass": _PLAIN_PADS}
    return {**options, "options": {**added, **(options.get("options") or {})}}
