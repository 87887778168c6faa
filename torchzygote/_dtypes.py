"""The dtype that several tensors share, and the real one that belongs to a complex one.

As ``torch.compile`` can trace it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["promoted", "real_dtype"]

# Not by to_real(), which Dynamo can't trace.
_REAL = {kind: kind.to_real() for kind in (torch.complex32, torch.complex64, torch.complex128)}


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of real and imaginary part; a real one is its own."""
    return _REAL.get(dtype, dtype)


def promoted(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """What all of them promote to; there is at least one."""
    first, *others = dtypes
    for dtype in others:
        first = torch.promote_types(first, dtype)
    return first
