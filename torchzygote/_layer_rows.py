"""Rows of Jacobians by what goes into layers, as weights do.

Where the samples stay apart on the way from the output ``z`` of a layer to ``y``, the rows of all samples are
pulled back to ``z`` at once: as many products as one sample has rows, whatever the number of samples. From
there to the weights it takes a local rule for each sample by itself; for ``z = A W`` a product of its part of
the rows with its part of ``A``. (The rule is Goodfellow's, "Efficient per-example gradient computations",
2015.) One plain product with a random cotangent checks the rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _products
from ._affine_check import Explained, Summed, are_explained
from ._assembly import Rows, result_dtype
from ._block_layout import BlockSeeds, by_block, of_itself
from ._certificate import precision, random_vector, wide
from ._cost_model import RowCost, exceeds_budget
from ._first_order import FirstOrder
from ._numbers import show_numbers
from ._pulling import Options, chunk_for, pulled_rows
from ._recorded.apart import Apart, OfLayers, OfMap, paired_values
from ._recorded.entering import Entering
from ._recorded.layers import lost_digits
from ._row_blocks import RowBlocks, add_made, some_rows
from ._row_cost import is_plain
from ._torch_private import leads_to, node_shape, survey

__all__ = ["jacobians"]

# What things take, in bytes that a core moves meanwhile (4 GB a second): an operation of a product; a look at
# one on a walk; a term, of which rows are put together and compared.
_OPERATION = 100_000
_LOOK = 16_000
_TERM = 1_200_000
# Rows are written so many times, as they are made, put in order and compared.
_WRITTEN = 1.3
# Handing on is such a part of the bytes of a row, at most; one multiplication takes as long as so many bytes.
_HANDED_ON = 0.6
_MULTIPLIED = 0.2
# Less than that isn't worth a look at all.
_LEAST_BYTES = 1 << 20
_LEAST_ROWS = 4
# One walk for each value may take such a part of the time that rows take the dense way.
_WORTH_WALKS = 20
# Values made of weights have so many times their elements, at most.
_MADE = 2
# Rows of so many bytes are summed up at a time.
_SUMMED = 4 << 20
# Larger memory comes anew from the system each time (glibc's largest threshold), which takes longer than to
# write it.
_REUSED = 32 << 20


class _Dense(NamedTuple):
    """What the dense way takes: how many products, of how many bytes in all."""

    products: int
    nbytes: int
    # Of these, what isn't moved as long as all products go at once: rows by weights are counted for each
    # operation that hands them on, and written once, in memory that is used again.
    handed_on: int = 0

    def at_least(self) -> int:
        """In bytes moved."""
        return self.nbytes - self.handed_on

    def takes(self, into: Entering) -> float:
        """The same, with what is multiplied where moving doesn't hide it."""
        if not self.handed_on:
            return self.nbytes
        return self.at_least() + self.products * _multiplications(into) * _MULTIPLIED


def _dense(first: FirstOrder, cost: RowCost, options: Options, products: int) -> _Dense:
    inputs = sum(x.numel() * x.element_size() for x in first.lin.inputs)
    at_once = chunk_for(options, products, cost, first.y.device) >= products
    handed_on = min(2 * inputs, int(cost.nbytes * _HANDED_ON)) if at_once else 0
    return _Dense(products, products * cost.nbytes, products * handed_on)


def _multiplications(into: Entering) -> float:
    """How many one product takes on its way from values to what goes into them."""
    of_maps = (
        m.z.numel()
        // (1 if m.channel is None else max(1, m.z.shape[m.channel]))
        * into.values[term.which].numel()
        for m in into.maps
        for term in m.terms
    )
    of_layers = (
        math.prod(node_shape(*one.z) or ()) * math.prod(into.values[i].shape[1:]) for i, one in into.layers
    )
    return sum(of_maps) + sum(of_layers)


def _pays(first: FirstOrder, cost: RowCost, into: Entering, rows: int, dense: _Dense) -> bool:
    """Whether it takes less time than it saves, in bytes moved; ``rows``: of one sample."""
    which = [term.which for m in into.maps for term in m.terms] + [i for i, _ in into.layers]
    sizes = [into.values[i].numel() for i in which]
    each = sum(dict(zip(which, sizes, strict=True)).values())
    # several ways of one input are added up
    added = (sum(sizes) - each) * 3
    between = [i for i in set(which) if i >= len(first.lin.inputs)]
    if between:
        added += survey([into.values[i] for i in between]).numel
    moved = first.y.numel() * first.y.element_size() * (added + each * _WRITTEN)
    inputs = sum(x.numel() * x.element_size() for x in first.lin.inputs)
    # one more product checks, which alone goes on to the inputs
    moved += rows * (cost.nbytes - inputs) + cost.nbytes
    around = cost.nodes * (_OPERATION + 2 * _LOOK) + len(which) * _TERM
    return moved + around < dense.takes(into)


def jacobians(
    first: FirstOrder, cost: RowCost, options: Options, products: int, verify: bool
) -> list[Tensor | None]:
    """Jacobians by inputs that reach ``y`` through layers only; ``None`` for others, or if it doesn't pay.

    ``products``: how many the dense way takes.
    """
    lin = first.lin
    found: list[Tensor | None] = [None] * len(lin.inputs)
    # Where operations take longer than what they move, rows together cost little more than one.
    least = max(_LEAST_BYTES, 2 * cost.nodes * _OPERATION, len(found) * _TERM - cost.nodes * _OPERATION)
    if products < _LEAST_ROWS or products * cost.nbytes < least:
        return found
    dense = _dense(first, cost, options, products)
    if dense.at_least() < least or not show_numbers([first.y]) or not is_plain(lin):
        return found
    seen = _seen(first, cost, dense)
    if seen is None:
        return found
    into, paired, whole = seen
    between = into.made_of(whole)
    if (
        between
        and paired[0].layout.block_rows == first.y.numel()
        and _are_many(first, options, into, between)
    ):
        return found
    if len({x.device for x in (first.y, *lin.inputs, *(one.z for one in paired))}) > 1:
        return found
    if set(into.used()) - set(whole):  # all other products are made in any case
        nbytes = sum(lin.inputs[i].numel() * lin.inputs[i].element_size() for i in whole)
        dense = _Dense(products, products * nbytes)
    if not _pays(first, cost, into, paired[0].layout.block_rows, dense):
        return found
    matrices = _matrices(first, cost, options, into, paired, whole, verify)
    if matrices is None:
        return found
    used = into.used()
    for i, x in enumerate(first.prepared.inputs):
        # As the last bias of a network whose derivative this is.
        if i not in used and not leads_to(lin.roots[0].grad_fn, [lin.inputs[i]]):
            found[i] = Rows(first.y.numel(), x, result_dtype(x, first.y), options.keep).matrix()
    for i, J in zip(whole, matrices, strict=True):
        found[i] = J
    return found


def _are_many(first: FirstOrder, options: Options, into: Entering, between: Collection[int]) -> bool:
    """Whether rows by all of these values at once take more than a chunk may, or than is soon written."""
    rows = first.y.numel()
    nbytes = rows * sum(into.values[j].numel() * into.values[j].element_size() for j in between)
    if options.chunk_size is not None:
        return options.chunk_size < rows
    return nbytes > _REUSED or exceeds_budget(nbytes, first.y.device)


def _seen(first: FirstOrder, cost: RowCost, dense: _Dense) -> tuple[Entering, list[Apart], list[int]] | None:
    """What inputs go into, where samples stay apart from there on, and the inputs of which that is all."""
    lin = first.lin
    between: set[Any] = set()
    while True:
        into = Entering(lin.roots[0], lin.inputs, dense.nbytes // max(1, _TERM), between)
        into.restricted(into.leading_on())
        if not (into.maps or into.layers) or not _pays(first, cost, into, 1, dense):
            return None
        walk = cost.nodes * _LOOK * _WORTH_WALKS
        one_by_one = (len(into.maps) + len(into.layers)) * walk < dense.nbytes
        paired = paired_values(into, one_by_one=one_by_one)
        counts = [0] * len(into.values)
        for one in paired:
            for i in one.inputs():
                counts[i] += 1
        mixed = _nodes(into) - {node for one in paired for node in one.nodes()}
        elements = sum(math.prod(node_shape(node, 0) or ()) for node in mixed)
        if (
            between
            or not mixed
            or elements > _MADE * sum(x.numel() for x in lin.inputs)
            or walk >= dense.nbytes
        ):
            break
        between = mixed  # of the size of weights: made of weights, perhaps
    whole = into.covered(counts)
    needed = {*whole, *into.made_of(whole)}
    paired = [one for one in paired if any(i in needed for i in one.inputs())]
    return (into, paired, whole) if paired else None


def _nodes(into: Entering) -> set[Any]:
    """Where values go into affine maps and layers."""
    return {term.node for m in into.maps for term in m.terms} | {one.z[0] for _, one in into.layers}


def _matrices(
    first: FirstOrder,
    cost: RowCost,
    options: Options,
    into: Entering,
    paired: Sequence[Apart],
    whole: Sequence[int],
    verify: bool,
) -> list[Tensor] | None:
    """The Jacobian by each of the ``whole`` inputs; ``None`` if the check fails."""
    lin, y = first.lin, first.y
    values = lin.onward(lin.roots, [one.z for one in paired])
    layout = paired[0].layout
    vector = random_vector(y.numel())
    weights = by_block(of_itself(layout), vector.view(1, *y.shape).to(y))[0].t().unsqueeze(2)
    explained = [
        Explained(one.affine, one.layout, weights) if verify and isinstance(one, OfMap) else None
        for one in paired
    ]
    total = layout.block_rows
    entered = {i for one in paired for i in one.inputs()} & {*whole, *into.made_of(whole)}
    between = entered - set(whole)
    later: set[int] = set()
    if not options.keep and _are_many(first, options, into, between):
        later = _made_later(paired, into, between)
    rows: dict[int, list[_products.Seeds]] = {i: [] for i in later}
    kept: dict[OfMap, list[Tensor]] = {}
    blocks = {i: RowBlocks(into.values[i], y, total, options.keep) for i in entered - later}
    seeds = BlockSeeds(layout, lin.roots[0])
    for lo, hi, products in pulled_rows(values, seeds, total, cost, options):
        for one, of_z, product in zip(paired, explained, products, strict=True):
            given = one.z.new_zeros(hi - lo, *one.z.shape) if product is None else product
            if of_z is not None:
                of_z.add(lo, hi, by_block(one.layout, given))
            for which, part in one.parts(given, blocks, options.keep):
                blocks[which].add(lo, hi, part)
            if isinstance(one, OfMap) and not later.isdisjoint(one.inputs()):
                kept.setdefault(one, []).append(given)
    for one, parts in kept.items():
        given = parts[0] if len(parts) == 1 else torch.cat(parts)
        for which in later.intersection(one.inputs()):
            rows[which].append(one.seeds(given, which))
    matrices = {i: blocks.pop(i).matrix() for i in whole if i in blocks}
    rows.update((i, [functools.partial(some_rows, blocks.pop(i).matrix())]) for i in list(blocks))
    add_made(matrices, first, options, into, rows, whole)
    if verify:
        made = {i for i in whole if into.made_of([i])}
        sums = _allowing_for_noise(_sums(matrices, made, paired, explained, weights), into)
        if not _are_right(first, sums, whole, vector):
            return None
    if layout.y_order == sorted(layout.y_order):
        return [matrices[i] for i in whole]
    back = layout.y_numbers(y.device).reshape(-1).argsort()
    return [matrices[i].index_select(0, back) for i in whole]


def _made_later(paired: Sequence[Apart], into: Entering, between: Collection[int]) -> set[int]:
    """Of these values, those by which rows are made when they go on, from products that take less memory."""
    ways: dict[int, list[Apart]] = {i: [one for one in paired if i in one.inputs()] for i in between}
    blocks = into.y.numel() // max(1, paired[0].layout.block_rows)
    return {
        i
        for i, ones in ways.items()
        if all(isinstance(one, OfMap) for one in ones)
        and sum(one.z.numel() for one in ones) <= blocks * into.values[i].numel()
    }


def _sums(
    matrices: dict[int, Tensor],
    made: Collection[int],
    paired: Sequence[Apart],
    explained: Sequence[Explained | None],
    weights: Tensor,
) -> dict[int, Summed]:
    """For each input: of affine maps from what comes to ``z``, which is less than the rows themselves.

    ``made``: inputs that other values are made of.
    """
    found: dict[int, list[Summed]] = {}
    by_rows = {i for one in paired if isinstance(one, OfLayers) for i in one.inputs()} | set(made)
    for one, of_z in zip(paired, explained, strict=True):
        if of_z is None or not isinstance(one, OfMap):
            continue
        for term, of_term in zip(one.affine.terms, of_z.pulled(), strict=True):
            if term.which not in by_rows and term.which in matrices:
                found.setdefault(term.which, []).append(of_term.through(term.restored))
    sums = {i: functools.reduce(Summed.plus, terms) for i, terms in found.items()}
    by_row = weights[..., 0].t().reshape(-1)
    for i in by_rows & set(matrices):
        sums[i] = _summed_rows(matrices[i].detach(), by_row)
    return sums


def _summed_rows(J: Tensor, weights: Tensor) -> Summed:
    """The weighted sum of the rows of ``J``, and that of their absolute values, which tells rounding."""
    start = wide(J[:0]).sum(0)
    factors, sizes = weights.to(start), weights.to(start).abs()
    step = max(1, _SUMMED // max(1, J.shape[1] * J.element_size()))

    def scale() -> Tensor:
        return sum(
            (sizes[lo : lo + step] @ wide(J[lo : lo + step]).abs() for lo in range(0, len(J), step)),
            start.abs(),
        )

    if start.dtype is J.dtype:
        return Summed(factors @ J, scale)
    parts = (factors[lo : lo + step] @ wide(J[lo : lo + step]) for lo in range(0, len(J), step))
    return Summed(sum(parts, start), scale)


def _allowing_for_noise(sums: dict[int, Summed], into: Entering) -> dict[int, Summed]:
    """Where a norm gets equal numbers, terms by its weights are zero, and the plain product noise."""

    @functools.cache
    def largest() -> float:
        scales = [one.scale() for one in sums.values()]
        return max((float(scale.amax()) for scale in scales if scale.numel() > 0), default=0.0)

    def with_noise(i: int) -> Tensor:
        lost = sum(lost_digits(one) for j, one in into.layers if j == i)
        return sums[i].scale() + lost * largest()

    by_layers = {i for i, _ in into.layers}
    return {
        i: one._replace(scale=functools.partial(with_noise, i)) if i in by_layers else one
        for i, one in sums.items()
    }


def _are_right(first: FirstOrder, sums: dict[int, Summed], whole: Sequence[int], vector: Tensor) -> bool:
    """Whether the rows explain a pullback of a random cotangent."""
    lin, y, inputs = first.lin, first.y, first.prepared.inputs
    by = lin.onward(lin.roots, [lin.inputs[i] for i in whole])

    def plain(vector: Tensor) -> list[Tensor]:
        pulled = by.pull_dense([vector.to(y.device, y.dtype, copy=True).view(y.shape)])
        return [
            torch.zeros_like(inputs[i]) if g is None else g.detach()
            for i, g in zip(whole, pulled, strict=True)
        ]

    eps = precision([inputs[i] for i in whole], y, lin.coarsest())
    shaped = [sums[i].through(functools.partial(torch.reshape, shape=inputs[i].shape)) for i in whole]
    return are_explained(shaped, vector, plain, eps, lin)
