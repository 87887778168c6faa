"""How tangents go through a sum over a grid, and where their products belong in its Hessian.

Read off the recorded graph once, and kept for graphs that look the same: these differ in their numbers alone.
Knows steps and distances; it must not know the numbers.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._recorded.stencils import Offset, Shape, Shifted, around, targets
from .._torch_private import axis_of, node_attribute, signed
from .linear import Recorded
from .rules import Operation
from .stencil_reading import GridValue, StencilSum, TakenValue, Unsaid, look_at, read

__all__ = ["GridEnd", "GridEntries", "GridProgram", "GridStep", "Wanted", "program", "shifts_of"]

Wanted = Literal["hessian", "diagonal", "jacobian"]

# So many entries of one element take as long as products do, for each operation.
_MOST_TERMS = 4
# Programs are kept if their tables and fixed tangents have no more elements than this, and so many of them.
_MOST_KEPT = 1 << 17
_KEPT = 32
# To read a small graph and to make its tables takes as long as products for so many elements. By fewer, it is
# done the second time that a graph looks like this: what is asked for once, or for other sizes each time, is
# left.
_AT_ONCE = 256


class GridEntries(NamedTuple):
    """Where numbers go: ``inside`` are those of all that go anywhere (``None``: all), ``to`` where."""

    to: Tensor
    inside: Tensor | None

    def add(self, numbers: Tensor, total: Tensor) -> None:
        total.index_add_(0, self.to, self.of(numbers))

    def of(self, numbers: Tensor) -> Tensor:
        """Those that go anywhere, in a row."""
        numbers = numbers.reshape(-1)
        return numbers if self.inside is None else numbers[self.inside]


class GridStep(NamedTuple):
    """One value: ``before`` are the numbers of those it comes of, along so many ``distances``.

    ``operation``: ``None`` for the input, for pieces that are joined and what is rolled; ``places``: for each
    of ``before`` where its tangents are among those here (``None``: they are the same ones). ``starts``:
    where pieces begin along ``axis``. ``entries``: of products of two tangents, where there is curvature.
    ``last``: values that nobody asks for any more.
    """

    number: int
    before: tuple[int | None, ...]
    shapes: tuple[Shape | None, ...]
    shape: Shape
    operation: Operation | None
    places: tuple[list[int] | None, ...]
    distances: int
    axis: int
    starts: list[int]
    entries: GridEntries | None
    last: list[int]

    def place(self, nodes: list[Any]) -> Recorded:
        before = tuple([None if b is None else (nodes[b], 0) for b in self.before])
        return Recorded((nodes[self.number], 0), self.shape, before, self.shapes, False)


class GridEnd(NamedTuple):
    """What the sum is linear in; ``entries``: of its tangents, in the gradient."""

    taken: TakenValue
    entries: GridEntries


class GridProgram(NamedTuple):
    """``fixed``: steps that are the same whatever the numbers are, and come first.

    ``asked``: numbers whose cotangents are asked for. ``shape``: of what is made. ``entries``: for a
    Jacobian, of the tangents of what they end in. ``is_diagonal``: only products of tangents with themselves
    count. ``kept``: tangents of fixed steps, once they are known, by their number and by that of who takes
    them along other distances; ``None`` where they aren't kept.
    ``confirmed``: once a product has been compared with what came of these steps, whether it agreed.
    """

    fixed: list[GridStep]
    steps: list[GridStep]
    ends: list[GridEnd]
    asked: list[int]
    shape: Shape
    entries: GridEntries | None
    is_diagonal: bool
    kept: dict[tuple[int, int | None], Tensor] | None
    confirmed: list[bool]


_programs: dict[Any, GridProgram | None] = {}
_seen: set[Any] = set()  # keys of graphs that are going to be read the next time


def program(y: Tensor, x: Tensor, wanted: Wanted) -> tuple[GridProgram, list[Any]] | None:
    """The steps from a leaf ``x`` to a number ``y``, or for a Jacobian to an array, and the recorded nodes.

    ``None`` where ``y`` doesn't come of ``x`` in such a way, or where batched products take less.
    """
    found = look_at(y, x)
    if found is None:
        return None
    key = (found.key, x.device, wanted)
    made = _programs.get(key, ...)
    if made is ...:
        if x.numel() < _AT_ONCE and key not in _seen:
            _make_room(_seen)
            _seen.add(key)
            return None
        try:
            found_sum = read(found, x, whole=wanted == "jacobian")
        except Unsaid:
            return None
        made = None if found_sum is None else _Tables(found_sum, x, wanted).program()
        if made is None or made.kept is not None:
            _make_room(_programs)
            _programs[key] = made
    return None if made is None else (made, found.nodes)


def _make_room(kept: dict[Any, Any] | set[Any]) -> None:
    if len(kept) >= _KEPT:
        kept.clear()


class _Tables:
    """Where tangents and their products go."""

    def __init__(self, found: StencilSum, x: Tensor, wanted: Wanted) -> None:
        self._found = found
        self._n = x.numel()
        self._device = x.device
        self._wanted = wanted
        self._is_diagonal = wanted == "diagonal"
        self._grid = found.walk.grid or (self._n,)
        wraps: frozenset[int] = frozenset()
        self._wraps = wraps.union(*(one.known.wraps for one in found.values.values()))
        self._made: dict[Any, GridEntries] = {}  # most values have the same distances as others

    def program(self) -> GridProgram | None:
        """``None`` where batched products take less."""
        found = self._found
        values = list(found.values.values())
        curved = [one for one in values if one.is_curved and self._wanted != "jacobian"]
        if sum(self._terms(one) for one in curved) > _MOST_TERMS * len(found.before):
            return None
        if self._is_diagonal and any(self._meet(one.known) for one in curved):
            return None
        entries = {one.number: self._products(one.known) for one in curved}
        last: dict[int, int] = {b: one.number for one in values for b in self._before(one) if b is not None}
        for end in found.ends:
            last.pop(end.value, None)
        steps = [self._step(one, entries.get(one.number), last) for one in values]
        ends = [GridEnd(end, self._entries(found.values[end.value].known)) for end in found.ends]
        asked = dict.fromkeys([*entries, *(end.taken.number for end in ends)])
        shape: Shape = (self._n, self._n)
        rows: GridEntries | None = None
        if self._is_diagonal:
            shape = tuple(found.walk.shape)
        elif self._wanted == "jacobian":
            (end,) = found.ends
            shape, rows = self._rows(found.values[end.value])
        fixed = {one.number for one in values if one.is_fixed}
        return GridProgram(
            [step for step in steps if step.number in fixed],
            [step for step in steps if step.number not in fixed],
            ends,
            list(asked),
            shape,
            rows,
            self._is_diagonal,
            {} if self._size(steps, fixed) <= _MOST_KEPT else None,
            [],
        )

    def _size(self, steps: list[GridStep], fixed: set[int]) -> int:
        """Elements of all tables, of the tangents of fixed steps, and of these as others take them."""
        size = sum(one.to.numel() * (1 if one.inside is None else 2) for one in self._made.values())
        for step in steps:
            if step.number in fixed:
                size += step.distances * math.prod(step.shape)
            for b, where, shape in zip(step.before, step.places, step.shapes, strict=True):
                if b in fixed and where is not None and shape is not None:
                    size += step.distances * math.prod(shape)
        return size

    def _terms(self, one: GridValue) -> int:
        """Products of two tangents, for each element."""
        distances = len(self._offsets(one.known))
        return distances if self._is_diagonal else distances**2

    def _before(self, one: GridValue) -> tuple[int | None, ...]:
        return self._found.before[one.number]

    def _step(self, one: GridValue, entries: GridEntries | None, last: dict[int, int]) -> GridStep:
        before, starts, axis = self._before(one), [], 0
        if one.kind == "Cat":
            axis = axis_of(node_attribute(one.place.node, "_saved_dim"), len(one.place.out))
            starts = self._starts(one, axis)
        return GridStep(
            one.number,
            before,
            one.place.shapes,
            one.place.out,
            one.operation,
            tuple(self._places(one, axis, starts)),
            len(self._offsets(one.known)),
            axis,
            starts,
            entries,
            [b for b in dict.fromkeys(before) if b is not None and last.get(b) == one.number],
        )

    def _places(self, one: GridValue, axis: int, starts: list[int]) -> list[list[int] | None]:
        before, offsets = self._before(one), self._offsets(one.known)
        if not starts and sum(b is not None for b in before) <= 1:
            return [None] * len(before)
        places: list[list[int] | None] = []
        for i, b in enumerate(before):
            own = [] if b is None else self._offsets(self._found.values[b].known)
            if starts:
                own = [tuple(o - starts[i] * (a == axis) for a, o in enumerate(of)) for of in own]
            places.append(None if own == offsets and not starts else [offsets.index(of) for of in own])
        return places

    def _starts(self, one: GridValue, axis: int) -> list[int]:
        """Of pieces that are joined; of constants, one size may be unknown."""
        sizes = [None if shape is None else shape[axis] for shape in one.place.shapes]
        rest = one.place.out[axis] - sum(size for size in sizes if size is not None)
        starts, at = [], 0
        for size in sizes:
            starts.append(at)
            at += rest if size is None else size
        return starts

    def _offsets(self, known: Shifted) -> list[Offset]:
        return [(0,) * len(self._grid)] if known.offsets is None else sorted(known.offsets)

    def _meet(self, known: Shifted) -> bool:
        """Whether two distances lead to the same element."""
        return len({around(of, self._grid, self._wraps) for of in self._offsets(known)}) < len(
            known.offsets or (0,)
        )

    def _targets(self, known: Shifted) -> tuple[Tensor, Tensor]:
        """Shape (distances, elements)."""
        shape = self._grid if known.offsets is None or known.flat else known.shape
        index, inside = targets(shape, self._grid, self._offsets(known), self._wraps)
        return index.t(), inside.t()

    def _entries(self, known: Shifted) -> GridEntries:
        key = False, known
        if key not in self._made:
            self._made[key] = self._on_device(*self._targets(known))
        return self._made[key]

    def _rows(self, one: GridValue) -> tuple[Shape, GridEntries]:
        """Of tangents in the Jacobian of their value, whose shape is the first."""
        index, inside = self._targets(one.known)
        rows = torch.arange(index.shape[1], device="cpu") * self._n
        self._made["rows"] = self._on_device(index + rows, inside)
        return (index.shape[1], self._n), self._made["rows"]

    def _products(self, known: Shifted) -> GridEntries:
        """Of products of two tangents, in both orders, or of each with itself."""
        if self._is_diagonal:
            return self._entries(known)
        key = True, known
        if key not in self._made:
            index, inside = self._targets(known)
            pairs = index.unsqueeze(1) * self._n + index.unsqueeze(0)
            self._made[key] = self._on_device(pairs, inside.unsqueeze(1) & inside.unsqueeze(0))
        return self._made[key]

    def _on_device(self, index: Tensor, inside: Tensor) -> GridEntries:
        index, inside = index.reshape(-1), inside.reshape(-1)
        if bool(inside.all()):
            return GridEntries(index.to(self._device), None)
        where = inside.nonzero()[:, 0]
        return GridEntries(index[where].to(self._device), where.to(self._device))


def shifts_of(node: Any, rank: int) -> tuple[list[int], list[int]]:
    """By how much a node rolls which axes, of what has one more axis before those of the value."""
    shifts = [signed(shift) for shift in node_attribute(node, "_saved_shifts")]
    return shifts, [1 + axis_of(dim, rank) for dim in node_attribute(node, "_saved_dims")] or [1]
