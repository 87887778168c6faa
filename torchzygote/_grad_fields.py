"""Values on their way into ``p.grad``: what fits a parameter, and sums with what is there already.

Knows nothing of mappings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._entries import as_number
from ._metadata import COMMON, Metadata, by_kind, metadata_of
from ._multi_tensor import apply, describe, in_groups_, plain, recorded
from ._operators import OPERATORS
from ._overlap import known_apart, writable

__all__ = ["accumulated", "assign", "factor_of", "fitting", "widened"]

_NONE = frozenset({type(None)})
_LARGEST_HALF = torch.finfo(torch.float16).max


def fitting(
    caller: str, keys: dict[int, Tensor], present: dict[int, Tensor], label: Callable[[int], str]
) -> tuple[list[Tensor], list[Tensor], Metadata | None]:
    """The parameters that have a value, the values in the dtypes of gradients, and what is known of them."""
    params = list(keys.values() if len(present) == len(keys) else map(keys.__getitem__, present))
    values = list(present.values())
    theirs, ours = metadata_of(params), metadata_of(values)
    # Where ``grad_dtype`` is another, `assign` will see: asking each takes a fourteenth of the whole time.
    if (
        theirs is not None
        and ours is not None
        and (theirs.common and theirs.fits(ours))
        and not (theirs.has_complex and any(_grad_dtype(p) is not p.dtype for p in params))
    ):
        return params, values, ours
    values = [_fitted(caller, keys[key], value, label(key)) for key, value in present.items()]
    return params, values, None


def _grad_dtype(p: Tensor) -> torch.dtype | None:
    """The dtype of the gradient; ``None`` for any."""
    return p.grad_dtype if p.is_leaf else p.dtype  # others have none, and raise


def widened(params: list[Tensor], values: list[Tensor], grads: list[Any]) -> list[Tensor]:
    """``values`` in the dtypes of the gradients that there are none of yet, before they are multiplied."""
    dtypes = [None if g is not None else _grad_dtype(p) for p, g in zip(params, grads, strict=True)]
    return [
        v if dtype is None or dtype is v.dtype else v.to(dtype)
        for v, dtype in zip(values, dtypes, strict=True)
    ]


def _fitted(caller: str, p: Tensor, value: Tensor, name: str) -> Tensor:
    """``value`` in the dtype of the gradient of ``p``."""
    if value.shape != p.shape or value.device != p.device:
        raise ValueError(
            f"{caller}: expected a value of the shape and device of {name}, "
            f"{tuple(p.shape)} on {p.device}, got {tuple(value.shape)} on {value.device}"
        )
    if value.layout not in (torch.sparse_coo, p.layout):
        dense = p.layout is torch.strided
        raise ValueError(
            f"{caller}: expected a {'dense value or one' if dense else f'value in layout {p.layout} or'} in "
            f"COO form for {name}, got layout {value.layout}; use "
            + ("to_dense()" if dense else f"to_sparse(layout={p.layout})")
        )
    dtype = _grad_dtype(p)
    if value.is_complex() and not (dtype or p.dtype).is_complex:
        raise TypeError(
            f"{caller}: expected a real value for {name}, got {describe(value)}; take "
            "its real part, as in g.map(torch.real)"
        )
    return value if dtype is None or value.dtype is dtype else value.to(dtype)


def assign(params: list[Tensor], values: list[Tensor]) -> None:
    """Set ``p.grad`` of each, to what :func:`fitting` found to fit."""
    for p, value in zip(params, values, strict=True):
        try:
            p.grad = value
        except RuntimeError:  # of the dtype of ``p``, where ``grad_dtype`` is another
            p.grad = value.to(_grad_dtype(p))


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


def accumulated(
    grads: list[Any],
    values: list[Tensor],
    factor: Any,
    known: Metadata | None,
    label: Callable[[int], str],
    kept: list[Tensor],
) -> list[Tensor]:
    """``grad + factor * value`` for each, where there is a ``grad``; ``known`` are the values' metadata.

    ``kept`` stay as they are: the values as they were given, and gradients that nothing is added to.
    """
    if _NONE.isdisjoint(map(type, grads)):
        return _added_into(grads, values, factor, label, kept, known if len(kept) == len(values) else None)
    first = [i for i, grad in enumerate(grads) if grad is None]
    more = [i for i, grad in enumerate(grads) if grad is not None]
    out = list(grads)
    for i, total in zip(first, apply(OPERATORS["*"], [values[i] for i in first], factor), strict=True):
        out[i] = total.to(values[i].dtype)
    theirs = [grads[i] for i in more], [values[i] for i in more]
    sums = _added_into(*theirs, factor, lambda i: label(more[i]), kept)
    for i, total in zip(more, sums, strict=True):
        out[i] = total
    return out


def _beside(grad: Tensor, value: Tensor, name: str) -> Tensor:
    """``value`` in a dtype in which it can be added to ``grad``, which has its own where any is allowed."""
    if grad.layout is not value.layout and torch.strided not in (grad.layout, value.layout):
        raise ValueError(
            f"accumulate_: expected a value for {name} in the layout of its grad, {grad.layout}, got "
            f"{value.layout}; use to_sparse(layout={grad.layout})"
        )
    if value.dtype is grad.dtype:
        return value
    if not torch.can_cast(value.dtype, grad.dtype):
        raise TypeError(
            f"accumulate_: expected a value of {name} that fits the dtype of its grad, {grad.dtype}, got "
            f"{describe(value)}; set p.grad = None before, or p.grad to a copy in a wider dtype"
        )
    return value.to(torch.promote_types(value.dtype, grad.dtype))


def _is_too_large(factor: Any, values: list[Tensor]) -> bool:
    """Whether PyTorch refuses it as a factor of a sum of one of these dtypes."""
    if isinstance(factor, Tensor) or abs(factor) <= _LARGEST_HALF:
        return False
    return any(x.is_floating_point() and abs(factor) > torch.finfo(x.dtype).max for x in values)


def _added_into(
    grads: list[Any],
    values: list[Tensor],
    factor: Any,
    label: Callable[[int], str],
    kept: list[Tensor],
    known: Metadata | None = None,
) -> list[Tensor]:
    """``grad + factor * value`` for each, in place where nobody is surprised by that.

    ``known``: the metadata of the values, where somebody has asked for them and nothing else is ``kept``.
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
    values = [_beside(g, v, label(i)) for i, (g, v) in enumerate(zip(grads, values, strict=True))]
    if recorded([*grads, *values]) or whole:
        values, factor = apply(OPERATORS["*"], values, factor), 1
    if recorded([*grads, *values]):
        return _in_dtypes_of(grads, apply(OPERATORS["+"], grads, values))
    inside, apart = writable(grads, kept)
    # What PyTorch may refuse to add is refused before anything is written.
    apart += [i for i in inside if grads[i].dtype not in COMMON]
    inside = [i for i in inside if grads[i].dtype in COMMON]
    out = list(grads)
    scaled = apply(OPERATORS["*"], [values[i] for i in apart], factor)
    for i, total in zip(apart, apply(OPERATORS["+"], [grads[i] for i in apart], scaled), strict=True):
        out[i] = total
    group = [grads[i] for i in inside]
    in_groups_(add_, by_kind(group), group, [values[i] for i in inside])
    return _in_dtypes_of(grads, out)


def _in_dtypes_of(grads: list[Tensor], totals: list[Tensor]) -> list[Tensor]:
    return [total.to(grad.dtype) for grad, total in zip(grads, totals, strict=True)]
