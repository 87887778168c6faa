"""Arrays whose elements depend on elements of an input at the same distances everywhere: stencils.

Read off the recorded graph in microseconds, where tracing a function takes milliseconds. An operation without
a rule ends the search, so that what is found is never too little. Knows shapes and graph nodes, nothing of
products.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import axis_of, is_leaf, node_attribute, node_name, node_names, node_shape, signed
from ..sparsity.pattern import Pattern, indptr_of
from .alignment_rules import ELEMENTWISE
from .moves import kind_of_node
from .walk import evaluate

__all__ = ["Offset", "Shape", "Shifted", "StencilWalk", "Unknown", "around", "has_rule", "stencil", "targets"]

Shape = tuple[int, ...]
Offset = tuple[int, ...]

_MOST_NODES = 2_000
_MOST_OFFSETS = 64
# So many times fewer products than columns there must be, as colors are more than offsets.
_FEWER = 4


class Unknown(Exception):
    """What nothing is said of here."""


class Shifted(NamedTuple):
    """Element ``i`` depends on the elements ``i + offset`` of the grid.

    ``offsets``: ``None`` for the same element alone, whatever the grid is. ``wraps``: axes along which
    elements are counted modulo the grid's size. ``flat``: the value has the grid's elements in a row.
    """

    shape: Shape
    offsets: frozenset[Offset] | None = None
    wraps: frozenset[int] = frozenset()
    flat: bool = False


class StencilWalk:
    """The walk along a graph from a root down to an input, and the grid's shape once anything is shifted."""

    def __init__(self, x: Tensor) -> None:
        self._leaf = id(x)
        self.shape = tuple(x.shape)
        self.grid: Shape | None = None

    def of(self, root: Tensor) -> Shifted | None:
        """``None`` where the root depends on no element; raises :class:`Unknown`."""
        known: dict[tuple[Any, int], Shifted | None] = {}
        value = (root.grad_fn, root.output_nr)
        if not evaluate(value, known, lambda *at: self.of_output(known, *at), _MOST_NODES):
            raise Unknown
        return known[value]

    def of_output(
        self, known: Mapping[tuple[Any, int], Shifted | None], node: Any, output: int, before: Any
    ) -> Shifted | None:
        """What an output of a node is, from what is known of ``before``."""
        inputs = [known.get(v) for v in before]
        if not inputs:
            is_ours = id(node_attribute(node, "variable")) == self._leaf
            return Shifted(self.shape) if is_ours else None
        if not any(inputs):
            return None
        rule, out = _rule(node_name(node)), node_shape(node, output)
        if rule is None or out is None or output != 0:
            raise Unknown
        return rule(self, node, inputs, out)

    def on_grid(self, value: Shifted) -> Shifted:
        """The same with offsets; whose grid has to be that of all others."""
        if value.offsets is not None:
            return value
        if self.grid is None:
            self.grid = value.shape
        zero = frozenset([(0,) * len(self.grid)])
        if value.shape == self.grid:
            return value._replace(offsets=zero)
        if value.shape == (math.prod(self.grid),):
            return value._replace(offsets=zero, flat=True)
        raise Unknown

    def shifted(self, value: Shifted | None, out: Shape, by: dict[int, int], wraps: bool = False) -> Shifted:
        """Element ``i`` is now what element ``i + by`` was."""
        if value is None or len(value.shape) != len(out):
            raise Unknown
        value = self.on_grid(value)
        assert value.offsets is not None
        if value.flat and len(self.grid or ()) > 1:
            raise Unknown
        if not any(by.values()):
            return value._replace(shape=out)
        offsets = frozenset(tuple(o + by.get(i, 0) for i, o in enumerate(offset)) for offset in value.offsets)
        around = value.wraps | frozenset(by) if wraps else value.wraps
        return Shifted(out, offsets, around, value.flat)

    def together(self, values: Sequence[Shifted | None], out: Shape) -> Shifted:
        """Of values of one shape."""
        there = [value for value in values if value is not None]
        if any(value.shape != out for value in there):
            raise Unknown
        if all(value.offsets is None for value in there):
            return there[0]
        there = [self.on_grid(value) for value in there]
        if len({value.flat for value in there}) > 1:
            raise Unknown
        offsets = frozenset(itertools.chain.from_iterable(value.offsets or () for value in there))
        if len(offsets) > _MOST_OFFSETS:
            raise Unknown
        wraps = frozenset(itertools.chain.from_iterable(value.wraps for value in there))
        return Shifted(out, offsets, wraps, there[0].flat)


_Rule = Callable[[StencilWalk, Any, "list[Shifted | None]", Shape], Shifted]


def _elementwise(reading: StencilWalk, node: Any, inputs: list[Shifted | None], out: Shape) -> Shifted:
    return reading.together(inputs, out)


def _start(node: Any, size: int) -> int:
    """Where a slice of an axis of this size begins."""
    if int(node_attribute(node, "_saved_step")) != 1:
        raise Unknown
    start = node_attribute(node, "_saved_start")
    start = 0 if start is None else signed(start)
    return min(max(start + size if start < 0 else start, 0), size)


def _slice(reading: StencilWalk, node: Any, inputs: list[Shifted | None], out: Shape) -> Shifted:
    (value,) = inputs
    assert value is not None
    axis = axis_of(node_attribute(node, "_saved_dim"), len(out))
    return reading.shifted(value, out, {axis: _start(node, value.shape[axis])})


def _unslice(reading: StencilWalk, node: Any, inputs: list[Shifted | None], out: Shape) -> Shifted:
    """The pullback of a slice has zeros around it."""
    axis = axis_of(node_attribute(node, "_saved_dim"), len(out))
    return reading.shifted(inputs[0], out, {axis: -_start(node, out[axis])})


def _roll(reading: StencilWalk, node: Any, inputs: list[Shifted | None], out: Shape) -> Shifted:
    (value,) = inputs
    assert value is not None
    shifts = [signed(shift) for shift in node_attribute(node, "_saved_shifts")]
    dims = [axis_of(dim, len(out)) for dim in node_attribute(node, "_saved_dims")]
    if not dims and len(out) == 1:
        dims = [0]
    if not dims or len(set(dims)) < len(dims) or reading.on_grid(value).shape != reading.grid:
        raise Unknown
    return reading.shifted(value, out, {a: -s for a, s in zip(dims, shifts, strict=True)}, wraps=True)


def _pad(reading: StencilWalk, node: Any, inputs: list[Shifted | None], out: Shape) -> Shifted:
    pad = [int(n) for n in node_attribute(node, "_saved_pad")]
    by = {len(out) - 1 - i // 2: -signed(n) for i, n in enumerate(pad) if i % 2 == 0}
    return reading.shifted(inputs[0], out, by)


def _cat(reading: StencilWalk, node: Any, inputs: list[Shifted | None], out: Shape) -> Shifted:
    """Pieces one after the other; of constants, one size may be unknown."""
    axis = axis_of(node_attribute(node, "_saved_dim"), len(out))
    sizes = [None if value is None else value.shape[axis] for value in inputs]
    rest = out[axis] - sum(size for size in sizes if size is not None)
    if sizes.count(None) > 1:
        raise Unknown
    at, parts = 0, []
    for value, size in zip(inputs, sizes, strict=True):
        if value is not None:
            parts.append(reading.shifted(value, out, {axis: -at}))
        at += rest if size is None else size
    return reading.together(parts, out)


def _view(reading: StencilWalk, node: Any, inputs: list[Shifted | None], out: Shape) -> Shifted:
    """Of each element by itself in any shape; else the grid in a row, and back."""
    (value,) = inputs
    assert value is not None
    if value.shape == out or value.offsets is None:
        return value._replace(shape=out)
    if value.shape == reading.grid and out == (math.prod(reading.grid),):
        return value._replace(shape=out, flat=True)
    if value.flat and out == reading.grid:
        return value._replace(shape=out, flat=False)
    raise Unknown


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(["View", "UnsafeView", "ReshapeAlias"], _view),
    "Cat": _cat,
    "ConstantPadNd": _pad,
    "Roll": _roll,
    "Slice": _slice,
    "SliceBackward": _unslice,
}


def has_rule(kind: str) -> bool:
    """Whether anything is said of operations of this kind."""
    return kind in _RULES


@functools.cache
def _rule(name: str) -> _Rule | None:
    return _RULES.get(kind_of_node(name))


def _are_known(root: Tensor) -> bool:
    """Whether all operations have a rule, as a walk of a microsecond for each tells, before the long one."""
    names = node_names(root)
    return all(has_rule(kind_of_node(name)) or name == "torch::autograd::AccumulateGrad" for name in names)


def stencil(root: Tensor, x: Tensor) -> Pattern | None:
    """The pattern of the Jacobian of ``root`` by ``x``; ``None`` where that isn't seen to be a stencil's.

    Nor where each element depends on itself alone, which batch axes tell, or on a good part of all.
    """
    if root.grad_fn is None or not is_leaf(x) or x.dim() == 0 or not _are_known(root):
        return None
    reading = StencilWalk(x)
    try:
        found = reading.of(root)
        if found is None or found.offsets is None:
            return None
        assert reading.grid is not None
        shape = reading.grid if found.flat else found.shape
        return _pattern(shape, reading.grid, sorted(found.offsets), found.wraps)
    except Exception:  # a form of an operation that its rule doesn't know
        return None


def around(offset: Offset, grid: Shape, wraps: frozenset[int]) -> Offset:
    """The same distance, from 0 to the grid's size along axes that elements are counted modulo."""
    return tuple(o % n if i in wraps else o for i, (o, n) in enumerate(zip(offset, grid, strict=True)))


def targets(
    shape: Shape, grid: Shape, offsets: Sequence[Offset], wraps: frozenset[int]
) -> tuple[Tensor, Tensor]:
    """For each element of an array and each offset the number of the grid's element, and if it is inside.

    Both of shape (elements, offsets); what is outside has any number.
    """
    index, listed = [], []
    for offset in offsets:
        linear = torch.zeros((), dtype=torch.int64, device="cpu")
        inside = torch.ones((), dtype=torch.bool, device="cpu")
        for axis, (o, size, n) in enumerate(zip(offset, shape, grid, strict=True)):
            at = torch.arange(o, o + size, device="cpu")
            if axis in wraps:
                at = at % n
            linear = linear.unsqueeze(-1) * n + at
            inside = inside.unsqueeze(-1) & (at >= 0) & (at < n)
        index.append(linear.reshape(-1))
        listed.append(inside.reshape(-1))
    return torch.stack(index, 1), torch.stack(listed, 1)


def _pattern(shape: Shape, grid: Shape, offsets: Sequence[Offset], wraps: frozenset[int]) -> Pattern | None:
    """Rows in the order of the elements of ``shape``, columns in that of the grid."""
    if wraps:
        offsets = sorted({around(offset, grid, wraps) for offset in offsets})
    rows, columns = math.prod(shape), math.prod(grid)
    if _FEWER * len(offsets) > columns:
        return None
    table, there = targets(shape, grid, offsets, wraps)
    if wraps:
        table, order = torch.sort(table, 1)
        there = there.gather(1, order)
    return Pattern((rows, columns), indptr_of(there.sum(1)), table[there])
