"""Norms and clipping over many tensors.

The same multi-tensor calls in the same order as ``torch.nn.utils.clip_grad_norm_`` and ``clip_grad_value_``,
so that the results agree bit for bit; half precision is normed in float32. Knows nothing of keys.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ._call_options import check_flags
from ._metadata import Metadata, by_kind, metadata_of
from ._multi_tensor import apply, apply_, describe, plain, recorded
from ._operators import OPERATORS, Operator
from ._torch_private import group_by_device_and_dtype

__all__ = ["clip_norm", "clip_value", "finite", "total_norm", "value_bounds"]

_dtype: Callable[[Any], torch.dtype] = attrgetter("dtype")

_HALF = (torch.float16, torch.bfloat16, torch.complex32)


# -- norms ---------------------------------------------------------------------------------------------------


def total_norm(xs: list[Tensor], norm_type: float) -> Tensor:
    """The norm of all elements together, on the device of the first tensor, without host synchronization."""
    return _total_norm(xs, norm_type, False, None)


def _total_norm(
    xs: list[Tensor], norm_type: float, error_if_nonfinite: bool, known: Metadata | None
) -> Tensor:
    norm_type = _order(norm_type)
    found = plain(xs, 1, known)
    known = None if found is None or (norm_type == 0 and found[0].has_complex) else found[0]
    if known is None:
        xs = [_elements(x, norm_type) for x in xs]
    if math.isinf(norm_type) and (known is None or not all(known.numels)):
        xs, known = [x for x in xs if x.numel() > 0], None  # an empty tensor has no largest element
    if not xs:
        return torch.tensor(0.0)
    norms = _norms(xs, norm_type, known)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"expected values whose norm (norm_type={norm_type}) is finite, got {total.item()}; nonfinite() "
            "says which aren't, and error_if_nonfinite=False goes on all the same"
        )
    return total


def _order(norm_type: Any) -> float:
    try:
        return float(norm_type)
    except (TypeError, ValueError):
        raise TypeError(f"norm_type: expected a number or 'inf', got {norm_type!r}") from None


def _elements(x: Tensor, norm_type: float = 2.0) -> Tensor:
    """What a norm of ``x`` is taken over: of a sparse tensor the elements it holds, where that is all."""
    if norm_type == 0 and x.is_complex():
        return x.to_dense().abs()  # PyTorch counts by a cast that drops the imaginary part
    if x.layout is torch.strided:
        return x
    if x.layout is torch.sparse_coo and norm_type >= 0:
        return x.coalesce().values()
    return x.to_dense()


def _norms(xs: list[Tensor], norm_type: float, known: Metadata | None) -> list[Tensor]:
    """The norm of each, on the device of the first; not always in their order."""
    device = xs[0].device
    if known is None and recorded(xs):
        return [torch.linalg.vector_norm(x, norm_type, dtype=_wide(x)).to(device) for x in xs]
    if len(by_kind(xs) if known is None else known.groups) == 1:
        return list(torch._foreach_norm(xs, norm_type, dtype=_wide(xs[0])))
    norms: list[Tensor] = []
    for group in group_by_device_and_dtype(xs):
        norms.extend(torch._foreach_norm(group, norm_type, dtype=_wide(group[0])))
    return [norm.to(device) for norm in norms]


def _wide(x: Tensor) -> torch.dtype | None:
    if x.dtype is torch.complex32:
        return torch.complex64
    return torch.float32 if x.dtype in _HALF else None


def finite(xs: list[Tensor]) -> list[bool]:
    """Whether all elements of each tensor are finite; one host synchronization for all."""
    found = [True] * len(xs)
    known = plain(xs, 1)
    if known is not None and all(known[0].numels) and not known[0].has_complex:
        where, filled = list(range(len(xs))), xs
    else:
        real = {i: _elements(x.detach()) for i, x in enumerate(xs) if x.is_floating_point() or x.is_complex()}
        where = [i for i, x in real.items() if x.numel() > 0]
        filled = [real[i] for i in where]
        filled = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in filled]
    groups = by_kind(filled)
    # the largest modulus is finite exactly if all are
    largest = [torch.stack(torch._foreach_norm([filled[i] for i in group], math.inf)) for group in groups]
    if largest:
        device = largest[0].device
        ok = torch.cat([torch.isfinite(norms).to(device) for norms in largest]).tolist()
        for i, is_finite in zip((i for group in groups for i in group), ok, strict=True):
            found[where[i]] = is_finite
    return found


# -- clipping ------------------------------------------------------------------------------------------------


def _called(name: str, in_place: bool) -> str:
    return f"{name}_" if in_place else name


def clip_norm(
    xs: list[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool, in_place: bool
) -> tuple[list[Tensor], Tensor]:
    """The tensors scaled down to a total norm of at most ``max_norm``, and the norm they had."""
    caller = _called("clip_norm", in_place)
    check_flags(error_if_nonfinite=error_if_nonfinite)
    max_norm = _bound("max_norm", max_norm)
    if not max_norm >= 0:
        raise ValueError(f"{caller}: expected max_norm to be at least 0, got {max_norm}")
    known = metadata_of(xs)
    total = _total_norm(xs, norm_type, error_if_nonfinite, known)
    # clamped instead of compared: a comparison would wait for the device
    coefficient = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    if in_place:
        return apply_(OPERATORS["*"], xs, coefficient, known=known), total
    scaled = apply(OPERATORS["*"], xs, coefficient)
    # 0-dim values would take on the wider dtype of a norm over several
    return [y.to(x.dtype) if _narrowed(x, y) else y for x, y in zip(xs, scaled, strict=True)], total


def _narrowed(x: Tensor, y: Tensor) -> bool:
    return x.dtype is not y.dtype and (x.is_floating_point() or x.is_complex())


def clip_value(xs: list[Tensor], bounds: tuple[float, float], in_place: bool) -> list[Tensor]:
    """The tensors with each element moved into the bounds."""
    caller = _called("clip_value", in_place)
    for dtype in set(map(_dtype, xs)):
        if dtype.is_complex:
            first = next(x for x in xs if x.dtype is dtype)
            raise TypeError(
                f"{caller}: expected real values, got {describe(first)}; complex numbers have no order, "
                f"but {_called('clip_norm', in_place)} scales them"
            )
        if in_place and not dtype.is_floating_point:
            torch.ones(1, dtype=dtype, device="cpu").clamp_(*bounds)  # raises before anything is written
    return (apply_ if in_place else apply)(_CLAMP, xs, bounds)


def value_bounds(lo: float, hi: float | None, in_place: bool) -> tuple[float, float]:
    """The two bounds; one alone stands for both signs."""
    upper = _bound("lo", lo) if hi is None else _bound("hi", hi)
    lower = -upper if hi is None else _bound("lo", lo)
    if not lower <= upper:
        raise ValueError(
            f"{_called('clip_value', in_place)}: expected lo <= hi, or one bound of at least 0, got lo={lo} "
            f"and hi={hi}"
        )
    return lower, upper


def _bound(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    if not isinstance(value, str):
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            return float(value)
    raise TypeError(f"{name}: expected a number, got {value!r}")


def _clamp(xs: list[Tensor], bounds: Any) -> Sequence[Tensor]:
    ys = torch._foreach_clamp_min(xs, bounds[0])
    return torch._foreach_clamp_max(ys, bounds[1])


def _clamp_(xs: list[Tensor], bounds: Any) -> None:
    torch._foreach_clamp_min_(xs, bounds[0])
    torch._foreach_clamp_max_(xs, bounds[1])


_CLAMP = Operator("clip", lambda x, bounds: torch.clamp(x, bounds[0], bounds[1]), _clamp, _clamp_)
