"""Diagonals of block diagonal Hessians, summed up from the curvature of each recorded operation.

Where ``y`` is a sum over samples, its second derivative along tangents of the inputs is the sum of what each
operation has along the tangents that reach it, times its cotangent. One pullback brings all cotangents, and
tangents are pushed along the recorded graph, once for each column of a block; no graph of the gradient is
recorded. Of ``k`` columns that takes ``2 + k`` times the matrix products of ``f``; nested pullbacks take
``2 + 2 k``. The tangents are checked: they must give the gradient, each sample by itself (``_directions``).

Knows steps and directions; it must not know where the inputs come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._certificate import Comparison, all_finite, slack
from ._curvature_steps import Steps
from ._directions import Directions
from ._pieces import Value
from ._products import chunks
from ._repetition import Repetition
from ._torch_private import pull_back, value_at

__all__ = ["Curvature", "diagonals"]


class Curvature(NamedTuple):
    """What is summed up: how, by which inputs, along which directions.

    ``eps``: relative spacing of the numbers that were computed with. ``keep``: results are going to be
    differentiated.
    """

    y: Tensor
    inputs: list[Tensor]
    steps: Steps
    directions: Directions
    eps: float
    keep: bool


class _Pushed(NamedTuple):
    """Second and first derivatives of ``y`` for each direction and block, shape (directions, blocks)."""

    curvature: Tensor
    slope: Tensor


class _Pass(NamedTuple):
    """Tangents on their way, ``chunk`` directions at a time."""

    steps: Steps
    cotangents: Mapping[Value, Tensor | None]
    of_ends: Mapping[Value, Tensor | None]
    directions: Directions
    chunk: int

    def all(self, factor: float = 1.0, *, progress: bool = False, sizes: bool = False) -> _Pushed:
        """Along all directions, ``factor`` times as long; ``sizes``: of the terms of slopes, not these."""
        found = []
        for lo, hi in chunks(self.directions.total, self.chunk, progress, "column"):
            seeds = self.directions.seeds(lo, hi)
            seeds = seeds if factor == 1 else [one * factor for one in seeds]
            found.append(self._push(seeds, sizes))
        if len(found) == 1:
            return found[0]
        return _Pushed(torch.cat([one.curvature for one in found]), torch.cat([one.slope for one in found]))

    def _push(self, seeds: list[Tensor], sizes: bool) -> _Pushed:
        steps, ends, uses, _ = self.steps
        tangents: dict[Value, Tensor] = {}
        left = dict(uses)
        blocks, rows = len(self.directions.weights), len(seeds[0])
        curvature = slope = seeds[0].new_zeros(rows, blocks)
        for place, operation, by_sample, inputs in steps:
            value = place.value
            if operation is None:
                tangent = seeds[inputs[0]]
                for i in inputs[1:]:
                    tangent = tangent + seeds[i]
            else:
                given = [None if before is None else tangents[before] for before in place.before]
                cotangent = self.cotangents[value] if operation.is_curved else None
                tangent, form = operation.rule(place, given, cotangent)
                if form is not None:
                    assert by_sample is not None
                    terms = by_sample.summed(form.along(), blocks)
                    curvature = torch.add(curvature, terms, alpha=operation.scale)
                for before in place.before:
                    if before is not None:
                        left[before] -= 1
                        if left[before] == 0:
                            del tangents[before]
            end, of_end = ends.get(value), self.of_ends.get(value)
            if end is not None and of_end is not None:
                terms = tangent * of_end
                slope = slope + end.summed(terms.abs() if sizes else terms, blocks)
            if left.get(value):
                tangents[value] = tangent
        return _Pushed(curvature, slope)


def diagonals(of: Curvature, *, chunk: int, progress: bool) -> list[Tensor] | None:
    """The diagonal of the Hessian by each input, in its shape, ``chunk`` directions at a time.

    ``None`` where something isn't finite, as zeros elsewhere might be wrong then, or where the check fails.
    """
    with torch.set_grad_enabled(of.keep):
        way, gradients = _begun(of, chunk)
        found = way.all(progress=progress)
        return of.directions.diagonals(found.curvature) if _is_right(of, way, found, gradients) else None


def _begun(of: Curvature, chunk: int) -> tuple[_Pass, list[Tensor | None]]:
    values = of.steps.values()
    by: list[Any] = [*map(value_at, values), *of.inputs]
    found = pull_back([of.y], [torch.ones_like(of.y)], by, True, of.keep)
    cotangents = dict(zip(values, found, strict=False))
    way = _Pass(of.steps, cotangents, of.steps.of_ends(cotangents), of.directions, chunk)
    return way, found[len(values) :]


def _is_right(of: Curvature, way: _Pass, found: _Pushed, gradients: list[Tensor | None]) -> bool:
    """Whether all is finite, and the tangents give the gradient, each block by itself."""
    if not all_finite(found.curvature.detach()):
        return False
    got = found.slope.detach()
    wanted = of.directions.along([None if g is None else g.detach() for g in gradients])
    of_terms, of_largest = slack(of.eps)
    sizes = got.abs()
    allowed = torch.add(sizes * of_terms, sizes.amax(0), alpha=of_largest)
    if ((got - wanted).abs_() <= allowed).all().item():
        return True
    if not (all_finite(got) and all_finite(wanted)):
        return False
    with torch.no_grad():
        compared = Comparison(got, way.all(sizes=True).slope, wanted, of.eps)
        again = lambda factor: [way.all(float(factor)).slope]
        Repetition(got.new_ones(1), lambda: (), [got], again).refute([compared])
    return bool(compared.fine.all())
