"""Derivatives of what depends on elements of a grid at the same distances everywhere, without products.

Each value inside has a tangent for each distance: its element ``i`` is the derivative of the value's element
``i`` by the grid's element ``i + distance``. They are pushed along the recorded graph together, a handful of
arrays however many elements there are, and the curvature of each operation along any two of them belongs to
entries of a Hessian at these distances. One pullback brings the cotangents; no graph of the gradient is
recorded, and no product is taken. The tangents are checked: they must give the gradient. Those of an array
are its Jacobian; they must give what a random cotangent pulled back does.

Knows recorded operations and where their entries go; it must not know where the input comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._certificate import all_finite, random_vector, slack
from .._torch_private import pull_back, saves_by_hooks, value_at
from ..native.elementwise import slope_and_weight
from .linear import Form
from .stencil_program import GridEntries, GridProgram, GridStep, program, shifts_of

__all__ = ["StencilHessian", "hessian", "jacobian"]


# To look at so many numbers takes no longer than at what they are sums of.
_SMALL = 1 << 14


class StencilHessian(NamedTuple):
    """``values``: the Hessian, or its diagonal in the shape of the input, as the gradient.

    ``is_refuted``: a product has said otherwise.
    """

    gradient: Tensor
    values: Tensor
    is_refuted: bool


def hessian(
    y: Tensor,
    x: Tensor,
    eps: float,
    *,
    diagonal: bool = False,
    product: Callable[[Tensor], Tensor | None] | None = None,
) -> StencilHessian | None:
    """The Hessian of ``y``, a number, by a leaf ``x``, or its diagonal.

    ``None`` where ``y`` isn't such a sum, where batched products take less, where something isn't finite, as
    zeros elsewhere might be wrong then, or where the check fails. ``eps``: relative spacing of the numbers
    that were computed with. ``product``: of the Hessian and a vector, by other ways; it is asked for the
    first time that a graph looks like this.
    """
    found = program(y, x, "diagonal" if diagonal else "hessian")
    if found is None or found[0].confirmed == [False]:
        return None
    steps, nodes = found
    if any(saves_by_hooks(nodes[step.number]) for step in steps.steps if step.entries is not None):
        return None  # most in a checkpoint are curved, and each question makes it run again
    with torch.no_grad():
        by: list[Any] = [*(value_at((nodes[number], 0)) for number in steps.asked), x]
        *pulled, gradient = pull_back([y], [torch.ones_like(y)], by, True, False)
        if gradient is None or not all_finite(gradient):
            return None
        way = _GridPass(steps, nodes, dict(zip(steps.asked, pulled, strict=True)), gradient)
        vector = None
        if product is not None and not steps.confirmed:
            vector = way.compare_with_product()
        way.run()
        if not (way.gives_gradient(eps) and way.is_finite()):
            return None
    if product is not None and vector is not None:
        wanted = product(vector.view(x.shape))
        if wanted is None or not all_finite(wanted):
            return None
        steps.confirmed[:] = [way.gives_product(wanted.detach(), eps)]
    return StencilHessian(gradient, way.values.view(steps.shape), steps.confirmed == [False])


def jacobian(y: Tensor, x: Tensor, eps: float, probe: Tensor | None) -> Tensor | None:
    """The Jacobian of an array ``y`` by a leaf ``x``; ``None`` as for :func:`hessian`.

    ``probe``: a cotangent, which the Jacobian must give the same as a plain pullback for.
    """
    found = program(y, x, "jacobian")
    if found is None:
        return None
    steps, nodes = found
    if any(saves_by_hooks(nodes[step.number]) for step in steps.steps):
        return None
    (end,) = steps.ends
    with torch.no_grad():
        pulled: Tensor | None = x.detach()
        if probe is not None:
            (pulled,) = pull_back([y], [probe.clone()], [x], True, False)
            if pulled is None or not all_finite(pulled):
                return None
        assert pulled is not None
        way = _GridPass(steps, nodes, {end.taken.number: probe}, pulled)
        way.run()
        way.add_rows()
        if not ((probe is None or way.gives_gradient(eps)) and way.is_finite()):
            return None
    return way.values.view(steps.shape)


class _GridPass:
    """Tangents on their way from the input to the sums; shape (distances, *value's)."""

    def __init__(
        self,
        program: GridProgram,
        nodes: list[Any],
        cotangents: Mapping[int, Tensor | None],
        gradient: Tensor,
    ) -> None:
        self._program = program
        self._nodes = nodes
        self._cotangents = cotangents
        self._gradient = gradient
        self._tangents: dict[int, Tensor] = {}
        numel = math.prod(program.shape)
        self._is_small = numel <= _SMALL
        self.values = gradient.new_zeros(numel)
        self._sums: list[Tensor] = []
        # What goes to the same places, summed up, and the sizes of it where these are asked for.
        self._terms: dict[int, tuple[GridEntries, Tensor, Tensor | None]] = {}
        # For each row, the product with a vector and the sum of the sizes of its terms.
        self._vector: Tensor | None = None
        self._product = self._sizes = gradient

    def compare_with_product(self) -> Tensor:
        """The vector that the Hessian is going to be multiplied with."""
        like = self._gradient.reshape(-1)
        self._vector = random_vector(like.numel()).to(like)
        self._product, self._sizes = torch.zeros_like(like), torch.zeros_like(like)
        return self._vector.clone()

    def run(self) -> None:
        kept = self._program.kept
        for step in self._program.fixed:
            found = None if kept is None else kept.get((step.number, None))
            if found is None:
                found = self._through(step)
                if kept is not None:
                    kept[step.number, None] = found
            self._tangents[step.number] = found
        for step in self._program.steps:
            self._tangents[step.number] = self._through(step)
            for number in step.last:
                del self._tangents[number]
        for entries, terms, sizes in self._terms.values():
            self._enter(entries, terms)
            if self._vector is not None and sizes is not None:
                n = len(self._vector)
                rows, factors = entries.to // n, self._vector[entries.to % n]
                self._product.index_add_(0, rows, entries.of(terms) * factors)
                self._sizes.index_add_(0, rows, entries.of(sizes) * factors.abs())

    def _through(self, step: GridStep) -> Tensor:
        rule = step.operation
        if rule is None:
            return self._moved(step)
        given = [
            None if b is None else self._tangents[b] if where is None else self._among(step, b, where)
            for b, where in zip(step.before, step.places, strict=True)
        ]
        place = step.place(self._nodes)
        cotangent = None if step.entries is None else self._cotangents[step.number]
        if rule.derivatives is None:
            assert rule.rule is not None
            pushed, form = rule.rule(place, given, cotangent)
            if form is not None:
                self._add_form(step, form, rule.scale)
            return pushed
        (tangents,) = (t for t in given if t is not None)
        slope, weight, squared, function = rule.derivatives(place, cotangent, tangents)
        if weight is None:
            return tangents * slope
        slope, weight = slope_and_weight(function, slope, weight)
        pushed = tangents * slope
        weight = weight if rule.scale == 1 else weight * rule.scale
        self._add_products(step, tangents * weight, tangents if squared else pushed)
        return pushed

    def _among(self, step: GridStep, before: int, where: list[int]) -> Tensor:
        """Tangents of what goes in, with zeros for distances of the other operand."""
        kept = self._program.kept
        found = None if kept is None else kept.get((before, step.number))
        if found is None:
            tangents = self._tangents[before]
            found = tangents.new_zeros(step.distances, *tangents.shape[1:])
            for i, to in enumerate(where):
                found[to].copy_(tangents[i])
            if kept is not None and (before, None) in kept:
                kept[before, step.number] = found
        return found

    def _moved(self, step: GridStep) -> Tensor:
        """The input itself, pieces that are joined, and what is rolled."""
        if not step.before:
            return self._gradient.new_ones(()).expand(1, *step.shape)
        if not step.starts:
            (tangents,) = (self._tangents[b] for b in step.before if b is not None)
            return torch.roll(tangents, *shifts_of(self._nodes[step.number], len(step.shape)))
        found = self._gradient.new_zeros(step.distances, *step.shape)
        for b, where, start, shape in zip(step.before, step.places, step.starts, step.shapes, strict=True):
            if b is not None and where is not None and shape is not None:
                for i, to in enumerate(where):
                    found[to].narrow(step.axis, start, shape[step.axis]).copy_(self._tangents[b][i])
        return found

    def _add_products(self, step: GridStep, left: Tensor, right: Tensor) -> None:
        alone = self._program.is_diagonal or step.distances == 1
        self._add(step, left * right if alone else left.unsqueeze(1) * right.unsqueeze(0))

    def _add_form(self, step: GridStep, form: Form, scale: float) -> None:
        """Of a quadratic form: half of both orders."""
        left = form.left if form.weight is None else form.left * form.weight
        left = left if scale == 1 else left * scale
        if form.left is form.right or self._program.is_diagonal or step.distances == 1:
            return self._add_products(step, left, form.right)
        terms = left.unsqueeze(1) * form.right.unsqueeze(0)
        return self._add(step, (terms + terms.transpose(0, 1)).mul_(0.5))

    def _add(self, step: GridStep, terms: Tensor) -> None:
        assert step.entries is not None
        sizes = None if self._vector is None else terms.abs()
        found = self._terms.get(id(step.entries))
        if found is None:
            self._terms[id(step.entries)] = step.entries, terms, sizes
            return
        found[1].add_(terms)
        if found[2] is not None and sizes is not None:
            found[2].add_(sizes)

    def _enter(self, entries: GridEntries, numbers: Tensor) -> None:
        if not self._is_small:
            self._sums.append(numbers.sum())
        entries.add(numbers, self.values)

    def gives_product(self, wanted: Tensor, eps: float) -> bool:
        """Whether the entries explain it, up to what rounding makes of the terms that they are sums of."""
        of_terms, of_largest = slack(eps)
        allowed = of_terms * self._sizes + of_largest * self._sizes.amax()
        return bool(((self._product - wanted.reshape(-1)).abs_() <= allowed).all())

    def add_rows(self) -> None:
        """The tangents of what the steps end in."""
        entries, (end,) = self._program.entries, self._program.ends
        assert entries is not None
        self._enter(entries, self._tangents[end.taken.value])

    def gives_gradient(self, eps: float) -> bool:
        """Whether the tangents explain it."""
        gradient = self._gradient.reshape(-1)
        slope = torch.zeros_like(gradient)
        added: list[Tensor] = []
        for (number, value, scale), entries in self._program.ends:
            cotangent = self._cotangents[number]
            if cotangent is not None:
                terms = self._tangents[value] * (cotangent if scale == 1 else cotangent * scale)
                entries.add(terms, slope)
                added.append(terms)
        of_terms, of_largest = slack(eps)
        excess = torch.sub(slope, gradient).abs_().sub_(slope.abs_(), alpha=of_terms)
        if excess.amax().item() <= 0:  # NaN isn't
            return True
        for terms in added:
            excess -= terms.abs().amax() * (len(terms) * of_largest)
        return excess.amax().item() <= 0

    def is_finite(self) -> bool:
        """Whether all that was added is, or what came of it: a sum of finite numbers may overflow."""
        total = self.values.sum() if self._is_small else sum(self._sums, self._gradient.new_zeros(()))
        return math.isfinite(total.item()) or bool(self.values.isfinite().all())
