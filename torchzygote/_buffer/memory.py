"""A Buffer as long as nothing that is written needs a derivative: plain memory, written in place.

Knows nothing of derivatives.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .index import Key, positions
from .values import fit

__all__ = ["MemoryStore"]


class MemoryStore:
    """``tensor``: the memory, ``None`` until it is needed."""

    __slots__ = ("device", "dtype", "shape", "tensor")

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.tensor: Tensor | None = None

    def assemble(self) -> Tensor:
        """The memory itself."""
        if self.tensor is None:
            self.tensor = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.tensor

    def read(self, key: Key) -> Tensor:
        """A fresh tensor of what ``key`` selects."""
        found = self.assemble()[key.given]
        return found.clone() if key.arrays is None else found

    def write(self, key: Key, value: Tensor) -> None:
        """Write ``value``; nothing is written if it doesn't fit."""
        if key.arrays is None:
            part = self.assemble()[key.given]
            part.copy_(fit(value, part.shape, self.shape))
            return
        # Index arrays: PyTorch finds an index out of range halfway, and leaves open which repetition stays.
        where = positions(key, self.shape)
        values = fit(value, where.shape, self.shape).expand(where.shape).reshape(-1)
        flat = where.reshape(-1)
        backwards, last = np.unique(flat[::-1], return_index=True)
        if len(backwards) < len(flat):
            kept = torch.from_numpy(len(flat) - 1 - last).to(self.device)
            flat, values = backwards, values.index_select(0, kept)
        index = torch.from_numpy(np.ascontiguousarray(flat)).to(self.device)
        self.assemble().view(-1).index_put_((index,), values)
