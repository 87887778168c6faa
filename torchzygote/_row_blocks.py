"""Jacobians put together from rows by values: block after block, and by way of values in between.

Knows blocks, values and inputs; it must not know how the rows were computed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _products
from ._assembly import Rows, result_dtype
from ._first_order import FirstOrder
from ._pulling import Options, chunk_for, pulled_rows
from ._recorded.entering import Entering
from ._row_cost import row_cost

__all__ = ["RowBlocks", "add_made", "some_rows"]


class RowBlocks:
    """The Jacobian by one input, block after block of its rows, from chunks and terms that are added up."""

    __slots__ = ("_chunks", "_dtype", "_keep", "_shape", "_whole")

    def __init__(self, x: Tensor, y: Tensor, rows: int, keep: bool) -> None:
        self._shape = (y.numel() // max(1, rows), rows, x.numel())
        self._dtype = result_dtype(x, y)
        self._keep = keep
        self._chunks: dict[int, Tensor] = {}
        self._whole: Tensor | None = None

    def add(self, lo: int, hi: int, part: Tensor) -> None:
        """Rows ``lo`` to ``hi`` of each block, shape (blocks, hi - lo, *the input's), of one term.

        Nobody else holds the memory of ``part``.
        """
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


def add_made(
    matrices: dict[int, Tensor],
    first: FirstOrder,
    options: Options,
    into: Entering,
    rows: dict[int, list[_products.Seeds]],
    whole: Sequence[int],
) -> None:
    """To rows by the ``whole`` inputs those by way of values in between, each a sum of ``rows``."""
    lin, y = first.lin, first.y
    total, quiet = y.numel(), options._replace(progress=False)
    owned = set(matrices)  # memory that nobody else holds
    for j in sorted(rows):
        by = [i for i in whole if j in into.made_of([i])]
        inner = lin.onward([into.values[j]], [lin.inputs[i] for i in by])
        cost = row_cost(inner)
        joined = options.keep or chunk_for(quiet, total, cost, y.device) >= total
        blocks = {
            i: Rows(total, lin.inputs[i], result_dtype(lin.inputs[i], y), options.keep)
            for i in by
            if joined or i not in owned
        }
        seeds = functools.partial(_summed_seeds, rows.pop(j), into.values[j].dtype)
        at_once: dict[int, Tensor] = {}
        for lo, hi, products in pulled_rows(inner, seeds, total, cost, quiet):
            for i, product in zip(by, products, strict=True):
                if i in blocks and product is not None and hi - lo == total:
                    at_once[i] = product.reshape(total, -1).to(blocks[i].dtype)  # in any order
                elif i in blocks:
                    blocks[i].add(lo, hi, product)
                elif product is not None:
                    matrices[i][lo:hi].add_(product.reshape(hi - lo, -1))
        for i, block in blocks.items():
            given = at_once[i] if i in at_once else block.matrix()
            matrices[i] = matrices[i] + given if i in matrices else given
        if not joined:
            owned.update(by)


def _summed_seeds(terms: Sequence[_products.Seeds], dtype: torch.dtype, lo: int, hi: int) -> Tensor:
    return functools.reduce(torch.add, (term(lo, hi) for term in terms)).to(dtype)


def some_rows(rows: Tensor, lo: int, hi: int) -> Tensor:
    """Seeds that are there already."""
    return rows[lo:hi]
