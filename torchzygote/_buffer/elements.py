"""A log of any writes, and for each element of the Buffer where in the log its value is.

The log is the concatenation of all values written, in the order of writing, and never made as such. ``owner``
holds a position in it for each element: a write changes the positions of what it writes, and a read is one
gather from the few values it touches. Knows nothing of ``vmap`` or modes: values are concatenated, split and
gathered from, and that works in all of them.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .index import Key
from .pieces import Pieces, Positions, cover, gather, groups
from .rows import RowLog
from .values import fit, recorded

__all__ = ["ElementLog"]


class ElementLog:
    """``shape``, ``dtype``, ``device`` of the Buffer; ``owner``: a position in the log for each element."""

    __slots__ = ("_ends", "_ends_array", "_limit", "_nodes", "device", "dtype", "owner", "shape", "total")

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, device: torch.device, memory: Tensor | None
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.total = 0
        self._nodes: list[Any] = []
        self._ends: list[int] = []
        self._ends_array = np.empty(16, dtype=np.int64)
        if memory is None:
            memory = torch.zeros(shape, dtype=dtype, device=device)
        numel = memory.numel()
        self._limit = max(8 * numel, 1 << 14)
        self.owner: Positions = np.arange(numel, dtype=np.int64).reshape(tuple(shape))
        self._append(memory.reshape(-1))

    @staticmethod
    def from_rows(log: RowLog) -> ElementLog:
        """The same contents; called once in a Buffer's life."""
        elements = ElementLog(log.shape, log.dtype, log.device, log.memory)
        for lo, hi in log.runs(0, log.shape[0]):
            row = log.rows[lo]
            if row is None:
                continue
            for value, i, j in (
                [(log.piece(lo, hi), lo, hi)]
                if not isinstance(row, Tensor)
                else [(log.rows[i], i, i + 1) for i in range(lo, hi)]
            ):
                start = elements._append(value)
                part = elements.owner[i:j]
                part[...] = np.arange(start, start + part.size).reshape(part.shape)
        return elements

    def _append(self, value: Tensor) -> int:
        """Put ``value`` at the end of the log; its position there."""
        start = self.total
        count = value.numel()
        if count == 0:
            return start
        self.total = start + count
        n = len(self._nodes)
        if n == len(self._ends_array):
            self._ends_array = np.concatenate([self._ends_array, np.empty(n, dtype=np.int64)])
        self._ends_array[n] = self.total
        self._ends.append(self.total)
        self._nodes.append(value)
        return start

    def write(self, key: Key, value: Tensor) -> None:
        """Write ``value``, a snapshot; its shape must fit the selection."""
        if self.total > self._limit:
            self._drop_overwritten()
        start = self.total
        if value.ndim == 0 and key.arrays is None:
            key.assign(self.owner, start)
        else:
            selected = key.select(self.owner)
            target = np.shape(selected)
            value = fit(value, target, self.shape)
            if 0 in target:
                return
            offsets = np.arange(start, start + value.numel()).reshape(tuple(value.shape))
            if key.arrays is None and target:
                selected[...] = offsets
            else:
                key.assign(self.owner, np.broadcast_to(offsets, target))
        self._append(value)

    def replace(self, whole: Tensor) -> None:
        """``whole``, of the Buffer's shape, is all there is."""
        start = self._append(whole)
        self.owner[...] = np.arange(start, start + self.owner.size).reshape(self.owner.shape)

    def read(self, key: Key) -> Tensor:
        """A fresh tensor of what ``key`` selects."""
        wanted = key.select(self.owner)
        return self._fetch(wanted.ravel(), wanted.shape)

    def assemble(self) -> Tensor:
        """The whole, fresh."""
        return self._fetch(self.owner.reshape(-1), self.owner.shape)

    def _fetch(self, wanted: Positions, shape: tuple[int, ...]) -> Tensor:
        count = wanted.size
        if count == 0:
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        first = int(wanted[0])
        if count == 1:
            return self._one(first, shape)
        ascending = bool((wanted[1:] > wanted[:-1]).all())
        if ascending and int(wanted[-1]) - first == count - 1:
            pieces = self._run(first, first + count, shape)
            found = pieces.joined()
            if len(pieces.tensors) == 1:
                found = found.clone()
        else:
            pieces = self._gathered(wanted)
            index = torch.as_tensor(pieces.locate(wanted), device=self.device)
            found = pieces.joined().index_select(0, index)
        return found if found.shape == shape else found.reshape(shape)

    def _one(self, position: int, shape: tuple[int, ...]) -> Tensor:
        """A fresh tensor of one element."""
        n = bisect_right(self._ends, position)
        node = self._nodes[n]
        if self._ends[n] - self._start_of(n) != 1:
            pieces = self._run(position, position + 1, shape)
            node = pieces.tensors[0]
        found: Tensor = node if node.shape == shape else node.reshape(shape)
        return found.clone()

    def _start_of(self, n: int) -> int:
        return self._ends[n - 1] if n else 0

    def _run(self, lo: int, hi: int, shape: tuple[int, ...]) -> Pieces:
        """What covers positions ``lo`` to ``hi`` of the log, exactly."""
        pieces = Pieces()
        n = bisect_right(self._ends, lo)
        start, end = self._start_of(n), self._ends[n]
        node = self._nodes[n]
        if start == lo and end == hi and isinstance(node, Tensor) and node.shape == shape:
            pieces.add(lo, node)  # what was written, read back
            return pieces
        while start < hi:
            node = self._nodes[n]
            self._nodes[n] = cover(node, end - start, max(lo - start, 0), min(hi, end) - start, start, pieces)
            n += 1
            if n == len(self._nodes):
                break
            start, end = end, self._ends[n]
        return pieces

    def _gathered(self, wanted: Positions) -> Pieces:
        """Parts of the log that hold the positions ``wanted``, and not much else."""
        if self.total <= 8 * wanted.size:
            flags = np.zeros(self.total, dtype=bool)
            flags[wanted] = True
            ascending = np.flatnonzero(flags)
        else:
            ascending = np.unique(wanted)
        ends = self._ends_array[: len(self._nodes)]
        pieces = Pieces()
        for n, part in groups(np.searchsorted(ends, ascending, "right"), ascending):
            start, end = self._start_of(n), self._ends[n]
            self._nodes[n] = gather(self._nodes[n], end - start, part - start, start, pieces)
        return pieces

    def _drop_overwritten(self) -> None:
        """Forget values of which nothing is left, so that the log doesn't grow with what is written over."""
        wanted = self.owner.reshape(-1)
        with recorded():
            pieces = self._gathered(wanted)
        self.owner = pieces.locate(wanted).reshape(self.owner.shape)
        self.total, self._nodes, self._ends = 0, [], []
        for tensor in pieces.tensors:
            self._append(tensor)
        self._limit = max(8 * wanted.size, 1 << 14, 2 * self.total)
