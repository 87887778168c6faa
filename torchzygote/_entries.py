"""What may be a value of a GradDict, or an operand beside one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arguments import is_number
from ._metadata import TENSOR_TYPES, metadata_of
from ._multi_tensor import describe
from ._torch_private import version_of

__all__ = [
    "TENSOR_TYPES",
    "all_equal",
    "as_number",
    "as_tensor",
    "equal",
    "missing",
    "pairs",
    "scalar",
    "show",
    "version_of_zeros",
    "zeros_of",
]

# Metadata of fewer tensors take longer than to compare them one by one.
_FEW = 8


def zeros_of(key: Tensor) -> Tensor:
    return torch.zeros_like(key, requires_grad=False)


def version_of_zeros(x: Tensor) -> int:
    """What changes as ``x``, which began as zeros, is written into; inference tensors count no writes."""
    return int(torch.count_nonzero(x)) if x.is_inference() else version_of(x)


def show(value: object) -> str:
    return describe(value) if isinstance(value, Tensor) else repr(value)


def all_equal(xs: list[Any], ys: list[Any]) -> bool:
    """Whether each value is :func:`equal` to its fellow."""
    if xs and ys and not equal(xs[0], ys[0]):  # where any differ, these mostly do
        return False
    if len(xs) > _FEW and TENSOR_TYPES.issuperset(map(type, xs)) and TENSOR_TYPES.issuperset(map(type, ys)):
        mine, theirs = metadata_of(xs), metadata_of(ys)
        if (
            mine is not None
            and theirs is not None
            and mine.extents is not None
            and theirs.extents is not None
        ):
            return mine.fits(theirs) and all(map(torch.equal, xs, ys))
    return all(map(equal, xs, ys))


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype is not b.dtype or a.device != b.device:
            return False
        return torch.equal(*(x if x.layout is torch.strided else x.to_dense() for x in (a, b)))
    if isinstance(a, (Tensor, np.ndarray)) or isinstance(b, (Tensor, np.ndarray)):
        return isinstance(a, np.ndarray) and isinstance(b, np.ndarray) and np.array_equal(a, b)
    return bool(a == b)


def as_number(x: Any) -> Any:
    """Python's number for one of NumPy's, or an array without dimensions; anything else as it is."""
    if isinstance(x, np.ndarray) and x.ndim == 0 and is_number(x[()]):
        x = x[()]
    return x.item() if isinstance(x, np.generic) else x


def scalar(x: Any, symbol: str) -> Any:
    """A number or 0-dim tensor; ``NotImplemented`` for what is no operand at all."""
    if isinstance(x, Tensor):
        if x.dim() > 0:
            raise TypeError(
                f"{symbol}: expected a number, a 0-dim tensor or a mapping with the same keys, got a tensor "
                f"{describe(x)}; map applies a function to each value"
            )
        if symbol in ("-", "-=") and x.dtype is torch.bool:
            raise TypeError(
                f"{symbol}: expected a number or a tensor of numbers, got a bool tensor; use ~ or ^ on bools"
            )
        return x
    x = as_number(x)
    if isinstance(x, np.ndarray):
        raise TypeError(
            f"{symbol}: expected a number, a 0-dim tensor or a mapping with the same keys, got an array "
            f"{x.dtype} of shape {x.shape}; map applies a function to each value"
        )
    if type(x) is int and not -(2**63) <= x < 2**64:
        return float(x)  # PyTorch takes none of these, or notices only after others have been written
    return x if is_number(x) else NotImplemented


def as_tensor(value: Any, key: Tensor, symbol: str) -> Tensor:
    """A value, as an operand."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.as_tensor(value, device=key.device)
    if is_number(value):
        real = not isinstance(value, (complex, np.complexfloating))
        dtype = key.dtype if real or key.is_complex() else torch.promote_types(key.dtype, torch.complex32)
        return torch.full((), value, dtype=dtype, device=key.device)
    raise TypeError(
        f"{symbol}: expected values that are tensors, numbers or None, got a {type(value).__name__} for the "
        f"key {describe(key)}"
    )


def pairs(source: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The entries of a mapping, or (key, value) pairs as they are."""
    if isinstance(source, Mapping):
        yield from source.items()
        return
    for pair in source if isinstance(source, Iterable) else [source]:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:  # a tensor of two rows is no pair
            raise TypeError(
                f"{name}: expected a mapping, or (tensor, value) pairs, got "
                + ("" if pair is source else f"a {type(source).__name__} of ")
                + f"a {type(pair).__name__}"
            )
        yield pair[0], pair[1]


def missing(key: object) -> str:
    """Why there is no entry for ``key``."""
    if isinstance(key, Tensor):
        return f"no entry for this tensor ({describe(key)}); keys go by identity, not by value"
    return f"expected a tensor that is a key, got a {type(key).__name__}"
