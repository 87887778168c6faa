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

# where the operators are that a test calls: those of the library, or the CUDA kernels on the CPU
namespace = "torchzygote"

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
    return getattr(getattr(torch.ops, namespace), name).default


def mirrored(
    widths: Sequence[int], blocks: int, dtype: torch.dtype, layout: str = "contiguous", seed: int = 0
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Products, shifts and scales of symmetric blocks, and the blocks."""
    k = sum(widths)
    half = numbers((blocks, k, k), dtype, seed=seed)
    entries = half + half.mT
    shifts = integers(0, k - 1, blocks, torch.uint8, seed=seed)
    scales = 2.0 ** integers(-2, 2, k * blocks, torch.int64, seed=seed).view(k, blocks).to(dtype)
    products = []
    for c in range(k):
        column = (c + shifts.long()) % k
        product = entries[torch.arange(blocks), :, column] / scales[c].unsqueeze(1)
        products += [laid_out(part.contiguous(), layout) for part in torch.split(product, list(widths), 1)]
    return products, shifts, scales, entries
