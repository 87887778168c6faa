"""Diagonals of block diagonal Hessians, summed up from what each recorded operation bends.

Where ``y`` is a sum over samples, its second derivative along tangents ``t`` of the inputs is the sum of what
the operations bend the tangents that reach them, by their cotangents: all cotangents come of one pullback, and
tangents are pushed once along the recorded graph. Nested pullbacks take two thirds more. The tangents are
checked: with random weights for each sample, they must give the gradient again.

Knows graph nodes and layouts; it must not know where the inputs come from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._alignment import Separation, is_linear
from ._alignment_rules import Alignment, Shape
from ._certificate import Comparison, all_finite, slack
from ._curvature_rules import Operation, Place, operation
from ._pieces import Value, kind_of_node
from ._products import chunks
from ._repetition import Repetition
from ._separable import Layout, by_block, in_shape_of_x, rows_in_shape_of_x
from ._torch_private import cotangents_at, in_plain_eager, is_leaf, node_attribute, node_type, source_of

__all__ = ["Curvature", "curvature"]

_WEIGHTS = 4  # 1, 1/2, 1/4, 1/8: they change no digit
_MOST_KEPT = 1 << 16  # elements


class _Step(NamedTuple):
    """One value on the way; ``by_sample``: see :func:`_sample_axes`. ``inputs``: which of these it is."""

    place: Place
    operation: Operation | None
    by_sample: tuple[list[int], list[int]]
    inputs: list[int]


class Curvature(NamedTuple):
    """What is needed to sum up the diagonals of the Hessian of ``y`` by ``inputs``, apart from directions.

    ``steps``: values in the order in which they were computed. ``ends``: those that ``y`` is linear in, none of
    which comes of another. ``uses``: how many steps take a value.
    """

    y: Tensor
    inputs: list[Tensor]
    layouts: list[Layout]
    steps: list[_Step]
    ends: dict[Value, tuple[list[int], list[int]]]
    uses: dict[Value, int]
    keep: bool

    def diagonals(self, chunk: int, eps: float, progress: bool) -> list[Tensor] | None:
        """The diagonal by each input, in its shape, ``chunk`` directions at a time.

        ``None`` where something isn't finite, as zeros elsewhere might be wrong, or where the check fails.
        """
        with torch.set_grad_enabled(self.keep):
            bent = [step.place.value for step in self.steps if step.operation and step.operation.bends]
            values = list(dict.fromkeys([*bent, *self.ends]))
            inside, gradients = cotangents_at(self.y, values, self.inputs, self.keep)
            cotangents = dict(zip(values, inside, strict=True))
            drawn = _draw(tuple(self.layouts), self.y.dtype, self.y.device)
            bends, got = self._pushed(drawn, 1.0, cotangents, chunk, progress)
            if not all_finite(bends.detach()) or not self._is_gradient(
                drawn, gradients, got.detach(), cotangents, eps, chunk
            ):
                return None
            bends = bends * drawn.undone
            parts = torch.split(bends, [layout.block_columns for layout in self.layouts])
            return [
                in_shape_of_x(layout, part.t()) if len(part) > 1 else part.reshape(layout.x_shape)
                for layout, part in zip(self.layouts, parts, strict=True)
            ]

    def _pushed(
        self,
        drawn: _Draw,
        factor: float,
        cotangents: Mapping[Value, Tensor | None],
        chunk: int,
        progress: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """For each direction and sample what is bent, and what the ends grow by; shape (directions, samples)."""
        rows = []
        for lo, hi in chunks(drawn.directions, chunk, progress, "column"):
            seeds = drawn.seeds(lo, hi)
            rows.append(self._push(seeds if factor == 1 else [s * factor for s in seeds], cotangents))
        bends, ends = zip(*rows, strict=True)
        return (bends[0], ends[0]) if len(rows) == 1 else (torch.cat(bends), torch.cat(ends))

    def _push(
        self, seeds: Sequence[Tensor], cotangents: Mapping[Value, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        tangents: dict[Value, Tensor] = {}
        left = dict(self.uses)
        samples = (len(seeds[0]), math.prod(self.layouts[0].x_shape[p] for p, _ in self.layouts[0].pairs))
        bends, ends = seeds[0].new_zeros(samples), seeds[0].new_zeros(samples)
        for place, rule, by_sample, inputs in self.steps:
            value = place.value
            if rule is None:
                tangent = seeds[inputs[0]]
                for i in inputs[1:]:
                    tangent = tangent + seeds[i]
            else:
                given = [None if before is None else tangents[before] for before in place.before]
                tangent, bend = rule.rule(place, given, cotangents.get(value) if rule.bends else None)
                if bend is not None:
                    bends = torch.add(bends, _summed(bend, by_sample, samples), alpha=rule.scale)
                for before in place.before:
                    if before is not None:
                        left[before] -= 1
                        if left[before] == 0:
                            del tangents[before]
            if value in self.ends and (cotangent := cotangents[value]) is not None:
                ends = ends + _summed(tangent * cotangent, by_sample, samples)
            if left.get(value, 0) > 0:
                tangents[value] = tangent
        return bends, ends

    def _is_gradient(
        self,
        drawn: _Draw,
        gradients: Sequence[Tensor | None],
        got: Tensor,
        cotangents: Mapping[Value, Tensor | None],
        eps: float,
        chunk: int,
    ) -> bool:
        """Whether the tangents give the gradient, each sample by itself."""
        parts = [
            x.new_zeros(layout.block_columns, got.shape[1])
            if g is None
            else by_block(layout, g.detach().unsqueeze(0))[0].t()
            for x, g, layout in zip(self.inputs, gradients, self.layouts, strict=True)
        ]
        wanted = (parts[0] if len(parts) == 1 else torch.cat(parts)) * drawn.weights
        of_terms, of_largest = slack(eps)
        sizes = got.abs()
        allowed = sizes * of_terms + sizes.amax(0) * of_largest
        if ((got - wanted).abs_() <= allowed).all().item():
            return True
        if not (all_finite(got) and all_finite(wanted)):
            return False
        compared = Comparison(got, sizes, wanted, eps)

        def again(factor: Tensor) -> list[Tensor]:
            return [self._pushed(drawn, float(factor), cotangents, chunk)[1]]

        Repetition(got.new_ones(1), lambda: (), [got], again).refute([compared])
        return bool(compared.fine.all())


class _Draw(NamedTuple):
    """Directions: one for each column of a block, in all blocks at once, with a weight for each of these."""

    layouts: tuple[Layout, ...]
    weights: Tensor
    undone: Tensor
    kept: list[Tensor] | None

    @property
    def directions(self) -> int:
        return sum(layout.block_columns for layout in self.layouts)

    def seeds(self, lo: int, hi: int) -> list[Tensor]:
        """Directions ``lo`` to ``hi``, for each input of shape (hi - lo, *x's); not to be written into."""
        if self.kept is not None:
            return self.kept if hi - lo == self.directions else [s[lo:hi] for s in self.kept]
        return self.made(lo, hi)

    def made(self, lo: int, hi: int) -> list[Tensor]:
        seeds, first = [], 0
        for layout in self.layouts:
            rows = self.weights.new_zeros(hi - lo, len(self.weights), layout.block_columns)
            for k in range(max(lo, first), min(hi, first + layout.block_columns)):
                rows[k - lo, :, k - first] = self.weights
            seeds.append(rows_in_shape_of_x(layout, rows))
            first += layout.block_columns
        return seeds


def _draw(layouts: tuple[Layout, ...], dtype: torch.dtype, device: torch.device) -> _Draw:
    elements = sum(layout.block_columns for layout in layouts) * sum(math.prod(one.x_shape) for one in layouts)
    few = elements <= _MOST_KEPT
    plain = device.type == "cpu" and in_plain_eager() and not torch.is_inference_mode_enabled()
    return (_kept_draw if few and plain else _new_draw)(layouts, dtype, device, few)


def _new_draw(layouts: tuple[Layout, ...], dtype: torch.dtype, device: torch.device, keep: bool) -> _Draw:
    blocks = math.prod(layouts[0].x_shape[p] for p, _ in layouts[0].pairs)
    # On the CPU, so that a device draws the same; a generator of its own leaves the global one alone.
    generator = torch.Generator("cpu").manual_seed(20_240_229 + blocks)
    drawn = torch.randint(_WEIGHTS, (blocks,), generator=generator, device="cpu")
    weights = torch.exp2(-drawn.to(device, dtype))
    draw = _Draw(layouts, weights, 1 / (weights * weights), None)
    return draw._replace(kept=draw.made(0, draw.directions)) if keep else draw


# A loop asks for the same one in every call.
_kept_draw = functools.lru_cache(maxsize=8)(_new_draw)


def _summed(given: Tensor, by_sample: tuple[list[int], list[int]], samples: tuple[int, int]) -> Tensor:
    gone, order = by_sample
    if gone:
        given = given.sum(gone)
    return (given if order == sorted(order) else given.permute(order)).reshape(samples)


def _sample_axes(alignment: Alignment, axes: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Of tangents of a value: the axes within a sample, and how the others are ordered.

    ``None`` where a value doesn't have one axis for each of those that tell samples apart.
    """
    where = [axis for axis in alignment if axis in axes]
    if sorted(where) != list(axes):  # type: ignore[type-var]
        return None
    gone = [1 + i for i, axis in enumerate(alignment) if axis not in axes]
    return gone, [0, *(1 + where.index(axis) for axis in axes)]


def _ends_of(y: Tensor, found: Separation) -> dict[Value, tuple[list[int], list[int]]] | None:
    """The values with axes of samples that ``y`` is made of by sums; ``None`` where it isn't that simple."""
    ends: dict[Value, tuple[list[int], list[int]]] = {}
    stack: list[Value] = [(y.grad_fn, y.output_nr)]
    seen: set[Value] = set()
    while stack:
        value = stack.pop()
        known = found.values.get(value)
        if known is None or value in seen:
            continue
        seen.add(value)
        by_sample = _sample_axes(known[0], found.axes)
        if by_sample is not None:
            ends[value] = by_sample
            continue
        before = value[0].next_functions
        varying = [found.values.get(one) is not None for one in before]
        if not before or not is_linear(kind_of_node(value[0].name()), varying):
            return None
        stack.extend(before)
    return ends


def _needed(
    ends: Mapping[Value, Any], sources: Mapping[Any, list[int]], found: Separation
) -> dict[Value, list[int]] | None:
    """The values that the ends come of, and which inputs they are; ``None`` if an end comes of another."""
    needed: dict[Value, list[int]] = {}
    stack = list(ends)
    while stack:
        value = stack.pop()
        if value in needed:
            continue
        node = value[0]
        before = node.next_functions
        inputs = sources.get(value) or ([] if before else sources.get(id(node_attribute(node, "variable")), []))
        needed[value] = inputs
        if inputs:
            continue
        for one in before:
            if found.values.get(one) is not None:
                if one in ends:
                    return None
                stack.append(one)
    return needed


def curvature(
    y: Tensor, inputs: list[Tensor], layouts: list[Layout], found: Separation, keep: bool
) -> Curvature | None:
    """How to sum up the diagonals of the Hessian of ``y``; ``None`` where an operation has no rule for that.

    ``found``: along which axes ``y`` is a sum; ``layouts``: the same axes, for each input.
    """
    ends = _ends_of(y, found)
    sources: dict[Any, list[int]] = {}
    for i, x in enumerate(inputs):
        sources.setdefault(id(x) if is_leaf(x) else source_of(x), []).append(i)
    needed = None if ends is None else _needed(ends, sources, found)
    if ends is None or needed is None:
        return None
    steps: list[_Step] = []
    uses: dict[Value, int] = {}
    for value, known in found.values.items():
        if value not in needed or known is None:
            continue
        step = _step(value, known, needed[value], found, keep)
        if step is None or node_type(*value) != (y.dtype, y.device):
            return None
        steps.append(step)
        for before in step.place.before if step.operation else ():
            if before is not None:
                uses[before] = uses.get(before, 0) + 1
    return Curvature(y, inputs, layouts, steps, ends, uses, keep)


def _step(
    value: Value, known: tuple[Alignment, Shape], inputs: list[int], found: Separation, keep: bool
) -> _Step | None:
    before = tuple(one if found.values.get(one) is not None else None for one in value[0].next_functions)
    shapes = tuple(None if one is None else tuple(found.values[one][1]) for one in before)  # type: ignore[index]
    place = Place(value, tuple(known[1]), before, shapes, keep)
    by_sample = _sample_axes(known[0], found.axes)
    rule = None if inputs else operation(place)
    if not inputs and (rule is None or (rule.bends and by_sample is None)):
        return None
    return _Step(place, rule, by_sample or ([], []), inputs)
