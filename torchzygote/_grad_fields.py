"""Values on their way into ``p.grad``: what fits a parameter, and sums with what is there already.

Knows nothing of mappings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._multi_tensor import apply, by_kind, describe, recorded
from ._operators import OPERATORS
from ._overlap import writable

__all__ = ["added_into", "factor_of", "fitting"]


def fitting(
    caller: str, keys: dict[int, Tensor], present: dict[int, Tensor], label: Callable[[int], str]
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a value, and the values in their dtypes."""
    params, values = [keys[key] for key in present], list(present.values())
    if (
        [v.shape for v in values] == [p.shape for p in params]
        and [v.dtype for v in values] == [p.dtype for p in params]
        and [v.device for v in values] == [p.device for p in params]
    ):
        return params, values
    for key, value in present.items():
        p = keys[key]
        if value.shape != p.shape or value.device != p.device:
            raise ValueError(
                f"{caller}: expected a value of the shape and device of {label(key)}, "
                f"{tuple(p.shape)} on {p.device}, got {tuple(value.shape)} on {value.device}"
            )
        if value.is_complex() and not p.is_complex():
            raise TypeError(
                f"{caller}: expected a real value for {label(key)}, got {describe(value)}; take "
                "its real part, as in g.map(torch.real)"
            )
    return params, [v if v.dtype is p.dtype else v.to(p.dtype) for p, v in zip(params, values, strict=True)]


def factor_of(weight: Any, params: list[Tensor]) -> Any:
    """``weight`` as a factor of gradients of these parameters."""
    if isinstance(weight, np.generic):
        weight = weight.item()
    fits = isinstance(weight, (int, float, complex)) and not isinstance(weight, bool)
    if not fits and not (isinstance(weight, Tensor) and weight.dim() == 0):
        raise TypeError(f"weight: expected a number or a 0-dim tensor, got {weight!r}")
    is_complex = weight.is_complex() if isinstance(weight, Tensor) else isinstance(weight, complex)
    if is_complex and not all(p.is_complex() for p in params):
        raise TypeError(f"weight: expected a real number, as there are real parameters, got {weight!r}")
    return weight


def added_into(grads: list[Any], values: list[Tensor], factor: Any, mine: list[Tensor]) -> list[Tensor]:
    """``grad + factor * value`` for each, in place where nobody is surprised by that."""
    if recorded([*grads, *values]) or isinstance(factor, Tensor):
        values, factor = apply(OPERATORS["*"], values, factor), 1
    if recorded([*grads, *values]):
        return apply(OPERATORS["+"], grads, values)
    inside, apart = writable(grads, mine)
    out = list(grads)
    scaled = apply(OPERATORS["*"], [values[i] for i in apart], factor)
    for i, total in zip(apart, apply(OPERATORS["+"], [grads[i] for i in apart], scaled), strict=True):
        out[i] = total
    for among in by_kind([grads[i] for i in inside]):
        where = [inside[i] for i in among]
        torch._foreach_add_([grads[i] for i in where], [values[i] for i in where], alpha=factor)
    return out
