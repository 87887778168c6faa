"""A log of whole rows: what a Buffer is as long as it is written row by row.

The cheapest form: one Python reference per write, one ``torch.stack`` at the end. Knows nothing of parts of
rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .values import recorded

__all__ = ["FOLD", "Block", "RowLog"]

FOLD = 256  # rows that are stacked together while they are still in the caches
_AHEAD = 1024
_SMALL_ROW = 1024  # elements; a larger row costs more to copy twice than stacking early saves


class Block:
    """Rows ``start`` to ``start + FOLD``, stacked."""

    __slots__ = ("start", "tensor")

    def __init__(self, start: int, tensor: Tensor) -> None:
        self.start = start
        self.tensor = tensor


class RowLog:
    """``rows[i]``: the value of row ``i``, the block it is in, or ``None`` where only ``memory`` has it."""

    __slots__ = ("device", "dtype", "folding", "memory", "row_shape", "rows", "shape")

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, memory: Tensor | None
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.memory = memory
        self.row_shape = shape[1:]
        self.rows: list[Any] = [None] * shape[0]
        self.folding = math.prod(self.row_shape) <= _SMALL_ROW

    def fold(self, end: int) -> None:
        """Stack the rows before ``end``, if all of them have been written."""
        start = end - FOLD
        part = self.rows[start:end]
        if not self.folding or set(map(type, part)) != {Tensor}:
            return
        with recorded():
            block = Block(start, torch.stack(part))
        self.rows[start:end] = [block] * FOLD

    def unfold(self, block: Block) -> None:
        """Give the rows of a block back, where they are still current."""
        with recorded():
            parts = block.tensor.unbind()
        for i, part in enumerate(parts, block.start):
            if self.rows[i] is block:
                self.rows[i] = part

    def in_range(self, row: int) -> int:
        """``row`` counted from the front; ``IndexError`` if there is none."""
        count = self.shape[0]
        if not -count <= row < count:
            raise IndexError(f"index {row} is out of bounds for axis 0 with size {count}")
        return row % count

    def write(self, i: int, value: Tensor) -> None:
        """Row ``i``, nonnegative and in range, becomes ``value``, which has its shape."""
        self.rows[i] = value

    def read(self, i: int) -> Tensor:
        """A fresh copy of row ``i``."""
        row = self.rows[i]
        if row is None:
            return self._unwritten(i, i + 1)[0].clone()
        if isinstance(row, Block):
            self.folding = False  # who reads what was written some rows ago is likely to go on
            self.unfold(row)
            row = self.rows[i]
        found: Tensor = row
        return found.clone()

    def read_rows(self, which: slice) -> Tensor:
        """A fresh tensor of some rows."""
        start, stop, step = which.indices(self.shape[0])
        if step != 1:
            chosen = [self.read(i) for i in range(start, stop, step)]
            return torch.stack(chosen) if chosen else self._zeros(0)
        return self._assemble(start, max(start, stop))

    def assemble(self) -> Tensor:
        """The whole, fresh."""
        return self._assemble(0, self.shape[0])

    def runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ends of the longest runs that are one block, unwritten, or single rows; broken blocks unfold."""
        rows = self.rows
        found: list[tuple[int, int]] = []
        lo = start
        while lo < stop:
            row = rows[lo]
            hi = lo + 1
            if isinstance(row, Block):
                while hi < stop and rows[hi] is row:
                    hi += 1
                if hi - lo < FOLD:
                    self.unfold(row)
                    continue
            elif row is None:
                ahead = 8  # twice as far each time: many at once take a quarter of one by one
                while hi < stop and set(map(type, rows[hi : hi + ahead])) == {type(None)}:
                    hi += ahead
                    ahead = min(2 * ahead, _AHEAD)
                while hi < stop and rows[hi] is None:
                    hi += 1
                hi = min(hi, stop)
            else:
                while hi < stop and isinstance(rows[hi], Tensor):
                    hi += 1
            found.append((lo, hi))
            lo = hi
        return found

    def piece(self, lo: int, hi: int) -> Tensor:
        """One run as a tensor of rows."""
        row = self.rows[lo]
        if row is None:
            return self._unwritten(lo, hi)
        return row.tensor if isinstance(row, Block) else torch.stack(self.rows[lo:hi])

    def _assemble(self, start: int, stop: int) -> Tensor:
        runs = self.runs(start, stop)
        if len(runs) == 1:
            only = self.piece(*runs[0])
            return only if type(self.rows[start]) is Tensor else only.clone()
        if len(runs) > (stop - start) // 4 + 2:
            return torch.stack(self._single_rows(start, stop))  # many short runs
        return torch.cat([self.piece(lo, hi) for lo, hi in runs]) if runs else self._zeros(0)

    def _single_rows(self, start: int, stop: int) -> list[Tensor]:
        unwritten = self._unwritten(start, stop).unbind()
        for row in self.rows[start:stop]:
            if isinstance(row, Block):
                self.unfold(row)
        return [
            other if row is None else row for row, other in zip(self.rows[start:stop], unwritten, strict=True)
        ]

    def _unwritten(self, lo: int, hi: int) -> Tensor:
        return self._zeros(hi - lo) if self.memory is None else self.memory[lo:hi]

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros((count, *self.row_shape), dtype=self.dtype, device=self.device)
