"""Rows of Jacobians by what goes into affine maps, as the weights of linear layers do.

For ``z = A W`` a row by ``W`` is ``Aᵀ`` times the row by ``z``. Where the samples stay apart on the way from
``z`` to ``y``, the rows of all samples are pulled back to ``z`` at once: as many products as one sample has
rows, whatever the number of samples, and a product of each sample's part with its part of ``A``. (The rule is
Goodfellow's, "Efficient per-example gradient computations", 2015.) One plain product with a random cotangent
checks the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _engine, _products
from ._affine import AffineMap, Entrance, Term, entrances
from ._affine_check import Explained, are_explained
from ._alignment import aligned_axes
from ._assembly import result_dtype
from ._certificate import precision, random_vector
from ._engine import Linearization
from ._first_order import FirstOrder
from ._plan import RowCost
from ._row_cost import is_plain
from ._second_order import Options, chunk_for
from ._separable import LEAST_ROWS, BlockSeeds, Layout, by_block, of_itself

__all__ = ["jacobians"]

# What things take, in bytes that a core moves meanwhile (4 GB a second): an operation of a product; a look at
# one on a walk; a term, of which rows are put together and compared.
_OPERATION = 100_000
_LOOK = 16_000
_TERM = 1_200_000
# Less than that isn't worth a look at all.
_LEAST_BYTES = 1 << 20


def _pays(first: FirstOrder, cost: RowCost, maps: Sequence[AffineMap], rows: int, products: int) -> bool:
    """Whether it takes less time than the ``products`` of the dense way; ``rows``: of one sample."""
    terms = [term for m in maps for term in m.terms]
    sizes = [first.prepared.inputs[term.which].numel() for term in terms]
    nodes = cost.nodes * _OPERATION
    dense = products * cost.nbytes + nodes
    # one more product checks; several terms of one input are added up
    added = (sum(sizes) - sum({t.which: n for t, n in zip(terms, sizes, strict=True)}.values())) * 3
    moved = first.y.numel() * first.y.element_size() * added
    around = len(maps) * cost.nodes * _LOOK + len(terms) * _TERM
    return (rows + 1) * cost.nbytes + 2 * nodes + around + moved < dense


def jacobians(
    first: FirstOrder, cost: RowCost, options: Options, products: int, verify: bool
) -> list[Tensor | None]:
    """The Jacobian by each input that only affine maps lead on; ``None`` for the others, and if too dear.

    ``products``: how many the dense way takes.
    """
    lin = first.lin
    found: list[Tensor | None] = [None] * len(lin.inputs)
    # Where operations take longer than what they move, rows together cost little more than one.
    least = max(_LEAST_BYTES, 2 * cost.nodes * _OPERATION, len(found) * _TERM - cost.nodes * _OPERATION)
    if products < LEAST_ROWS or products * cost.nbytes < least:
        return found
    if _engine.compiling() or _engine.in_transform() or not is_plain(lin):
        return found
    maps, entering = entrances(lin.roots[0], lin.inputs, range(len(lin.inputs)))
    entering = {i: entrance for i, entrance in entering.items() if not entrance.others}
    maps = [
        m for m in (m._replace(terms=[t for t in m.terms if t.which in entering]) for m in maps) if m.terms
    ]
    if not maps or not _pays(first, cost, maps, 1, products):
        return found
    paired = _paired(lin, maps)
    if not paired:
        return found
    whole = [i for i, entrance in entering.items() if _is_covered(entrance, paired)]
    paired = [one for one in paired if any(t.which in whole for t in one.affine.terms)]
    if not paired or not _pays(first, cost, maps, paired[0].layout.block_rows, products):
        return found
    for i, J in zip(whole, _matrices(first, cost, options, paired, whole, verify) or [], strict=False):
        found[i] = J
    return found


class _Paired:
    """An affine map whose samples stay apart up to ``y``: along these axes, ``(of y, of z)``."""

    __slots__ = ("affine", "layout", "pairs")

    def __init__(self, affine: AffineMap, y: Tensor, pairs: Sequence[tuple[int, int]]) -> None:
        self.affine = affine
        self.pairs = tuple(pairs)
        self.layout = Layout(tuple(y.shape), tuple(affine.z.shape), self.pairs)

    def by_sample(self, shaped: Tensor) -> Tensor:
        """From (..., axes of samples in the order of z, n) to (..., blocks, the other samples, n)."""
        samples = self.affine.samples()
        lead = shaped.dim() - len(samples) - 1
        paired = [samples.index(q) for _, q in self.pairs]
        free = [i for i in range(len(samples)) if i not in paired]
        sizes = [self.affine.z.shape[samples[i]] for i in paired]
        moved = shaped.permute(*range(lead), *[lead + i for i in (*paired, *free)], -1)
        return moved.reshape(*shaped.shape[:lead], torch.Size(sizes).numel(), -1, shaped.shape[-1])

    def rows(self, products: Tensor) -> Tensor:
        """Products (rows, *z's) as (rows, blocks, the other samples, channels)."""
        channel = self.affine.channel
        moved = products.unsqueeze(-1) if channel is None else products.movedim(channel + 1, -1)
        return self.by_sample(moved)

    def factor(self, term: Term, keep: bool) -> Tensor:
        """The term's factor as (blocks, the other samples, k)."""
        factor = term.factor if keep else term.factor.detach()
        sizes = [self.affine.z.shape[axis] for axis in self.affine.samples()]
        return self.by_sample(factor.reshape(*sizes, factor.shape[1]))


def _paired(lin: Linearization, maps: Sequence[AffineMap]) -> list[_Paired]:
    """The maps whose samples stay apart, along axes of ``y`` that they have in common."""
    y = lin.roots[0]
    found: list[tuple[AffineMap, dict[int, int]]] = []
    for affine in maps:
        pairs = aligned_axes(y, affine.z) or []
        apart = {p: q for p, q in pairs if q != affine.channel}
        if apart:
            found.append((affine, apart))
    if not found:
        return []
    common = set.intersection(*(set(apart) for _, apart in found))
    return [_Paired(affine, y, [(p, apart[p]) for p in sorted(common)]) for affine, apart in found if common]


def _is_covered(entrance: Entrance, paired: Sequence[_Paired]) -> bool:
    """Whether all terms of an input are among the maps'."""
    return len(entrance.terms) == sum(
        1 for one in paired for term in one.affine.terms if any(term is other for other in entrance.terms)
    )


def _matrices(
    first: FirstOrder,
    cost: RowCost,
    options: Options,
    paired: Sequence[_Paired],
    whole: Sequence[int],
    verify: bool,
) -> list[Tensor] | None:
    """The Jacobian by each of the ``whole`` inputs; ``None`` if the check fails."""
    lin, y = first.lin, first.y
    values = lin.onward(lin.roots, [one.affine.z for one in paired])
    layout = paired[0].layout
    vector = random_vector(y.numel())
    weights = by_block(of_itself(layout), vector.view(1, *y.shape).to(y))[0].t().unsqueeze(2)
    explained = [Explained(one.affine, one.layout, weights) for one in paired]
    total = layout.block_rows
    blocks = {i: _Block(first, i, total, options.keep) for i in whole}
    for lo, hi, products in _products.vjps(
        values,
        0,
        BlockSeeds(layout, lin.roots[0]),
        total,
        chunk_for(options, total, cost, y.device),
        create_graph=options.keep,
        progress=options.progress,
        misbatched=cost.misbatched,
    ):
        for one, of_z, product in zip(paired, explained, products, strict=True):
            z = one.affine.z
            given = z.new_zeros(hi - lo, *z.shape) if product is None else product
            if verify:
                of_z.add(lo, hi, by_block(one.layout, given))
            by_sample = one.rows(given)
            for term in one.affine.terms:
                if term.which in blocks:
                    blocks[term.which].add(lo, hi, _by_term(one, term, by_sample, options.keep))
    if verify and not _are_right(first, paired, explained, whole, vector):
        return None
    in_order = layout.y_order == sorted(layout.y_order)
    order = layout.y_numbers(y.device).reshape(-1)
    return [J if in_order else _ordered(J, order) for J in (block.matrix() for block in blocks.values())]


class _Block:
    """The Jacobian by one input, block after block of its rows, from chunks and terms that are added up."""

    __slots__ = ("_chunks", "_dtype", "_keep", "_shape", "_whole")

    def __init__(self, first: FirstOrder, which: int, rows: int, keep: bool) -> None:
        x, y = first.prepared.inputs[which], first.y
        self._shape = (y.numel() // max(1, rows), rows, x.numel())
        self._dtype = result_dtype(x, y)
        self._keep = keep
        self._chunks: dict[int, Tensor] = {}
        self._whole: Tensor | None = None

    def add(self, lo: int, hi: int, part: Tensor) -> None:
        """Rows ``lo`` to ``hi`` of each block, shape (blocks, hi - lo, *the input's), of one term."""
        part = part.reshape(self._shape[0], hi - lo, self._shape[2])
        if self._keep or hi - lo == self._shape[1]:
            before = self._chunks.get(lo)
            if before is None:
                self._chunks[lo] = part
            else:
                self._chunks[lo] = before + part if self._keep else before.add_(part)
            return
        if self._whole is None:
            self._whole = part.new_zeros(self._shape)
        self._whole[:, lo:hi].add_(part)

    def matrix(self) -> Tensor:
        """All rows."""
        whole = self._whole
        if whole is None:
            chunks = list(self._chunks.values())
            whole = chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)
        return whole.reshape(self._shape[0] * self._shape[1], self._shape[2]).to(self._dtype)


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """Row ``i`` goes to row ``order[i]``."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return matrix.index_select(0, back)


def _by_term(one: _Paired, term: Term, by_z: Tensor, keep: bool) -> Tensor:
    """From rows by z, (rows, blocks, the other samples, channels), to rows by an input, block after block.

    Shape (blocks, rows, *the input's).
    """
    factor = one.factor(term, keep).unsqueeze(1)  # (blocks, 1, the other samples, k)
    # (blocks, rows, channels, the other samples); contiguous, as a product takes its order from its factors
    by_channel = by_z.permute(1, 0, 3, 2).contiguous()
    outer = by_channel * factor if factor.shape[2] == 1 else by_channel @ factor
    return term.restored(outer.mT)


def _are_right(
    first: FirstOrder,
    paired: Sequence[_Paired],
    explained: Sequence[Explained],
    whole: Sequence[int],
    vector: Tensor,
) -> bool:
    """Whether the rows explain a pullback of a random cotangent."""
    lin, y, inputs = first.lin, first.y, first.prepared.inputs
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    for one, of_z in zip(paired, explained, strict=True):
        for term, (got, scale) in zip(one.affine.terms, of_z.pulled(), strict=True):
            before = sums.get(term.which)
            mine = term.restored(got), term.restored(scale)
            sums[term.which] = mine if before is None else (before[0] + mine[0], before[1] + mine[1])
    by = lin.onward(lin.roots, [lin.inputs[i] for i in whole])

    def plain(vector: Tensor) -> list[Tensor]:
        pulled = by.pull_dense([vector.to(y.device, y.dtype, copy=True).view(y.shape)])
        return [
            torch.zeros_like(inputs[i]) if g is None else g.detach()
            for i, g in zip(whole, pulled, strict=True)
        ]

    eps = precision([inputs[i] for i in whole], y, lin.survey().coarsest)
    return are_explained([sums[i] for i in whole], vector, plain, eps, lin)
