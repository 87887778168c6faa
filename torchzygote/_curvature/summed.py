"""Diagonals of block diagonal Hessians, summed up from the curvature of each recorded operation.

Where ``y`` is a sum over samples, its second derivative along tangents of the inputs is the sum of what each
operation has along the tangents that reach it, times its cotangent. One pullback brings all cotangents, and
tangents are pushed along the recorded graph, once for each column of a block; no graph of the gradient is
recorded. Of ``k`` columns that takes ``2 + k`` times the matrix products of ``f``; nested pullbacks take
``2 + 2 k``. The tangents are checked: they must give the gradient, each sample by itself.

Knows steps and directions; it must not know where the inputs come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._certificate import all_finite, slack
from .._products import chunks
from .._recorded.moves import Value
from .._torch_private import pull_back, value_at
from .directions import Directions
from .linear import sum_of
from .rules import Operation
from .steps import Step, Steps

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


class _Jets(NamedTuple):
    """Second and first derivatives of ``y`` for each direction and block, shape (directions, blocks).

    ``sizes``: of the terms that the first ones are sums of.
    """

    curvature: Tensor
    slope: Tensor
    sizes: Tensor


class _TangentPass(NamedTuple):
    """Tangents on their way."""

    steps: Steps
    cotangents: Mapping[Value, Tensor | None]
    of_ends: Mapping[Value, Tensor | None]
    directions: Directions

    def all(self, chunk: int, progress: bool) -> _Jets:
        """Along all directions, so many at a time."""
        found = []
        for lo, hi in chunks(self.directions.total, chunk, progress, "column"):
            found.append(self._push(self.directions.seeds(lo, hi)))
        return found[0] if len(found) == 1 else _Jets(*map(torch.cat, zip(*found, strict=True)))

    def _push(self, seeds: list[Tensor]) -> _Jets:
        steps, ends, uses = self.steps.steps, self.steps.ends, self.steps.uses
        tangents: dict[Value, Tensor] = {}
        left = dict(uses)
        curvature: Tensor | None = None
        slopes: list[Tensor] = []
        sizes: list[Tensor] = []
        for step in steps:
            value = step.place.value
            if step.operation is None:
                tangent = sum_of([seeds[i] for i in step.inputs])
            else:
                tangent, terms = self._through(step, step.operation, tangents)
                if terms is not None:
                    scale = step.operation.scale
                    curvature = terms * scale if curvature is None else curvature.add(terms, alpha=scale)
                for before in step.place.before:
                    if before is not None:
                        left[before] -= 1
                        if left[before] == 0:
                            del tangents[before]
            end, of_end = ends.get(value), self.of_ends.get(value)
            if end is not None and of_end is not None:
                terms = tangent * of_end
                slopes.append(end.summed(terms))
                sizes.append(end.summed(terms.detach().abs()))
            if left.get(value):
                tangents[value] = tangent
        if curvature is None or not slopes:
            nothing = seeds[0].new_zeros(len(seeds[0]), len(self.directions.weights))
            curvature = nothing if curvature is None else curvature
            slopes, sizes = slopes or [nothing], sizes or [nothing]
        return _Jets(curvature, sum_of(slopes[-1:] + slopes[:-1]), sum_of(sizes[-1:] + sizes[:-1]))

    def _through(
        self, step: Step, operation: Operation, tangents: Mapping[Value, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Tangents of the step's value, from those of what it comes of; its curvature."""
        given = [None if before is None else tangents[before] for before in step.place.before]
        cotangent = self.cotangents[step.place.value] if operation.is_curved else None
        overwrite = all(before is None or before in self.steps.own for before in step.place.before)
        return operation.push(step.place, given, cotangent, step.samples, overwrite)


def diagonals(of: Curvature, *, chunk: int, progress: bool) -> list[Tensor] | None:
    """The diagonal of the Hessian by each input, in its shape, ``chunk`` directions at a time.

    ``None`` where something isn't finite, as zeros elsewhere might be wrong then, or where the check fails.
    """
    with torch.set_grad_enabled(of.keep):
        values = of.steps.values()
        by: list[Any] = [*map(value_at, values), *of.inputs]
        pulled = pull_back([of.y], [torch.ones_like(of.y)], by, True, of.keep)
        cotangents = dict(zip(values, pulled, strict=False))
        way = _TangentPass(of.steps, cotangents, of.steps.of_ends(cotangents), of.directions)
        found = way.all(chunk, progress)
        return (
            of.directions.diagonals(found.curvature) if _is_right(of, found, pulled[len(values) :]) else None
        )


def _is_right(of: Curvature, found: _Jets, gradients: list[Tensor | None]) -> bool:
    """Whether all is finite, and the tangents give the gradient, each block by itself."""
    curvature, slope = found.curvature.detach(), found.slope.detach()
    if not all_finite(curvature):
        return False
    wanted = of.directions.along([None if g is None else g.detach() for g in gradients])
    of_terms, of_largest = slack(of.eps)
    difference = (slope - wanted).abs_()
    allowed = slope.abs().mul_(of_terms).add_(found.sizes.amax(0), alpha=of_largest)
    if (difference <= allowed).all().item():
        return True
    # Where the terms of a gradient cancel inside f, it is about as far off as for inputs that were rounded.
    moved = (curvature * of.directions.along([x.detach() for x in of.inputs])).abs_() * of.directions.undone
    return bool((difference <= torch.add(allowed, moved.amax(0), alpha=of_largest)).all())
