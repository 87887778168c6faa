"""From chunks of products to matrices and diagonals.

Knows shapes and dtypes; it must not know how a product was computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from ._arguments import is_inexact
from ._state import in_transform

__all__ = ["Columns", "Rows", "add_rows", "result_dtype"]


def result_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Dtype of the Jacobian of ``y`` by ``x``."""
    return torch.promote_types(x.dtype, y.dtype) if is_inexact(y) else x.dtype


class Rows:
    """The matrix of shape ``(rows, x.numel())`` for one input, filled from chunks of rows.

    ``keep``: chunks are joined differentiably instead of being written into memory.
    """

    __slots__ = ("_block", "_keep", "_parts", "columns", "device", "dtype", "rows")

    def __init__(self, rows: int, x: Tensor, dtype: torch.dtype, keep: bool) -> None:
        self.rows = rows
        self.columns = x.numel()
        self.dtype = dtype
        self.device = x.device
        self._keep = keep or in_transform()  # vmap: memory made here has no room for its examples
        self._parts: list[tuple[int, int, Tensor]] = []
        self._block: Tensor | None = None

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.columns, dtype=self.dtype, device=self.device)

    def add(self, lo: int, hi: int, products: Tensor | None) -> None:
        """Take rows ``lo`` to ``hi``, shape ``(hi - lo, ...)``."""
        if products is None:
            return
        flat = products if products.dim() == 2 else products.reshape(hi - lo, self.columns)
        if flat.dtype != self.dtype or flat.device != self.device:
            flat = flat.to(dtype=self.dtype, device=self.device)
        if self._keep or hi - lo == self.rows:
            self._parts.append((lo, hi, flat))
            return
        self.block()[lo:hi].copy_(flat)

    def block(self) -> Tensor:
        """The memory that chunks are written to."""
        if self._block is None:
            self._block = self._zeros(self.rows)
        return self._block

    def is_written(self, rows: int) -> bool:
        """Whether a chunk of so many rows is written into memory."""
        return not self._keep and rows != self.rows

    def matrix(self) -> Tensor:
        """The whole matrix; rows that nothing was added for are zero."""
        if self._block is not None:
            return self._block
        if not self._parts:
            return self._zeros(self.rows)
        if len(self._parts) == 1 and self._parts[0][1] - self._parts[0][0] == self.rows:
            whole = self._parts[0][2]
            return whole if whole.is_contiguous() else whole.contiguous()
        pieces: list[Tensor] = []
        reached = 0
        for lo, hi, part in self._parts:
            if lo > reached:
                pieces.append(self._zeros(lo - reached))
            pieces.append(part)
            reached = hi
        if reached < self.rows:
            pieces.append(self._zeros(self.rows - reached))
        return torch.cat(pieces)


# Fewer elements than this for fewer arguments than that are written as fast one by one: 3.4 microseconds for
# a block of 10 x 10 where the operator takes 6; 13 for four of them where it takes 12.
_FUSED_ELEMENTS = 1 << 14
_FUSED_ARGUMENTS = 4


def add_rows(blocks: Sequence[Rows], lo: int, hi: int, products: Sequence[Tensor | None]) -> None:
    """Rows ``lo`` to ``hi`` of all matrices at once."""
    if not blocks or not blocks[0].is_written(hi - lo):
        for block, x in zip(blocks, products, strict=True):
            block.add(lo, hi, x)
        return
    present = [(block, x) for block, x in zip(blocks, products, strict=True) if x is not None]
    if present and (
        len(present) >= _FUSED_ARGUMENTS
        or sum(x.numel() for _, x in present) >= _FUSED_ELEMENTS
        or not present[0][1].is_cpu
    ):
        native.scatter_rows_([block.block() for block, _ in present], [x for _, x in present], lo)
        return
    for block, x in present:
        block.add(lo, hi, x)


class Columns:
    """The matrix of shape ``(rows, columns)`` for one input, filled from chunks of columns."""

    __slots__ = ("_block", "_keep", "_parts", "columns", "device", "dtype", "rows")

    def __init__(self, rows: int, x: Tensor, dtype: torch.dtype, keep: bool) -> None:
        self.rows = rows
        self.columns = x.numel()
        self.dtype = dtype
        self.device = x.device
        self._keep = keep or in_transform()
        self._parts: list[Tensor] = []
        self._block: Tensor | None = None

    def add(self, lo: int, hi: int, products: Tensor) -> None:
        """Take columns ``lo`` to ``hi`` as products of shape ``(hi - lo, ...)``."""
        flat = products.reshape(hi - lo, self.rows)
        if flat.dtype != self.dtype or flat.device != self.device:
            flat = flat.to(dtype=self.dtype, device=self.device)
        if self._keep or hi - lo == self.columns:
            self._parts.append(flat)
            return
        if self._block is None:
            self._block = torch.empty(self.rows, self.columns, dtype=self.dtype, device=self.device)
        self._block[:, lo:hi].copy_(flat.t())

    def matrix(self) -> Tensor:
        """The whole matrix."""
        if self._block is not None:
            return self._block
        if not self._parts:
            return torch.zeros(self.rows, self.columns, dtype=self.dtype, device=self.device)
        joined = self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)
        return joined.t().contiguous()


def as_result(matrix: Tensor, scalar: bool) -> Tensor:
    """A number's Jacobian is a vector."""
    return matrix.reshape(-1) if scalar else matrix
