"""From chunks of products to matrices and diagonals.

Knows shapes and dtypes; it must not know how a product was computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Columns", "Rows", "result_dtype"]


def result_dtype(x: Tensor, y: Tensor) -> torch.dtype:
    """Dtype of the Jacobian of ``y`` by ``x``."""
    return torch.promote_types(x.dtype, y.dtype) if _inexact(y) else x.dtype


def _inexact(y: Tensor) -> bool:
    return y.dtype.is_floating_point or y.dtype.is_complex


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
        self._keep = keep
        self._parts: list[tuple[int, int, Tensor]] = []
        self._block: Tensor | None = None

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self.columns, dtype=self.dtype, device=self.device)

    def add(self, lo: int, hi: int, products: Tensor | None) -> None:
        """Take rows ``lo`` to ``hi``, shape ``(hi - lo, ...)``."""
        if products is None:
            return
        flat = products.reshape(hi - lo, self.columns)
        if flat.dtype != self.dtype or flat.device != self.device:
            flat = flat.to(dtype=self.dtype, device=self.device)
        if self._keep or hi - lo == self.rows:
            self._parts.append((lo, hi, flat))
            return
        if self._block is None:
            self._block = self._zeros(self.rows)
        self._block[lo:hi].copy_(flat)

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


class Columns:
    """The matrix of shape ``(rows, columns)`` for one input, filled from chunks of columns."""

    __slots__ = ("_block", "_keep", "_parts", "columns", "device", "dtype", "rows")

    def __init__(self, rows: int, x: Tensor, dtype: torch.dtype, keep: bool) -> None:
        self.rows = rows
        self.columns = x.numel()
        self.dtype = dtype
        self.device = x.device
        self._keep = keep
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


def zero_matrices(rows: int, inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Jacobians of a constant."""
    return [
        torch.zeros(rows, x.numel(), dtype=dtype, device=x.device)
        for x, dtype in zip(inputs, dtypes, strict=True)
    ]
