"""What a new Buffer looks like: its shape, and the tensor whose dtype and device it takes.

Knows nothing of what will be written.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import is_number, number_to_tensor, numpy_to_tensor, type_name

__all__ = ["model_of", "shape_of"]


def shape_of(default: Sequence[int], shape: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape asked for: one int per axis, or one tuple of them; nothing is the default."""
    if not shape:
        return tuple(default)
    if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
        shape = tuple(shape[0])
    if torch.compiler.is_compiling():
        return shape
    sizes = []
    for size in shape:
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"shape: expected ints, got {size!r} in {shape!r}")
        sizes.append(operator.index(size))
        if sizes[-1] < 0:
            raise ValueError(f"shape: expected nonnegative sizes, got {sizes[-1]} in {shape!r}")
    return tuple(sizes)


def model_of(like: Any) -> Tensor:
    """``like`` as a tensor."""
    if isinstance(like, Tensor):
        return like
    if isinstance(like, np.ndarray):
        return numpy_to_tensor(like)
    if is_number(like):
        return number_to_tensor(like)
    advice = ""
    if isinstance(like, (list, tuple)):
        advice = "; start with Buffer() and append"
        if like and all(type(size) is int for size in like):
            advice = f"; for this shape, write Buffer(torch.zeros({', '.join(map(str, like))}))"
    raise TypeError(f"like: expected a tensor or an array, got {type_name(like)}{advice}")
