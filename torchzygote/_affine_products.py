"""The diagonal of a Hessian by what goes into an affine map, from products with what comes out.

For ``z = A W`` the Hessian by ``W`` is ``Aᵀ H A`` where ``H`` is the one by ``z``. Where the samples (rows of
``z``) don't meet in ``H``, its diagonal is the diagonal of ``H`` times the squares of ``A``: as many products
as ``z`` has channels, instead of one for each weight. One plain product with a random ``W`` checks it.

(Dangel, Kunstner and Hennig, "BackPACK", 2020; Becker and LeCun, "Improving the convergence of
back-propagation learning with second order methods", 1988, leave out that channels meet.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ._affine_check import Explained, are_explained, numel_of
from ._block_layout import BlockSeeds, Layout, by_block, in_shape_of_x
from ._certificate import precision, random_vector, wide
from ._cost_model import RowCost, choose_chunk
from ._engine import Linearization
from ._pulling import Options, pulled_rows
from ._recorded.affine import AffineMap
from ._recorded.alignment import aligned_axes
from ._second_order import SecondOrder
from ._separable import LEAST_SAVING

__all__ = ["diagonals", "matrix"]

# Products beside those with the channels: one to check, and about two for the gradient by z and the squares.
_OTHERS = 3
# Small slices take longer, and sums over many, one after the other, lose digits.
_LEAST_SLICE = 1 << 20


def samples_apart(affine: AffineMap, lin: Linearization) -> Layout | None:
    """Which axes of ``z`` don't meet in the Hessian by it; ``None`` unless no axis of samples does."""
    shape = tuple(affine.z.shape)
    found = aligned_axes(lin.roots[0], affine.z)
    if found is None:
        return None
    apart = {p for p, q in found if p == q} | {axis for axis, size in enumerate(shape) if size == 1}
    if not apart.issuperset(affine.samples()):
        return None
    return Layout(shape, shape, tuple((axis, axis) for axis in sorted(apart)))


class _Plain:
    """Products of the Hessian by the weights, plain, but for what is only added to it."""

    def __init__(self, second: SecondOrder, affine: AffineMap, added: Mapping[int, Linearization]) -> None:
        self._second = second
        self._affine = affine
        self._added = added

    def length(self) -> int:
        """Of the vectors to multiply with."""
        return sum(map(numel_of, self._affine.terms))

    def __call__(self, vector: Tensor) -> list[Tensor]:
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
        zeros = self._affine.z.new_zeros(())
        return [
            zeros.expand(term.shape) if (g := given[term.which]) is None else term.arranged(g.detach())
            for term in self._affine.terms
        ]

    def through_z(self, vector: Tensor) -> Tensor:
        """What a vector of weights gives, in the shape of ``z``."""
        affine = self._affine
        total = wide(affine.z.new_zeros(()))
        for term, matrix in zip(affine.terms, self._matrices(vector), strict=True):
            total = total + wide(term.factor.detach()) @ wide(matrix)
        return affine.shaped(total)

    def _matrices(self, vector: Tensor) -> list[Tensor]:
        """A vector as one matrix (k, channels) for each term."""
        like, terms = self._affine.z, self._affine.terms
        parts = torch.split(vector.to(like.device, like.dtype), [numel_of(t) for t in terms])
        return [part.view(term.shape) for part, term in zip(parts, terms, strict=True)]


def channel_products(
    second: SecondOrder,
    affine: AffineMap,
    lin: Linearization,
    layout: Layout,
    added: Mapping[int, Linearization],
    options: Options,
) -> Iterator[tuple[int, int, Tensor]]:
    """Products of the Hessian by ``z``: ``lo``, ``hi``, and rows ``lo`` to ``hi`` of all blocks, by block.

    The last is followed by a check: :class:`Refuted` is raised where it fails.
    """
    z, rows = affine.z, layout.block_rows
    cost = second.row_cost()
    plain = _Plain(second, affine, added)
    vector = random_vector(plain.length())
    weights = by_block(layout, plain.through_z(vector).unsqueeze(0))[0].t().unsqueeze(2)
    explained = Explained(affine, layout, weights)
    for lo, hi, (product,) in pulled_rows(lin, BlockSeeds(layout, lin.roots[0]), rows, cost, options):
        blocks = by_block(layout, z.new_zeros(hi - lo, *z.shape) if product is None else product)
        explained.add(lo, hi, blocks)
        yield lo, hi, blocks
    eps = precision([z], lin.roots[0], second.coarsest())
    if not are_explained(explained.pulled(), vector, plain, eps, lin):
        raise Refuted


class Refuted(Exception):
    """Products with what a map gives don't explain a plain one; a warning has said so."""


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
    layout = samples_apart(affine, lin)
    if layout is None or (layout.block_rows + _OTHERS) * LEAST_SAVING > sum(map(numel_of, affine.terms)):
        return None
    try:
        products = channel_products(second, affine, lin, layout, added, options)
        parts = [
            blocks.diagonal(lo, 0, 2).clone() for lo, _, blocks in products
        ]  # a view would keep the chunk
    except Refuted:
        return None
    diagonal = affine.as_matrix(in_shape_of_x(layout, torch.cat(parts, 1)))
    found = []
    for term in affine.terms:
        factor = term.factor if options.keep else term.factor.detach()
        found.append(term.restored(_by_squares(factor, diagonal, options)))
    return found


def _by_squares(factor: Tensor, diagonal: Tensor, options: Options) -> Tensor:
    """The squares of ``factor``, transposed, times ``diagonal``; of a large factor some at a time."""
    axis = 0 if factor.stride(0) >= factor.stride(1) else 1  # as they are in memory
    size, step = factor.shape[axis], _slice_of(factor, axis, options)
    if step >= size:
        return factor.square().t() @ diagonal
    found = diagonal.new_zeros(factor.shape[1], diagonal.shape[1])
    for lo in range(0, size, step):
        some = factor.narrow(axis, lo, min(step, size - lo))
        if axis == 0:
            found.addmm_(some.square().t(), diagonal[lo : lo + step])
        else:
            torch.mm(some.square().t(), diagonal, out=found[lo : lo + step])
    return found


def _slice_of(factor: Tensor, axis: int, options: Options) -> int:
    """How much of ``factor`` is copied at a time, along this axis; all of it where graphs keep it anyway."""
    size = factor.shape[axis]
    if options.keep:
        return size
    nbytes = factor.shape[1 - axis] * factor.element_size()
    least = _LEAST_SLICE // max(1, nbytes)
    return min(size, max(least, choose_chunk(None, size, RowCost(nbytes, 1), factor.device)))


def matrix(
    second: SecondOrder,
    affine: AffineMap,
    gradient: Tensor,
    added: Mapping[int, Linearization],
    options: Options,
) -> Tensor | None:
    """The Hessian by the only term's input, all of which is its piece; ``None`` where that can't be had."""
    lin = second.derived(gradient, affine.z)
    layout = samples_apart(affine, lin)
    if layout is None or (options.keep and affine.channel is not None):
        return None
    (term,) = affine.terms
    x = second.prepared.inputs[term.which]
    places = term.arranged(torch.arange(x.numel(), device=x.device).view(x.shape))
    factor = term.factor if options.keep else term.factor.detach()
    rows = _rows_by_z(affine, layout, channel_products(second, affine, lin, layout, added, options))
    try:
        if affine.channel is None:
            return _of_one_channel(rows, factor, places.reshape(-1), options)
        whole = x.new_zeros(x.numel(), x.numel())
        _add_channels(whole, rows, factor, places, options, apart=layout.block_rows == 1)
    except Refuted:
        return None
    return whole


def _rows_by_z(
    affine: AffineMap, layout: Layout, products: Iterator[tuple[int, int, Tensor]]
) -> Iterator[tuple[int, Tensor]]:
    """Rows of all blocks of the Hessian by ``z``, each with its number; shape (samples, channels)."""
    for lo, _, blocks in products:
        for c, row in enumerate(blocks, lo):
            yield c, affine.as_matrix(in_shape_of_x(layout, row))


def _between(factor: Tensor, weights: Tensor, options: Options) -> Tensor:
    """``Aᵀ diag(weights) A``, ``weights`` of shape (samples, 1); a large ``A`` is weighted in slices."""
    # by samples, results are added up: better small ones
    axis = 1 if factor.shape[1] >= factor.shape[0] else 0
    size, step = factor.shape[axis], _slice_of(factor, axis, options)
    if step >= size:
        return (factor * weights).t() @ factor
    found = factor.new_zeros(factor.shape[1], factor.shape[1])
    for lo in range(0, size, step):
        some = factor.narrow(axis, lo, min(step, size - lo))
        if axis == 0:
            found.addmm_((some * weights[lo : lo + step]).t(), some)
        else:
            torch.mm((some * weights).t(), factor, out=found[lo : lo + step])
    return found


def _of_one_channel(
    rows: Iterator[tuple[int, Tensor]], factor: Tensor, places: Tensor, options: Options
) -> Tensor:
    ((_, by_z),) = rows  # to the end, where they are checked
    found = _between(factor, by_z, options)
    back = places.argsort()
    return found if torch.equal(back, places.sort()[0]) else found[back][:, back]


def _add_channels(
    whole: Tensor,
    rows: Iterator[tuple[int, Tensor]],
    factor: Tensor,
    places: Tensor,
    options: Options,
    *,
    apart: bool,
) -> None:
    """Write the blocks of all pairs of channels; ``apart``: these don't meet, and are in one row."""
    for c, by_z in rows:
        for d in range(0 if apart else c, by_z.shape[1]):
            block = _between(factor, by_z[:, d : d + 1], options)
            first = d if apart else c
            whole[places[:, first].unsqueeze(1), places[:, d]] = block
            if first != d:
                whole[places[:, d].unsqueeze(1), places[:, first]] = block.t()
