"""Sums over a grid whose terms depend on elements at the same distances everywhere, read off a graph.

Knows graph nodes and distances; it must not know what is pushed along.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from torch import Tensor

from .._recorded.alignment import is_linear
from .._recorded.moves import Value, kind_of_node
from .._recorded.stencils import Shifted, StencilWalk, Unknown, has_rule
from .._torch_private import Signature, Signatures, node_name, node_shape, saves_by_hooks
from .elementwise import Derivatives
from .linear import Recorded
from .rules import Operation, operation

__all__ = ["OWN", "GridValue", "StencilSum", "TakenValue", "Unsaid", "look_at", "read"]

_MOST_NODES = 500
_SUMS = frozenset({"Sum", "Mean"})
# Kinds whose rules need distances.
OWN = frozenset({"Cat", "Roll"})
# Linear, and by no numbers but those that a signature has.
_FIXED = frozenset(
    """
    Add Alias Cat Clone ConstantPadNd Neg ReshapeAlias Roll Rsub Slice SliceBackward Sub UnsafeView View
    """.split()  # noqa: SIM905
)
# What steps depend on, besides kinds, dtypes and shapes.
_ATTRIBUTES = {
    **dict.fromkeys(["AddBackward0", "RsubBackward0", "RsubBackward1", "SubBackward0"], ("_saved_alpha",)),
    **dict.fromkeys(
        ["SliceBackward0", "SliceBackwardBackward0"], ("_saved_dim", "_saved_start", "_saved_step")
    ),
    "CatBackward0": ("_saved_dim",),
    "ConstantPadNdBackward0": ("_saved_pad",),
    "PowBackward0": ("_saved_exponent",),
    "RollBackward0": ("_saved_shifts", "_saved_dims"),
}


class Unsaid(Exception):
    """Of this graph nothing is said, though there may be something to say of those that look the same."""


class GridValue(NamedTuple):
    """One value: its number, what it comes of, and what is known of it.

    ``operation``: ``None`` for the input, and for kinds that have rules of their own. ``is_fixed``: its
    derivatives are the same whatever the numbers are.
    """

    number: int
    kind: str
    place: Recorded
    operation: Operation | None
    known: Shifted
    is_fixed: bool

    @property
    def is_curved(self) -> bool:
        return self.operation is not None and self.operation.is_curved


class TakenValue(NamedTuple):
    """What the result is linear in: a value, whose cotangent is ``scale`` times that of node ``number``."""

    number: int
    value: int
    scale: float


class StencilSum(NamedTuple):
    """A sum: its values up to those that it is linear in, ``ends``; ``before`` as in a signature.

    Or an array, which is its only end.
    """

    walk: StencilWalk
    values: dict[int, GridValue]
    before: list[tuple[int | None, ...]]
    ends: list[TakenValue]


@functools.cache
def _known(name: str) -> tuple[str, ...] | None:
    kind = kind_of_node(name)
    if name == "DivBackward2":  # with a rounding mode
        return None
    return _ATTRIBUTES.get(name, ()) if has_rule(kind) or kind in _SUMS else None


_signatures = Signatures(_known)


def look_at(y: Tensor, x: Tensor) -> Signature | None:
    """What the graph of ``y`` looks like; ``None`` where there is something unknown, or nothing of ``x``."""
    found = None if y.grad_fn is None else _signatures.of(y, x, _MOST_NODES)
    return found if found is not None and len(found.nodes) > 1 else None


def read(found: Signature, x: Tensor, *, whole: bool) -> StencilSum | None:
    """``whole``: of the array that the graph gives, if elements are shifted anywhere; else of the sum.

    ``None`` where that isn't such a graph; raises :class:`Unsaid`.
    """
    try:
        reader = _Reader(found, x)
    except Unknown:
        return None
    top = len(found.nodes) - 1
    if whole and not reader.scalars and reader.walk.grid is not None:
        return StencilSum(reader.walk, reader.values, found.before, [TakenValue(top, top, 1.0)])
    if whole or top not in reader.scalars:
        return None
    last = _linear_part(reader)
    values = {number: one for number, one in reader.values.items() if number not in last}
    ends: dict[tuple[int, int], TakenValue] = {}
    for number in sorted(last):
        for b in found.before[number]:
            if b is not None and b not in last:
                # Of what the sum alone takes, the whole cotangent comes from there.
                others = any(consumer not in last for consumer in reader.consumers[b])
                end = TakenValue(number, b, reader.scales[number]) if others else TakenValue(b, b, 1.0)
                ends[end.number, b] = end
    return StencilSum(reader.walk, values, found.before, list(ends.values()))


def _linear_part(reader: _Reader) -> set[int]:
    """Numbers from which on all is linear: the sums, what is made of them, and what only these take."""
    found = set(reader.scalars)
    for number in sorted(reader.values, reverse=True):
        one = reader.values[number]
        varying = [b is not None for b in reader.before[number]]
        if any(varying) and is_linear(one.kind, varying) and found.issuperset(reader.consumers[number]):
            found.add(number)
    while True:
        # What others take, too, has another cotangent than what takes it brings: told of sums alone.
        beside = {
            number
            for number in found.difference(reader.scalars)
            if not found.issuperset(reader.consumers[number])
            or any(
                b is not None and b not in found and not found.issuperset(reader.consumers[b])
                for b in reader.before[number]
            )
        }
        if not beside:
            return found
        found -= beside


def _is_straight(place: Recorded, derivatives: Derivatives, like: Tensor) -> bool:
    """Whether a function has no second derivative anywhere, as ``abs``."""
    if saves_by_hooks(place.node):
        raise Unsaid
    return derivatives(place, like.new_ones(place.out), like).weight is None


class _Reader:
    """What is known of each value; raises :class:`Unknown`.

    ``scalars``: sums, and what is linear in them. ``scales``: of what sums take.
    """

    def __init__(self, found: Signature, x: Tensor) -> None:
        self.before = found.before
        self.values: dict[int, GridValue] = {}
        self.scalars: set[int] = set()
        self.scales: dict[int, float] = {}
        self.consumers: dict[int, list[int]] = {number: [] for number in range(len(found.nodes))}
        self.walk = StencilWalk(x)
        self._like = x.detach()
        self._known: dict[Value, Shifted | None] = {}
        for number, node in enumerate(found.nodes):
            if found.key[number][3] != x.dtype:
                raise Unknown
            self._look_at(number, node, found.before[number])

    def _look_at(self, number: int, node: Any, before: tuple[int | None, ...]) -> None:
        kind, shape = kind_of_node(node_name(node)), node_shape(node, 0)
        for b in before:
            if b is not None:
                self.consumers[b].append(number)
        sums = [b in self.scalars for b in before]
        if any(sums):
            others = any(b is not None and b not in self.scalars for b in before)
            if others or shape != () or not is_linear(kind, sums):
                raise Unknown
            self.scalars.add(number)
        elif kind in _SUMS and shape == ():
            (value,) = (b for b in before if b is not None)
            numel = math.prod(self.values[value].place.out) if kind == "Mean" else 1
            self.scales[number] = 1 / max(numel, 1)
            self.scalars.add(number)
        else:
            self._add(number, node, kind, before)

    def _add(self, number: int, node: Any, kind: str, before: tuple[int | None, ...]) -> None:
        onward = node.next_functions
        known = self.walk.of_output(self._known, node, 0, onward)
        if known is None or not known.shape:
            raise Unknown
        self._known[node, 0] = known
        values = tuple([None if b is None else v for b, v in zip(before, onward, strict=True)])
        shapes = tuple([None if b is None else self.values[b].place.out for b in before])
        place = Recorded((node, 0), known.shape, values, shapes, False)
        rule = None
        if before and kind not in OWN:
            rule = operation(place)
            if rule is None:
                raise Unknown
            if rule.derivatives is not None and _is_straight(place, rule.derivatives, self._like):
                rule = rule._replace(is_curved=False)
        fixed = not before or kind in _FIXED
        is_fixed = fixed and all(self.values[b].is_fixed for b in before if b is not None)
        self.values[number] = GridValue(number, kind, place, rule, known, is_fixed)
