"""Arguments for the native operators: tensors of all dtypes with memory in any order, and a call of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from torchzygote import native

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
INDEX_DTYPES = (torch.int32, torch.int64)
LAYOUTS = ("contiguous", "reversed", "sliced", "offset")

needs_library = pytest.mark.skipif(
    "cpu" not in native.info()["devices"],
    reason=f"the native library is not loaded: {native.info()['missing']}",
)

dtypes = st.sampled_from(DTYPES)
index_dtypes = st.sampled_from(INDEX_DTYPES)
layouts = st.sampled_from(LAYOUTS)
sizes = st.integers(0, 40)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values, in memory of another order."""
    if layout == "reversed":  # dimensions from the last to the first
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if layout == "sliced":  # every other element of something larger
        larger = torch.zeros([2 * n + 1 for n in x.shape], dtype=x.dtype)
        view = larger[tuple(slice(1, None, 2) for _ in x.shape)]
        view.copy_(x)
        return view
    if layout == "offset":
        larger = torch.zeros(x.numel() + 3, dtype=x.dtype)
        view = larger[3:].view(x.shape)
        view.copy_(x)
        return view
    return x.contiguous()


def numbers(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 0) -> Tensor:
    """Random numbers that no dtype rounds to zero."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return laid_out(torch.randn(shape, generator=generator, dtype=wide).to(dtype), layout)


def integers(
    low: int, high: int, size: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0
) -> Tensor:
    """Random integers from ``low`` to ``high``, both included."""
    generator = torch.Generator().manual_seed(seed)
    return laid_out(torch.randint(low, high + 1, (size,), generator=generator).to(dtype), layout)


def raw(name: str) -> Callable[..., Any]:
    """The registered operator, without what is in Python around it."""
    return getattr(torch.ops.torchzygote, name).default


def mirrored(
    widths: Sequence[int],
    pairs: int,
    dtype: torch.dtype,
    index: torch.dtype = torch.int64,
    layout: str = "contiguous",
    seed: int = 0,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """Products, places, scales, rows and columns of a few blocks, whose entries mirror each other."""
    n = sum(widths)
    rows = integers(0, max(n, 1) - 1, pairs, index, seed=seed)
    columns = integers(0, max(n, 1) - 1, pairs, index, seed=seed + 1)
    entries = numbers((n + pairs,), dtype, seed=seed)
    scales = 2.0 ** integers(-2, 2, n + 2 * pairs, torch.int64, seed=seed).to(dtype)
    wanted = torch.cat([entries, entries[n:]])
    order = torch.randperm(n + 2 * pairs, generator=torch.Generator().manual_seed(seed))
    products = torch.empty(n + 2 * pairs, dtype=dtype)
    products[order] = wanted / scales
    cut = (n + 2 * pairs) // 3
    shaped = [products[:cut].view(1, cut, 1), products[cut:].view(-1, 1)]
    return [laid_out(x, layout) for x in shaped], order.to(index), scales, rows, columns
