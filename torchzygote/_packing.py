"""Tensors of any shapes, dtypes and devices as one flat real vector, and back.

Knows nothing of what the vector is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._dtypes import promoted, real_dtype

__all__ = ["Packing", "common_device"]


def common_device(tensors: Sequence[Tensor]) -> torch.device:
    """Where everything is packed: the first device that isn't the CPU, if there is one."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return tensor.device
    return tensors[0].device


class Packing:
    """How tensors like these are packed into one vector on ``device``."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self.forms = [(tensor.shape, tensor.dtype) for tensor in tensors]
        self.dtype = real_dtype(promoted([tensor.dtype for tensor in tensors]))
        self.device = device
        self.devices = [tensor.device for tensor in tensors]
        self.sizes = [math.prod(shape) * (2 if dtype.is_complex else 1) for shape, dtype in self.forms]

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """The vector of these."""
        # Not -1: in an empty batch it could be anything.
        parts = [_flat(_as_real(tensor)).to(self.device, self.dtype) for tensor in tensors]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack(self, flat: Tensor) -> list[Tensor]:
        """The tensors; views."""
        return self._shaped(torch.split(flat, self.sizes))

    def unpack_writable(self, flat: Tensor) -> list[Tensor]:
        """The tensors, into which may be written: PyTorch refuses that for what ``split`` gives."""
        if len(self.sizes) == 1:
            return self._shaped([flat])
        return self._shaped([part.clone() for part in torch.split(flat, self.sizes)])

    def _shaped(self, parts: Sequence[Tensor]) -> list[Tensor]:
        tensors = []
        for part, (shape, dtype), device in zip(parts, self.forms, self.devices, strict=True):
            if dtype.is_complex:
                pairs = part.to(device, real_dtype(dtype)).reshape(*shape, 2)
                tensors.append(torch.complex(pairs[..., 0], pairs[..., 1]))
            else:
                tensors.append(part.to(device, dtype).reshape(shape))
        return tensors


def _as_real(x: Tensor) -> Tensor:
    # No view_as_real: the way back would be view_as_complex, which refuses odd offsets into the flat vector.
    return torch.stack([x.real, x.imag], dim=-1) if x.is_complex() else x


def _flat(x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape))
