"""How the elements of a tensor lie in memory: whether they share it, and copies that don't.

Knows strides, and nothing of what tensors are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch_private import is_wrapped

__all__ = ["copied_in_place", "non_overlapping", "separate"]


def separate(x: Tensor) -> Tensor:
    """``x``, cloned where forward mode needs that: it refuses expanded, overlapping and negated tensors."""
    if not torch.compiler.is_compiling() and x.is_neg():  # by a bit, as the imaginary part of a conjugate is
        return x.resolve_neg()
    if x.layout is torch.strided and x.numel() > 1 and not x.is_contiguous() and not non_overlapping(x):
        return x.clone(memory_format=torch.contiguous_format)
    return x


# Copies of what lies around an element take at most so many times its own memory.
_MOST_AROUND = 8


def copied_in_place(x: Tensor) -> Tensor:
    """A copy that lies in its memory as ``x`` does, which ``as_strided`` asks for; no graph is kept.

    The memory around is copied, too, unless that is far more, or nobody tells of it.
    """
    x = x.detach()
    if x.layout is not torch.strided or (x.is_contiguous() and x.storage_offset() == 0):
        return x.clone()
    if type(x) is not Tensor or is_wrapped(x) or x.numel() == 0 or not non_overlapping(x):
        return x.clone()
    reach = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    end = x.storage_offset() + reach + 1
    if end > _MOST_AROUND * (x.numel() + 64):
        return x.clone()
    around = x.as_strided((end,), (1,), 0).clone()
    return around.as_strided(x.shape, x.stride(), x.storage_offset()).detach()


def non_overlapping(x: Tensor) -> bool:
    """Whether no two elements of ``x`` share memory."""
    strides = sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in strides:
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True
