"""How inputs go on: the affine maps that pieces of them enter, and where else they go, read off the graph.

The weights and the bias of a linear layer do: whatever follows depends on them through ``z = A W + b`` alone.
Knows shapes and graph nodes; nothing of derivatives.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import (
    consumers_below,
    count_outputs,
    node_attribute,
    node_name,
    node_shape,
    node_type,
    number_of,
    saved_by,
    source_of,
    value_of_node,
)
from .moves import RESHAPES, Move, Value, Way, kind_of_node, moved, reshaped, whole

__all__ = ["AffineMap", "Entrance", "Other", "Term", "entrances"]

_MOST_WAYS = 500

_Consumers = Mapping[Value, Sequence[tuple[Any, int]]]


class Term(NamedTuple):
    """A piece of an input as part of ``z``: ``factor @ arranged(x)``, shapes (samples, k) and (k, channels).

    ``restored``: from there to the shape of the input, zeros elsewhere; there may be axes before those of the
    matrix. It enters ``node`` as ``entered``. ``on_left``: as which operand of a product; ``None`` if only
    added.
    """

    which: int
    factor: Tensor
    channels: int
    arranged: Move
    restored: Move
    node: Any
    entered: Value
    on_left: bool | None

    @property
    def shape(self) -> tuple[int, int]:
        """Of the piece as a matrix."""
        return self.factor.shape[1], self.channels


class AffineMap(NamedTuple):
    """``z``, as a matrix (samples, channels) a sum of terms, and constant besides.

    ``z`` stands for the value, without its elements. ``channel``: its axis of channels; ``None`` where there
    is one channel, and all axes are samples.
    """

    z: Tensor
    channel: int | None
    terms: list[Term]

    def as_matrix(self, shaped: Tensor) -> Tensor:
        """From the shape of ``z`` to (samples, channels)."""
        if self.channel is None:
            return shaped.reshape(-1, 1)
        return shaped.movedim(self.channel, -1).reshape(-1, self.z.shape[self.channel])

    def shaped(self, matrix: Tensor) -> Tensor:
        """From (samples, channels) to the shape of ``z``."""
        if self.channel is None:
            return matrix.reshape(self.z.shape)
        sizes = [self.z.shape[axis] for axis in (*self.samples(), self.channel)]
        return matrix.reshape(sizes).movedim(-1, self.channel)

    def samples(self) -> list[int]:
        """The axes of samples."""
        return [axis for axis in range(self.z.dim()) if axis != self.channel]

    def jointly(self) -> list[AffineMap]:
        """The same in maps that are affine in all of their terms at once.

        A product of one element has both operands among the terms, and each is the other's factor.
        """
        sides: dict[Any, bool] = {}
        parts: tuple[list[Term], list[Term]] = ([], [])
        for term in self.terms:
            side = term.on_left
            is_apart = side is not None and sides.setdefault(term.node, side) != side
            parts[is_apart].append(term)
        return [self._replace(terms=terms) for terms in parts if terms]


class Other(NamedTuple):
    """A piece of an input that goes elsewhere, in this place of a node."""

    node: Any
    position: int
    way: Way

    @property
    def is_simple(self) -> bool:
        """Whether the node is one of PyTorch's own, and has one output."""
        return kind_of_node(node_name(self.node)) != "" and count_outputs(self.node) == 1

    def covers(self, like: Tensor) -> Tensor:
        """Which elements of the input are in the piece."""
        return self.way.back(like.new_ones(self.way.shape)) != 0


# Number of the input, place, whether it is an affine map there -> ways to follow on
Rest = Callable[[int, Other, bool], "list[Way] | None"]


class Entrance(NamedTuple):
    """All ways by which one input goes on, but for those that somebody else knows."""

    terms: list[Term]
    others: list[Other]


def entrances(
    root: Tensor,
    inputs: Sequence[Tensor],
    which: Sequence[int],
    rest: Rest | None = None,
    most: int = sys.maxsize,
) -> tuple[list[AffineMap], dict[int, Entrance]]:
    """How these of the ``inputs`` go on, on their way to ``root``.

    Not those that go too many ways, or are the root but for moves.

    ``rest`` decides at each other node that pieces go into: ways to follow on, none if it is handled
    elsewhere, ``None`` to record it. It may append to ``inputs`` and ``which``. Nothing is found where inputs
    are used more than ``most`` times.
    """
    consumers, number = consumers_below(root, inputs), number_of(inputs)
    if sum(len(consumers.get(source_of(inputs[i]), ())) for i in which) > most:
        return [], {}
    maps: dict[tuple[Value, int | None], list[Term]] = {}
    found: dict[int, Entrance] = {}
    for i in which:
        followed = _followed(consumers, (root.grad_fn, root.output_nr), inputs[i], i, rest)
        if followed is None:
            continue
        entries, others = followed
        found[i] = Entrance([entry.term for entry in entries], others)
        for value, channel, term in entries:
            maps.setdefault(_advance(consumers, value, channel), []).append(term)
    return [
        AffineMap(value_of_node(*value, number), channel, terms) for (value, channel), terms in maps.items()
    ], found


class _AffineEntry(NamedTuple):
    value: Value
    channel: int | None
    term: Term


def _followed(
    consumers: _Consumers, root: Value, x: Tensor, which: int, rest: Rest | None
) -> tuple[list[_AffineEntry], list[Other]] | None:
    """The affine maps that pieces of ``x`` go into, and where others go; ``None`` where that isn't all."""
    ways = 0
    entries: list[_AffineEntry] = []
    others: list[Other] = []
    pending = [whole(source_of(x), tuple(x.shape))]
    while pending:
        way = pending.pop()
        if way.value == root:
            return None
        for node, position in consumers.get(way.value, ()):
            onward = moved(node, way)
            if onward is not None:
                pending.extend(onward)
                continue
            ways += 1
            if ways > _MOST_WAYS:
                return None
            entry = _enter(node, position, way, x, which)
            other = Other(node, position, way)
            onward = None if rest is None else rest(which, other, entry is not None)
            if onward is not None:
                pending.extend(onward)
            elif entry is not None:
                entries.append(entry)
            else:
                others.append(other)
    return entries, others


def _enter(node: Any, position: int, way: Way, x: Tensor, which: int) -> _AffineEntry | None:
    """The affine map that a piece of ``x`` goes into here, if it is one."""
    shape, out = way.shape, node_shape(node, 0)
    if out is None or x.is_complex() or node_type(node, 0)[0] != x.dtype:
        return None
    if 0 in (math.prod(shape), math.prod(out)):
        return None
    try:
        found = _operand(node, position, shape, out)
    except RuntimeError:  # what it saved was changed or freed
        return None
    if found is None:
        return None
    factor, channel, on_left = found
    if factor.layout != torch.strided or factor.device != x.device or factor.dtype != x.dtype:
        return None
    k = factor.shape[1]
    forth, back = way.forth, way.back
    if on_left:
        arranged: Move = lambda given: forth(given).reshape(-1, k).t()
        restored: Move = lambda given: back(reshaped(given.mT, 2, shape))
    else:
        arranged = lambda given: forth(given).reshape(k, -1)
        restored = lambda given: back(reshaped(given, 2, shape))
    term = Term(which, factor, math.prod(shape) // k, arranged, restored, node, way.value, on_left)
    return _AffineEntry((node, 0), channel, term)


# By kind of node: positions of the left and right factor and of what is added, and the factors' names.
_PRODUCTS = {
    "Mm": (0, 1, None, "_saved_self", "_saved_mat2"),
    "Bmm": (0, 1, None, "_saved_self", "_saved_mat2"),
    "Mv": (0, 1, None, "_saved_self", "_saved_vec"),
    "Dot": (0, 1, None, "_saved_self", "_saved_tensor"),
    "Addmm": (1, 2, 0, "_saved_mat1", "_saved_mat2"),
    "Addmv": (1, 2, 0, "_saved_mat", "_saved_vec"),
}


def _operand(
    node: Any, position: int, shape: tuple[int, ...], out: tuple[int, ...]
) -> tuple[Tensor, int | None, bool | None] | None:
    """The factor, the axis of channels, and whether the operand is the left one, which must be transposed.

    ``None`` for that where it is only added.
    """
    kind = kind_of_node(node_name(node))
    if kind == "Add":
        scale = 1 if position == 0 else node_attribute(node, "_saved_alpha")
        return _added(node, shape, out, scale)
    if kind not in _PRODUCTS:
        return None
    left, right, added, left_name, right_name = _PRODUCTS[kind]
    if position == added:
        return _added(node, shape, out, node_attribute(node, "_saved_beta"))
    if kind == "Bmm" and out[0] != 1:
        return None
    scale = node_attribute(node, "_saved_alpha") if added is not None else 1
    on_left = position == left
    other = saved_by(node, right_name if on_left else left_name)
    if other is None or other.is_complex():
        return None
    factor = _matrix(other, to_the_right=on_left)
    if scale != 1:
        factor = factor * scale
    vector = kind == "Dot" or (kind in ("Mv", "Addmv") and position == right)
    if vector:  # one channel
        return factor, None, on_left
    channel = len(out) - (1 if position == right or kind in ("Mv", "Addmv") else 2)
    return factor, (channel if out[channel] > 1 else None), on_left


def _matrix(other: Tensor, *, to_the_right: bool) -> Tensor:
    """The other factor as (samples, k)."""
    if other.dim() == 3:
        other = other[0]
    if other.dim() == 1:
        return other.unsqueeze(0)
    return other.t() if to_the_right else other


def _added(
    node: Any, shape: tuple[int, ...], out: tuple[int, ...], scale: Any
) -> tuple[Tensor, int | None, None] | None:
    """What is added along one axis: a product with a column of ones."""
    if not isinstance(scale, (int, float)):
        return None
    missing = len(out) - len(shape)
    axes = [missing + axis for axis, size in enumerate(shape) if size > 1]
    if len(axes) > 1 or (axes and out[axes[0]] != math.prod(shape)):
        return None
    channel = axes[0] if axes else None
    samples = math.prod(out) // math.prod(shape)
    dtype, device = node_type(node, 0)
    column = torch.full((1, 1), scale, dtype=dtype, device=device)
    return column.expand(samples, 1), channel, None


def _advance(consumers: _Consumers, value: Value, channel: int | None) -> tuple[Value, int | None]:
    """The last value on the way from here that is the same but for its shape, or for what is added to it.

    There a bias meets its weights, and axes of samples have their own names again; before these are folded
    for the next layer.
    """
    best = value, channel
    rank = 0
    while True:
        found, shape = consumers.get(value, ()), node_shape(*value)
        if len(found) != 1 or shape is None:
            return best
        node, position = found[0]
        out = node_shape(node, 0)
        kind = kind_of_node(node_name(node))
        if out is None or node_type(node, 0)[0] != node_type(*value)[0]:
            return best
        if kind == "Add" and out == shape and (position == 0 or node_attribute(node, "_saved_alpha") == 1):
            rank = 0
        elif kind in RESHAPES and (channel is None or (channel == len(shape) - 1 and out[-1:] == shape[-1:])):
            channel = None if channel is None else len(out) - 1
        else:
            return best
        value = (node, 0)
        if len(out) >= rank:
            best, rank = (value, channel), len(out)
