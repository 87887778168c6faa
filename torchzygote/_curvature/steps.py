"""The steps that tangents take from inputs to the terms of a sum over samples, read off the recorded graph.

Knows graph nodes and shapes; it must not know what the tangents are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._recorded.alignment import LOSSES, Separation, is_linear
from .._recorded.alignment_rules import Alignment, Shape
from .._recorded.moves import Value, kind_of_node
from .._torch_private import (
    count_outputs,
    is_leaf,
    node_attribute,
    node_name,
    node_type,
    pulled_through,
    saves_by_hooks,
    source_of,
)
from .linear import Recorded, sum_of
from .rules import Operation, operation
from .samples import Samples, Sizes, samples_of

__all__ = ["Step", "Steps", "steps_to"]


class Step(NamedTuple):
    """One value on the way; ``inputs``: which of these it is, without any operation.

    ``samples``: those of the curvature there; ``None`` where there is none.
    """

    place: Recorded
    operation: Operation | None
    samples: Samples | None
    inputs: list[int]


class Taken(NamedTuple):
    """Where a sum takes an end of this shape: in this place of what gives the value."""

    node: Value
    position: int
    shape: tuple[int, ...]


class Steps(NamedTuple):
    """``steps``: values in the order in which they were computed; ``uses``: how many steps take each.

    ``ends``: the values that the sum is linear in. ``shared``: those that others come of, too, with the
    places where the sum takes them; their cotangents have more than these bring. ``own``: values whose
    tangents have memory of their own, which one step reads.
    """

    steps: list[Step]
    ends: dict[Value, Samples]
    uses: dict[Value, int]
    shared: dict[Value, list[Taken]]
    own: set[Value]

    def values(self) -> list[Value]:
        """Values whose cotangents are asked for."""
        curved = [one.place.value for one in self.steps if one.operation and one.operation.is_curved]
        taking = [one.node for places in self.shared.values() for one in places]
        return list(dict.fromkeys([*curved, *self.ends, *taking]))

    def of_ends(self, cotangents: Mapping[Value, Tensor | None]) -> dict[Value, Tensor | None]:
        """What the sum alone brings to each end."""
        found = {end: cotangents[end] for end in self.ends}
        for end, places in self.shared.items():
            parts = [
                pulled_through(value[0], place, given, shape)
                for value, place, shape in places
                if (given := cotangents[value]) is not None
            ]
            found[end] = sum_of(parts) if any(part is not None for part in parts) else None
        return found


def steps_to(y: Tensor, inputs: Sequence[Tensor], found: Separation, keep: bool) -> Steps | None:
    """The steps to the terms of ``y``; ``None`` where an operation has no rule, or dtypes differ.

    ``found``: along which axes ``y`` is a sum. ``keep``: what is computed by them is to be differentiated.
    """
    sizes = tuple((axis, inputs[0].shape[axis]) for axis in found.axes)
    top = _top(y, found, sizes)
    if top is None:
        return None
    sources: dict[Any, list[int]] = {}
    for i, x in enumerate(inputs):
        sources.setdefault(id(x) if is_leaf(x) else source_of(x), []).append(i)
    needed = _below(top, sources, found)
    needed.update({value: [] for value in top.losses})
    steps: list[Step] = []
    uses: dict[Value, int] = {}
    kind = y.dtype, y.device
    for value, known in found.values.items():
        if known is None or value not in needed:
            continue
        step = _step(value, known, needed[value], found, sizes, keep)
        if step is None or node_type(*value) != kind:
            return None
        steps.append(step)
        for before in step.place.before if step.operation else ():
            if before is not None:
                uses[before] = uses.get(before, 0) + 1
    # Each rule asks for what was saved, and most in a checkpoint are curved.
    if any(one.operation and one.operation.is_curved and saves_by_hooks(one.place.node) for one in steps):
        return None
    shared = {end: top.taken[end] for end in top.ends if uses.get(end)}
    if any(count_outputs(one.node[0]) > 1 for places in shared.values() for one in places):
        return None
    fresh = (one.place.value for one in steps if one.operation and one.operation.is_fresh)
    return Steps(steps, top.ends, uses, shared, {value for value in fresh if uses.get(value) == 1})


class _Top(NamedTuple):
    """The linear part of a sum: the ``ends`` that it begins with, and ``losses`` of them, sums themselves.

    ``taken``: where it takes them.
    """

    ends: dict[Value, Samples]
    losses: list[Value]
    taken: dict[Value, list[Taken]]


def _top(y: Tensor, found: Separation, sizes: Sizes) -> _Top | None:
    """Ends are the last values with axes of samples; ``None`` where ``y`` isn't that simple."""
    top = _Top({}, [], {})
    stack: list[Value] = [(y.grad_fn, y.output_nr)]
    seen: set[Value] = set()
    while stack:
        value = stack.pop()
        known = found.values.get(value)
        if known is None or value in seen:
            continue
        seen.add(value)
        samples = samples_of(tuple(known[0]), sizes)
        if samples is not None:
            top.ends[value] = samples
            continue
        before, kind = value[0].next_functions, kind_of_node(node_name(value[0]))
        varying = [found.values.get(one) for one in before]
        if kind in LOSSES and not known[1]:
            if any(one is not None and samples_of(tuple(one[0]), sizes) is None for one in varying):
                return None
            top.losses.append(value)
        elif not before or not is_linear(kind, [one is not None for one in varying]):
            return None
        for place, (one, size) in enumerate(zip(before, varying, strict=True)):
            if size is not None:
                top.taken.setdefault(one, []).append(Taken(value, place, tuple(size[1])))
        stack.extend(before)
    return top


def _below(top: _Top, sources: Mapping[Any, list[int]], found: Separation) -> dict[Value, list[int]]:
    """The values that the ends come of, and which inputs they are."""
    below: dict[Value, list[int]] = {}
    stack = list(top.ends)
    while stack:
        value = stack.pop()
        if value in below:
            continue
        node = value[0]
        before = node.next_functions
        leaf = None if before else sources.get(id(node_attribute(node, "variable")))
        below[value] = sources.get(value) or leaf or []
        if below[value]:
            continue
        stack.extend(one for one in before if found.values.get(one) is not None)
    return below


def _step(
    value: Value,
    known: tuple[Alignment, Shape],
    inputs: list[int],
    found: Separation,
    sizes: Sizes,
    keep: bool,
) -> Step | None:
    before, shapes = [], []
    for one in value[0].next_functions:
        varying = found.values.get(one)
        before.append(None if varying is None else one)
        shapes.append(None if varying is None else tuple(varying[1]))
    place = Recorded(value, tuple(known[1]), tuple(before), tuple(shapes), keep)
    if inputs:
        return Step(place, None, None, inputs)
    rule = operation(place)
    if rule is None:
        return None
    if not rule.is_curved:
        return Step(place, rule, None, inputs)
    shaped_by = value if rule.shaped_by is None else place.before[rule.shaped_by]
    where = None if shaped_by is None else found.values[shaped_by]
    samples = None if where is None else samples_of(tuple(where[0]), sizes)
    return None if samples is None else Step(place, rule, samples, inputs)
