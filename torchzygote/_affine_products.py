"""The diagonal of a Hessian by what goes into an affine map, from products with what comes out.

For ``z = A W`` the Hessian by ``W`` is ``Aᵀ H A`` where ``H`` is the one by ``z``. Where the samples (rows of
``z``) don't meet in ``H``, its diagonal is the diagonal of ``H`` times the squares of ``A``: as many products
as ``z`` has channels, instead of one for each weight. One plain product with a random ``W`` checks it.

(Dangel, Kunstner and Hennig, "BackPACK", 2020; Becker and LeCun, "Improving the convergence of
back-propagation learning with second order methods", 1988, leave out that channels meet.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _products
from ._affine import AffineMap, Term
from ._alignment import aligned_axes
from ._certificate import Comparison, is_plain, precision, random_vector, wide
from ._engine import Linearization
from ._repetition import Repetition
from ._second_order import Options, SecondOrder, chunk_for
from ._separable import LEAST_SAVING, Layout, by_block, in_shape_of_x, rows_in_shape_of_x, warn_mismatch

__all__ = ["diagonals", "numel_of"]

# Products beside those with the channels: one to check, and about two for the gradient by z and the squares.
_OTHERS = 3


def numel_of(term: Term) -> int:
    """Elements of its piece."""
    k, channels = term.shape
    return k * channels


def _layout(affine: AffineMap, lin: Linearization) -> Layout | None:
    """Which axes of ``z`` don't meet in the Hessian by it; ``None`` unless no axis of samples does."""
    shape = tuple(affine.z.shape)
    found = aligned_axes(lin.roots[0], affine.z)
    if found is None:
        return None
    apart = {p for p, q in found if p == q} | {axis for axis, size in enumerate(shape) if size == 1}
    if not apart.issuperset(affine.samples()):
        return None
    return Layout(shape, shape, tuple((axis, axis) for axis in sorted(apart)))


class _Seeds:
    """Ones at row ``lo`` (``lo + 1``, ...) of each block, made when asked for."""

    def __init__(self, layout: Layout, like: Tensor) -> None:
        self._layout = layout
        self._like = like

    def __call__(self, lo: int, hi: int) -> Tensor:
        layout = self._layout
        columns = layout.block_columns
        blocks = self._like.numel() // max(1, columns)
        seeds = torch.zeros(hi - lo, blocks, columns, dtype=self._like.dtype, device=self._like.device)
        seeds.diagonal(lo, 0, 2).fill_(1)
        return rows_in_shape_of_x(layout, seeds).view(hi - lo, -1)


class _Check:
    """One product of the Hessian by the weights, plain, and what the products with ``z`` explain of it."""

    def __init__(
        self, second: SecondOrder, affine: AffineMap, layout: Layout, added: Mapping[int, Linearization]
    ) -> None:
        self._second = second
        self._affine = affine
        self._layout = layout
        self._added = added
        self._vector = random_vector(sum(map(numel_of, affine.terms)))
        total: Tensor | None = None
        for term, part in zip(affine.terms, self._matrices(self._vector), strict=True):
            moved = wide(term.factor.detach()) @ wide(part)
            total = moved if total is None else total + moved
        assert total is not None
        # (block rows, blocks, 1)
        self._weights = by_block(layout, affine.shaped(total).unsqueeze(0))[0].t().unsqueeze(2)
        self._got: Any = 0
        self._scale: Any = 0

    def add(self, lo: int, hi: int, blocks: Tensor) -> None:
        """Products with rows ``lo`` to ``hi`` of the blocks, by block."""
        terms = wide(blocks.detach()) * self._weights[lo:hi]
        self._got = self._got + terms.sum(0)
        self._scale = self._scale + terms.abs_().sum(0)

    def passes(self, lin: Linearization) -> bool:
        """Whether the products explain the plain one; a warning says so if not."""
        inputs = [self._second.prepared.inputs[t.which] for t in self._affine.terms]
        plain = self._plain(self._vector)
        got = self._pulled(self._got, absolute=False)
        eps = precision(inputs, lin.roots[0], self._second.coarsest())
        if all(is_plain(a, b.to(a), eps) for a, b in zip(got, plain, strict=True)):
            return True
        if not all(bool(one.isfinite().all()) for one in plain):
            return False
        scales = self._pulled(self._scale, absolute=True)
        compared = [
            Comparison(a, scale, b.to(a), eps) for a, b, scale in zip(got, plain, scales, strict=True)
        ]
        Repetition(self._vector, self._parts, plain, self._plain).refute(compared)
        if all(bool(one.fine.all()) for one in compared):
            return True
        warn_mismatch(lin)
        return False

    def _matrices(self, vector: Tensor) -> list[Tensor]:
        """A vector as one matrix (k, channels) for each term."""
        parts = torch.split(vector, [numel_of(t) for t in self._affine.terms])
        like = self._affine.z
        return [
            part.to(like.device, like.dtype).view(term.shape)
            for part, term in zip(parts, self._affine.terms, strict=True)
        ]

    def _plain(self, vector: Tensor) -> list[Tensor]:
        """The product of the Hessian by the weights with a vector."""
        by_input: dict[int, Tensor] = {}
        for term, matrix in zip(self._affine.terms, self._matrices(vector), strict=True):
            piece = term.restored(matrix)
            by_input[term.which] = by_input[term.which] + piece if term.which in by_input else piece
        whole = self._second.by_inputs(list(by_input))
        # copies, as custom functions may write into what they are given
        pulled = whole.pull_dense([v.clone() for v in by_input.values()])
        given = dict(zip(by_input, pulled, strict=True))
        for i, v in by_input.items():
            lin = self._added.get(i)
            other = None if lin is None else lin.pull_dense([v.clone()])[0]
            if other is not None:
                given[i] = -other if (g := given[i]) is None else g - other
        found = []
        for term in self._affine.terms:
            g = given[term.which]
            zeros = self._affine.z.new_zeros(term.shape)
            found.append((zeros if g is None else term.arranged(g.detach())).reshape(-1))
        return found

    def _parts(self) -> list[Tensor]:
        numbers = torch.arange(self._vector.numel(), device=self._vector.device)
        return [torch.where(numbers % 4 == k, self._vector, 0.0) for k in range(4)]

    def _pulled(self, by_z: Tensor, *, absolute: bool) -> list[Tensor]:
        """From the blocks of ``z`` back to the weights."""
        matrix = self._affine.as_matrix(in_shape_of_x(self._layout, by_z))
        found = []
        for term in self._affine.terms:
            factor = wide(term.factor.detach())
            found.append(((factor.abs() if absolute else factor).t() @ matrix).reshape(-1))
        return found


def diagonals(
    second: SecondOrder,
    affine: AffineMap,
    gradient: Tensor | None,
    added: Mapping[int, Linearization],
    options: Options,
) -> list[Tensor] | None:
    """For each term the diagonal at its piece, zero elsewhere; ``None`` where it doesn't pay or is refuted.

    ``added``: by input, the gradient of what is only added to all that comes of ``z``.
    """
    if gradient is None or not gradient.requires_grad:
        return [term.restored(affine.z.new_zeros(term.shape)) for term in affine.terms]  # linear in z
    lin = second.derived(gradient, affine.z)
    layout = _layout(affine, lin)
    if layout is None:
        return None
    z, rows = affine.z, layout.block_rows
    if (rows + _OTHERS) * LEAST_SAVING > sum(map(numel_of, affine.terms)):
        return None
    cost = second.row_cost()
    check = _Check(second, affine, layout, added)
    parts: list[Tensor] = []
    for lo, hi, (product,) in _products.vjps(
        lin,
        0,
        _Seeds(layout, lin.roots[0]),
        rows,
        chunk_for(options, rows, cost, z.device),
        create_graph=options.keep,
        progress=options.progress,
        misbatched=cost.misbatched,
    ):
        blocks = by_block(layout, z.new_zeros(hi - lo, *z.shape) if product is None else product)
        check.add(lo, hi, blocks)
        parts.append(blocks.diagonal(lo, 0, 2))
    if not check.passes(lin):
        return None
    diagonal = affine.as_matrix(in_shape_of_x(layout, torch.cat(parts, 1)))
    found = []
    for term in affine.terms:
        factor = term.factor if options.keep else term.factor.detach()
        found.append(term.restored(factor.square().t() @ diagonal))
    return found
