"""Block diagonal matrices: which axes are paired, the blocks' values, and seeds for one row of all of them.

Knows shapes; it must not know how products are computed, nor of what.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BlockSeeds", "Blocks", "Layout", "by_block", "in_shape_of_x", "of_itself", "rows_in_shape_of_x"]


@dataclass(frozen=True)
class Layout:
    """Which axes of ``y`` and ``x`` are paired; the others make up one block."""

    y_shape: tuple[int, ...]
    x_shape: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @cached_property
    def y_free(self) -> list[int]:
        """Axes of ``y`` within a block."""
        return [p for p in range(len(self.y_shape)) if p not in {p for p, _ in self.pairs}]

    @cached_property
    def x_free(self) -> list[int]:
        """Axes of ``x`` within a block."""
        return [q for q in range(len(self.x_shape)) if q not in {q for _, q in self.pairs}]

    @cached_property
    def y_order(self) -> list[int]:
        """Axes of ``y``, those of the blocks first."""
        return [p for p, _ in self.pairs] + self.y_free

    @cached_property
    def x_order(self) -> list[int]:
        """Axes of ``x``, those of the blocks first."""
        return [q for _, q in self.pairs] + self.x_free

    @cached_property
    def block_rows(self) -> int:
        """Rows of one block: products needed."""
        return math.prod(self.y_shape[p] for p in self.y_free)

    @cached_property
    def block_columns(self) -> int:
        """Columns of one block."""
        return math.prod(self.x_shape[q] for q in self.x_free)

    def y_numbers(self, device: torch.device) -> Tensor:
        """Row numbers, shape (blocks, block rows)."""
        numbers = torch.arange(math.prod(self.y_shape), device=device).view(self.y_shape)
        return numbers.permute(self.y_order).reshape(-1, self.block_rows)

    def x_numbers(self, device: torch.device) -> Tensor:
        """Column numbers, shape (blocks, block columns)."""
        numbers = torch.arange(math.prod(self.x_shape), device=device).view(self.x_shape)
        return numbers.permute(self.x_order).reshape(-1, self.block_columns)


class Blocks(NamedTuple):
    """``values[b, k, j]``: row ``k``, column ``j`` of block ``b``."""

    layout: Layout
    values: Tensor

    def dense(self, rows: int, columns: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        """The whole matrix, or its transpose."""
        values = self.values.to(dtype)
        y_numbers = self.layout.y_numbers(values.device)
        x_numbers = self.layout.x_numbers(values.device)
        row, column = (1, rows) if transposed else (columns, 1)
        places = (y_numbers * row).unsqueeze(2) + (x_numbers * column).unsqueeze(1)
        whole = torch.zeros(rows * columns, dtype=dtype, device=values.device)
        filled = whole.index_put_((places.reshape(-1),), values.reshape(-1))
        return filled.view((columns, rows) if transposed else (rows, columns))

    def diagonal(self) -> Tensor:
        """The diagonal, in the shape of ``x``; only for pairs of equal axes."""
        diagonal = self.values.diagonal(dim1=1, dim2=2)
        values = diagonal.clone(memory_format=torch.contiguous_format)  # a view would keep the blocks
        return in_shape_of_x(self.layout, values)


class BlockSeeds:
    """Seeds for row ``lo`` (``lo + 1``, ...) of all blocks: ones there, in memory of their own."""

    __slots__ = ("_layout", "_like")

    def __init__(self, layout: Layout, like: Tensor) -> None:
        self._layout = of_itself(layout)
        self._like = like

    def __call__(self, lo: int, hi: int) -> Tensor:
        rows = self._layout.block_rows
        blocks = self._like.numel() // max(1, rows)
        seeds = torch.zeros(hi - lo, blocks, rows, dtype=self._like.dtype, device=self._like.device)
        seeds.diagonal(lo, 0, 2).fill_(1)
        return rows_in_shape_of_x(self._layout, seeds).view(hi - lo, -1)


def of_itself(layout: Layout) -> Layout:
    """The layout of ``y`` with respect to itself."""
    return Layout(layout.y_shape, layout.y_shape, tuple((p, p) for p, _ in layout.pairs))


def by_block(layout: Layout, products: Tensor) -> Tensor:
    """Products of shape (rows, *x's) as (rows, blocks, block columns)."""
    order = layout.x_order
    if order != sorted(order):
        products = products.permute(0, *[q + 1 for q in order])
    return products.reshape(len(products), -1, layout.block_columns)


def in_shape_of_x(layout: Layout, blocks: Tensor) -> Tensor:
    """One product of shape (blocks, block columns) in the shape of ``x``; it may share memory with it."""
    return rows_in_shape_of_x(layout, blocks.unsqueeze(0))[0]


def rows_in_shape_of_x(layout: Layout, blocks: Tensor) -> Tensor:
    """The inverse of :func:`by_block`: from (rows, blocks, block columns) to (rows, *x's)."""
    order, rows = layout.x_order, len(blocks)
    if order == sorted(order):
        return blocks.reshape(rows, *layout.x_shape)
    back = sorted(range(len(order)), key=order.__getitem__)
    sizes = [layout.x_shape[q] for q in order]
    return blocks.reshape(rows, *sizes).permute(0, *[q + 1 for q in back]).contiguous()
