"""Diagonals of block diagonal Hessians, summed up from the curvature of each recorded operation.

Where ``y`` is a sum over samples, its second derivative along tangents of the inputs is the sum of what each
operation has along the tangents that reach it, times its cotangent. One pullback brings all cotangents, and
tangents are pushed along the recorded graph once for each column of a block, with no graph of the gradient:
of ``k`` columns, ``2 + k`` times the products of ``f``, where nested pullbacks take ``2 + 2 k``. The tangents
are checked: they must give the gradient, each sample by itself (``_directions``).

Knows steps and directions; it must not know where the inputs come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ._certificate import Comparison, all_finite, slack
from ._curvature_steps import Steps
from ._directions import Directions
from ._pieces import Value
from ._products import chunks
from ._repetition import Repetition
from ._torch_private import cotangents_at

__all__ = ["diagonals"]


class _Pushed(NamedTuple):
    """For each direction and block, shape (directions, blocks): second derivatives of ``y``, and first ones.

    These are what the ends grow by.
    """

    curvature: Tensor
    slope: Tensor


class _Pass(NamedTuple):
    """Tangents on their way, ``chunk`` directions at a time."""

    steps: Steps
    cotangents: Mapping[Value, Tensor | None]
    of_ends: Mapping[Value, Tensor | None]
    directions: Directions
    chunk: int

    def all(self, factor: float = 1.0, progress: bool = False, sizes: bool = False) -> _Pushed:
        """Along all directions, ``factor`` times as long; ``sizes``: of the terms of slopes, not these."""
        found = []
        for lo, hi in chunks(self.directions.total, self.chunk, progress, "column"):
            seeds = self.directions.seeds(lo, hi)
            found.append(self._push(seeds if factor == 1 else [one * factor for one in seeds], sizes))
        if len(found) == 1:
            return found[0]
        return _Pushed(torch.cat([one.curvature for one in found]), torch.cat([one.slope for one in found]))

    def _push(self, seeds: list[Tensor], sizes: bool) -> _Pushed:
        steps, ends, uses, _ = self.steps
        tangents: dict[Value, Tensor] = {}
        left = dict(uses)
        blocks = len(self.directions.weights)
        curvature, slope = seeds[0].new_zeros(2, len(seeds[0]), blocks)
        for place, operation, by_sample, inputs in steps:
            value = place.value
            if operation is None:
                tangent = seeds[inputs[0]]
                for i in inputs[1:]:
                    tangent = tangent + seeds[i]
            else:
                given = [None if before is None else tangents[before] for before in place.before]
                tangent, curved = operation.rule(
                    place, given, self.cotangents[value] if operation.is_curved else None
                )
                if curved is not None:
                    assert by_sample is not None
                    curvature = torch.add(curvature, by_sample.summed(curved, blocks), alpha=operation.scale)
                for before in place.before:
                    if before is not None:
                        left[before] -= 1
                        if left[before] == 0:
                            del tangents[before]
            end, cotangent = ends.get(value), self.of_ends.get(value)
            if end is not None and cotangent is not None:
                terms = tangent * cotangent
                slope = slope + end.summed(terms.abs() if sizes else terms, blocks)
            if left.get(value):
                tangents[value] = tangent
        return _Pushed(curvature, slope)


def diagonals(
    y: Tensor,
    inputs: list[Tensor],
    steps: Steps,
    directions: Directions,
    *,
    chunk: int,
    eps: float,
    keep: bool,
    progress: bool,
) -> list[Tensor] | None:
    """The diagonal of the Hessian of ``y`` by each input, in its shape, ``chunk`` directions at a time.

    ``None`` where something isn't finite, as zeros elsewhere might be wrong then, or where the check fails.
    ``eps``: relative spacing of the numbers that were computed with.
    """
    with torch.set_grad_enabled(keep):
        values = steps.values()
        inside, gradients = cotangents_at(y, values, inputs, keep)
        cotangents = dict(zip(values, inside, strict=True))
        way = _Pass(steps, cotangents, steps.of_ends(cotangents), directions, chunk)
        found = way.all(progress=progress)
        wanted = directions.along(gradients)
        if all_finite(found.curvature.detach()) and _agree(way, found.slope.detach(), wanted.detach(), eps):
            return directions.diagonals(found.curvature)
    return None


def _agree(way: _Pass, got: Tensor, wanted: Tensor, eps: float) -> bool:
    """Whether the tangents give the gradient, each block by itself."""
    of_terms, of_largest = slack(eps)
    sizes = got.abs()
    allowed = torch.add(sizes * of_terms, sizes.amax(0), alpha=of_largest)
    if ((got - wanted).abs_() <= allowed).all().item():
        return True
    if not (all_finite(got) and all_finite(wanted)):
        return False
    with torch.no_grad():
        compared = Comparison(got, way.all(sizes=True).slope, wanted, eps)
        again = lambda factor: [way.all(float(factor)).slope]
        Repetition(got.new_ones(1), lambda: (), [got], again).refute([compared])
    return bool(compared.fine.all())
