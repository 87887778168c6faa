"""How the elements of a tensor lie in memory: whether they share it, and copies that don't.

Knows strides, and nothing of what tensors are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["non_overlapping", "separate"]


def separate(x: Tensor) -> Tensor:
    """``x``, cloned where forward mode needs that: it refuses expanded, overlapping and negated tensors."""
    if not torch.compiler.is_compiling() and x.is_neg():  # by a bit, as the imaginary part of a conjugate is
        return x.resolve_neg()
    if x.layout is torch.strided and x.numel() > 1 and not x.is_contiguous() and not non_overlapping(x):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def non_overlapping(x: Tensor) -> bool:
    """Whether no two elements of ``x`` share memory."""
    strides = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in strides:
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True
