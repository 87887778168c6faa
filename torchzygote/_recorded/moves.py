"""Pieces of a value that recorded operations take and move, changing no element: the moves, and the way back.

Knows shapes and graph nodes; it must not know what becomes of the pieces.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import axis_of, node_attribute, node_name, node_shape, signed

__all__ = ["RESHAPES", "Move", "Value", "Way", "kind_of_node", "moved", "reshaped", "whole"]

_NAME = re.compile(r"(.+)Backward\d+$")  # a custom function's node has no number

# They keep the elements in row-major order.
RESHAPES = frozenset({"Alias", "Clone", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"})

Value = tuple[Any, int]  # an output of a node, as in ``node.next_functions``
Move = Callable[[Tensor], Tensor]


@functools.cache
def kind_of_node(name: str) -> str:
    """The operation that one of PyTorch's own nodes belongs to; empty for others."""
    found = _NAME.match(name)
    return found[1] if found else ""


class Way(NamedTuple):
    """From an input to a piece of it, by nothing but moves of its elements.

    ``back``: zeros elsewhere; there may be axes before those of the piece.
    """

    value: Value
    shape: tuple[int, ...]
    forth: Move
    back: Move

    def on(self, value: Value, shape: tuple[int, ...], forth: Move, back: Move) -> Way:
        """One move further."""
        return Way(value, shape, lambda given: forth(self.forth(given)), lambda given: self.back(back(given)))


def whole(value: Value, shape: tuple[int, ...]) -> Way:
    """Where nothing has been moved yet."""
    return Way(value, shape, _same, _same)


def _same(given: Tensor) -> Tensor:
    return given


def reshaped(given: Tensor, rank: int, shape: tuple[int, ...]) -> Tensor:
    """The last ``rank`` axes in another shape."""
    return given.reshape((*given.shape[: given.dim() - rank], *shape))


def _permuted(given: Tensor, dims: Sequence[int]) -> Tensor:
    lead = given.dim() - len(dims)
    return given.permute((*range(lead), *[lead + dim for dim in dims]))


def _zeros(piece: Tensor, fewer: int, shape: tuple[int, ...]) -> Tensor:
    """Zeros of ``shape`` behind the batch axes of ``piece``, which lacks ``fewer`` axes of that shape."""
    return piece.new_zeros((*piece.shape[: piece.dim() + fewer - len(shape)], *shape))


def moved(node: Any, way: Way) -> list[Way] | None:
    """On through a node that moves elements, or takes some; ``None`` if it does anything else."""
    kind, shape = kind_of_node(node_name(node)), way.shape
    rank = len(shape)
    out = node_shape(node, 0)
    value = (node, 0)
    if out is None:
        return None
    if kind in RESHAPES and math.prod(shape) == math.prod(out):
        return [
            way.on(
                value, out, lambda given: given.reshape(out), lambda given: reshaped(given, len(out), shape)
            )
        ]
    if kind == "T":
        return [way.on(value, out, Tensor.t, lambda given: given.mT if rank == 2 else given)]
    if kind == "Transpose" and rank > 0:
        a, b = (axis_of(node_attribute(node, name), rank) for name in ("_saved_dim0", "_saved_dim1"))
        return [
            way.on(
                value,
                out,
                lambda given: given.transpose(a, b),
                lambda given: given.transpose(a - rank, b - rank),
            )
        ]
    if kind == "Permute":
        dims = [axis_of(dim, rank) for dim in node_attribute(node, "_saved_dims")]
        undone = sorted(range(rank), key=dims.__getitem__)
        return [way.on(value, out, lambda given: given.permute(dims), lambda given: _permuted(given, undone))]
    if kind in ("Slice", "Split", "SplitWithSizes", "Select", "Unbind") and rank > 0:
        return _taken(node, kind, way)
    return None


def _taken(node: Any, kind: str, way: Way) -> list[Way] | None:
    """The pieces that a node takes along one axis."""
    dim = axis_of(node_attribute(node, "_saved_dim"), len(way.shape))
    size = way.shape[dim]
    if kind == "Select":
        return [_selected(node, 0, way, dim, signed(node_attribute(node, "_saved_index")) % size)]
    if kind == "Unbind":
        return [_selected(node, i, way, dim, i) for i in range(size)]
    if kind == "Slice":
        ends = (node_attribute(node, "_saved_start"), node_attribute(node, "_saved_end"))
        start, end = (None if e is None else signed(e) for e in ends)
        lo, hi, step = slice(start, end, node_attribute(node, "_saved_step")).indices(size)
        return [_sliced(node, 0, way, dim, lo, max(lo, hi), step)]
    if kind == "Split":
        length = node_attribute(node, "_saved_split_size")
        sizes = [min(length, size - lo) for lo in range(0, size, max(length, 1))]
    else:
        sizes = list(node_attribute(node, "_saved_split_sizes"))
    starts = itertools.accumulate(sizes, initial=0)
    return [
        _sliced(node, i, way, dim, lo, lo + n, 1)
        for i, (lo, n) in enumerate(zip(starts, sizes, strict=False))
    ]


def _selected(node: Any, output: int, way: Way, dim: int, index: int) -> Way:
    shape = way.shape
    return way.on(
        (node, output),
        (*shape[:dim], *shape[dim + 1 :]),
        lambda given: given.select(dim, index),
        lambda given: torch.select_scatter(_zeros(given, 1, shape), given, dim - len(shape), index),
    )


def _sliced(node: Any, output: int, way: Way, dim: int, lo: int, hi: int, step: int) -> Way:
    shape = way.shape
    where = (slice(None),) * dim + (slice(lo, hi, step),)
    return way.on(
        (node, output),
        (*shape[:dim], len(range(lo, hi, step)), *shape[dim + 1 :]),
        lambda given: given[where],
        lambda given: torch.slice_scatter(_zeros(given, 0, shape), given, dim - len(shape), lo, hi, step),
    )
