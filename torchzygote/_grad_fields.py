"""Values on their way into ``p.grad``: what fits a parameter, and sums with what is there already.

Knows nothing of mappings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._entries import as_number
from ._metadata import Metadata, by_kind, metadata_of
from ._multi_tensor import apply, describe, in_groups_, plain, recorded
from ._operators import OPERATORS
from ._overlap import known_apart, writable

__all__ = ["accumulated", "factor_of", "fitting"]

_LARGEST_HALF = torch.finfo(torch.float16).max


def fitting(
    caller: str, keys: dict[int, Tensor], present: dict[int, Tensor], label: Callable[[int], str]
) -> tuple[list[Tensor], list[Tensor], Metadata | None]:
    """The parameters that have a value, the values in their dtypes, and what is known of the values."""
    params = list(keys.values() if len(present) == len(keys) else map(keys.__getitem__, present))
    values = list(present.values())
    theirs, ours = metadata_of(params), metadata_of(values)
    if theirs is not None and ours is not None and theirs.fits(ours):
        return params, values, ours
    for key, value in present.items():
        p = keys[key]
        if value.shape != p.shape or value.device != p.device:
            raise ValueError(
                f"{caller}: expected a value of the shape and device of {label(key)}, "
                f"{tuple(p.shape)} on {p.device}, got {tuple(value.shape)} on {value.device}"
            )
        if value.layout not in (torch.strided, torch.sparse_coo, p.layout):
            raise ValueError(
                f"{caller}: expected a dense value or one in COO form for {label(key)}, got layout "
                f"{value.layout}; use to_dense()"
            )
        if value.is_complex() and not p.is_complex():
            raise TypeError(
                f"{caller}: expected a real value for {label(key)}, got {describe(value)}; take "
                "its real part, as in g.map(torch.real)"
            )
    values = [v if v.dtype is p.dtype else v.to(p.dtype) for p, v in zip(params, values, strict=True)]
    return params, values, None


def factor_of(weight: Any, params: list[Tensor]) -> Any:
    """``weight`` as a factor of gradients of these parameters."""
    weight = as_number(weight)
    fits = isinstance(weight, (int, float, complex)) and not isinstance(weight, bool)
    if not fits and not (isinstance(weight, Tensor) and weight.dim() == 0):
        raise TypeError(f"weight: expected a number or a 0-dim tensor, got {weight!r}")
    is_complex = weight.is_complex() if isinstance(weight, Tensor) else isinstance(weight, complex)
    if is_complex and not all(p.is_complex() for p in params):
        raise TypeError(f"weight: expected a real number, as there are real parameters, got {weight!r}")
    return weight


def accumulated(grads: list[Any], values: list[Tensor], factor: Any, known: Metadata | None) -> list[Tensor]:
    """``grad + factor * value`` for each, where there is a ``grad``; ``known`` are the values' metadata."""
    first = [i for i, grad in enumerate(grads) if grad is None]
    if not first:
        return _added_into(grads, values, factor, values, known)
    more = [i for i, grad in enumerate(grads) if grad is not None]
    out = list(grads)
    for i, total in zip(first, apply(OPERATORS["*"], [values[i] for i in first], factor), strict=True):
        out[i] = total
    sums = _added_into([grads[i] for i in more], [values[i] for i in more], factor, values)
    for i, total in zip(more, sums, strict=True):
        out[i] = total
    return out


def _is_too_large(factor: Any, values: list[Tensor]) -> bool:
    """Whether PyTorch refuses it as a factor of a sum of one of these dtypes."""
    if isinstance(factor, Tensor) or abs(factor) <= _LARGEST_HALF:
        return False
    return any(x.is_floating_point() and abs(factor) > torch.finfo(x.dtype).max for x in values)


def _added_into(
    grads: list[Any], values: list[Tensor], factor: Any, mine: list[Tensor], known: Metadata | None = None
) -> list[Tensor]:
    """``grad + factor * value`` for each, in place where nobody is surprised by that.

    ``mine`` stay as they are; where ``known``, the metadata of all of them, is given, they are the values.
    """

    def add_(xs: list[Tensor], ys: Any) -> None:
        torch._foreach_add_(xs, ys, alpha=factor)

    whole = isinstance(factor, Tensor) or _is_too_large(factor, values)
    theirs = None if known is None or whole else plain(grads, 1)
    if (
        known is not None
        and theirs is not None
        and (known.common and not known.recorded() and theirs[0].fits(known))
        and known_apart(grads, theirs[0], values, known)
    ):
        in_groups_(add_, theirs[0].groups, grads, values)
        return grads
    if recorded([*grads, *values]) or whole:
        values, factor = apply(OPERATORS["*"], values, factor), 1
    if recorded([*grads, *values]):
        return apply(OPERATORS["+"], grads, values)
    inside, apart = writable(grads, mine)
    out = list(grads)
    scaled = apply(OPERATORS["*"], [values[i] for i in apart], factor)
    for i, total in zip(apart, apply(OPERATORS["+"], [grads[i] for i in apart], scaled), strict=True):
        out[i] = total
    group = [grads[i] for i in inside]
    in_groups_(add_, by_kind(group), group, [values[i] for i in inside])
    return out
