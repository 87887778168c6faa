"""Values inside a function whose samples stay apart up to its result, and the way from there to the inputs.

Rows by such a value become rows by what goes into it, each sample's part by itself. Knows layers and shapes;
it must not know how the rows were computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from .._block_layout import Layout
from .._torch_private import value_of_node
from .affine import AffineMap, Term
from .entering import Entering
from .layers import Layer
from .moves import Value
from .samples import all_apart

__all__ = ["Apart", "OfLayers", "OfMap", "paired_values"]

_Pairs = tuple[tuple[int, int], ...]


class Apart:
    """A value whose samples stay apart up to ``y``: along these axes, ``(of y, of z)``."""

    __slots__ = ("layout", "pairs", "z")

    def __init__(self, z: Tensor, y: Tensor, pairs: _Pairs) -> None:
        self.z = z
        self.pairs = pairs
        self.layout = Layout(tuple(y.shape), tuple(z.shape), self.pairs)

    def inputs(self) -> list[int]:
        """Those that go into it."""
        raise NotImplementedError

    def nodes(self) -> list[Any]:
        """Where they do."""
        raise NotImplementedError

    def parts(self, products: Tensor, which: Collection[int], keep: bool) -> Iterator[tuple[int, Tensor]]:
        """From products (rows, *z's) for each of these inputs to rows by it, (blocks, rows, *the input's)."""
        raise NotImplementedError


class OfLayers(Apart):
    """What layers give that aren't affine maps."""

    __slots__ = ("layers",)

    def __init__(self, layers: list[tuple[int, Layer]], z: Tensor, y: Tensor, pairs: _Pairs) -> None:
        super().__init__(z, y, pairs)
        self.layers = layers

    def inputs(self) -> list[int]:
        return [i for i, _ in self.layers]

    def nodes(self) -> list[Any]:
        return [one.z[0] for _, one in self.layers]

    def parts(self, products: Tensor, which: Collection[int], keep: bool) -> Iterator[tuple[int, Tensor]]:
        axes = [q for _, q in self.pairs]
        memory = products.untyped_storage().data_ptr()
        for i, one in self.layers:
            if i not in which:
                continue
            rows = one.way.back(one.pulled(products, axes, keep))
            # Memory of the products is autograd's, and perhaps that of another value's, too.
            yield i, rows.clone() if rows.untyped_storage().data_ptr() == memory else rows


class OfMap(Apart):
    """What an affine map gives."""

    __slots__ = ("affine",)

    def __init__(self, affine: AffineMap, z: Tensor, y: Tensor, pairs: _Pairs) -> None:
        super().__init__(z, y, pairs)
        self.affine = affine

    def inputs(self) -> list[int]:
        return [term.which for term in self.affine.terms]

    def nodes(self) -> list[Any]:
        return [term.node for term in self.affine.terms]

    def parts(self, products: Tensor, which: Collection[int], keep: bool) -> Iterator[tuple[int, Tensor]]:
        by_sample = self.rows(products)
        for term in self.affine.terms:
            if term.which in which:
                yield term.which, _by_term(term, self.factor(term, keep), by_sample)

    def seeds(self, products: Tensor, which: int) -> Callable[[int, int], Tensor]:
        """Rows ``lo`` to ``hi`` by one of the inputs, block after block, made when they are asked for."""
        by_sample = self.rows(products)
        rows = len(by_sample)
        terms = [(term, self.factor(term, False)) for term in self.affine.terms if term.which == which]

        def some(lo: int, hi: int) -> Tensor:
            first, last = lo // rows, -(-hi // rows)
            lo, hi = lo - first * rows, hi - first * rows
            by_z = by_sample[:, first:last]
            if last - first == 1:  # of a large block no other rows are made
                by_z, lo, hi = by_z[lo:hi], 0, hi - lo
            parts = [_by_term(term, factor[first:last], by_z) for term, factor in terms]
            return functools.reduce(torch.add, parts).reshape((last - first) * len(by_z), -1)[lo:hi]

        return some

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


def paired_values(into: Entering, *, one_by_one: bool) -> list[Apart]:
    """The values whose samples stay apart, along axes of ``y`` that they have in common.

    ``one_by_one``: look at each by itself, if not all do.
    """
    y = into.y
    by_value: dict[tuple[Value, frozenset[int]], list[tuple[int, Layer]]] = {}
    for i, one in into.layers:
        by_value.setdefault((one.z, one.own), []).append((i, one))
    values: list[tuple[Tensor, Collection[int]]] = []
    makers: list[Callable[[Tensor, Tensor, _Pairs], Apart]] = []
    for m in into.maps:
        values.append((m.z, () if m.channel is None else (m.channel,)))
        makers.append(functools.partial(OfMap, m))
    for (value, own), layers in by_value.items():
        values.append((value_of_node(*value, into.number), own))
        makers.append(functools.partial(OfLayers, layers))
    common, apart = all_apart(y, values, one_by_one=one_by_one)
    if not common:
        return []
    return [
        make(z, y, tuple((p, axes[p]) for p in common))
        for make, (z, _), axes in zip(makers, values, apart, strict=True)
        if axes
    ]


def _by_term(term: Term, factor: Tensor, by_z: Tensor) -> Tensor:
    """From rows by z, (rows, blocks, the other samples, channels), to rows by an input, block after block.

    ``factor``: the term's, (blocks, the other samples, k). Shape (blocks, rows, *the input's).
    """
    factor = factor.unsqueeze(1)
    # (blocks, rows, channels, the other samples); contiguous, as a product takes its order from its factors
    by_channel = by_z.permute(1, 0, 3, 2).contiguous()
    outer = by_channel * factor if factor.shape[2] == 1 else by_channel @ factor
    return term.restored(outer.mT)
