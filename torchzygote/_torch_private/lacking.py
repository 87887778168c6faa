"""Functions that PyTorch lacks second or forward derivatives of, by their formulas.

``hardsigmoid``, ``cdist`` and ``pdist`` have no double backward, the last two no forward derivative either;
the backwards of three losses have none (2.13): that of ``mse_loss`` writes into a constant, and crashes
compiled code. What ``torch.nn.functional`` and ``torch.cdist`` call is exchanged, as norms are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .norms import may_be_fused

__all__ = ["LACKING", "enable_lacking", "enable_traced_lacking"]

# Nodes whose backward can't be differentiated.
LACKING = frozenset({"CdistBackward0", "HardsigmoidBackward0", "PdistBackward0"})

_nn: Any = torch._C._nn
_VF: Any = torch._VF
_mse_loss: Any = _nn.mse_loss
_huber_loss: Any = _nn.huber_loss
_soft_margin_loss: Any = _nn.soft_margin_loss
_hardsigmoid: Any = _nn.hardsigmoid
_hardsigmoid_: Any = _nn.hardsigmoid_
_cdist: Any = _VF.cdist
_pdist: Any = torch.pdist
_MEAN, _SUM = 1, 2  # as torch.nn.functional numbers reductions


def _is_ordinary(*tensors: Any) -> bool:
    """Whether the operator would take these; what it refuses is left to it."""
    return all(isinstance(x, Tensor) and x.is_floating_point() and not x.is_nested for x in tensors)


def _as_cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast, which knows the operators by name, hands them on."""
    if torch.is_autocast_enabled(tensors[0].device.type):
        return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors)
    return tensors


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    return losses.mean() if reduction == _MEAN else losses.sum() if reduction == _SUM else losses


def _written_mse_loss(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    if may_be_fused(input, target) or not _is_ordinary(input, target):
        return _mse_loss(input, target, reduction)  # type: ignore[no-any-return]
    input, target = _as_cast(input, target)
    return _reduced((input - target).square(), reduction)


def _written_huber_loss(input: Tensor, target: Tensor, reduction: int = _MEAN, delta: float = 1.0) -> Tensor:
    if may_be_fused(input, target) or not _is_ordinary(input, target) or not delta > 0:
        return _huber_loss(input, target, reduction, delta)  # type: ignore[no-any-return]
    input, target = _as_cast(input, target)
    difference = input - target
    size = difference.abs()
    near, far = 0.5 * difference.square(), delta * (size - 0.5 * delta)
    return _reduced(torch.where(size < delta, near, far), reduction)


def _written_soft_margin_loss(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    if may_be_fused(input, target) or not _is_ordinary(input, target):
        return _soft_margin_loss(input, target, reduction)  # type: ignore[no-any-return]
    input, target = _as_cast(input, target)
    margin = input * -target
    return _reduced(torch.logaddexp(margin, torch.zeros_like(margin)), reduction)


def _written_hardsigmoid(input: Tensor) -> Tensor:
    if may_be_fused(input) or not _is_ordinary(input):
        return _hardsigmoid(input)  # type: ignore[no-any-return]
    ends = (input.detach() >= 3).to(input.dtype)
    return torch.where(input.detach().abs() < 3, input / 6 + 0.5, ends)


def _written_hardsigmoid_(input: Tensor) -> Tensor:
    if may_be_fused(input) or not _is_ordinary(input):
        return _hardsigmoid_(input)  # type: ignore[no-any-return]
    return input.copy_(_written_hardsigmoid(input.clone()))


def _sizes(difference: Tensor, p: float) -> Tensor:
    """p-norms along the last axis; the derivatives of one that is zero are zero, as for the operators."""
    if p == 0:
        return (difference.detach() != 0).to(difference.dtype).sum(-1)
    if p == 1:
        return difference.abs().sum(-1)
    if math.isinf(p):
        return difference.abs().amax(-1) if difference.shape[-1] else difference.sum(-1)
    if p == 2:
        total = difference.square().sum(-1)
    else:
        size = difference.abs()
        nothing = size.detach() == 0
        total = torch.where(nothing, 0.0, torch.where(nothing, 1.0, size).pow(p)).sum(-1)
    nothing = total.detach() == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, total).pow(1 / p))


def _written_cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    ordinary = _is_ordinary(x1, x2) and x1.dtype == x2.dtype and min(x1.dim(), x2.dim()) > 1 and p >= 0
    if may_be_fused(x1, x2) or not ordinary or x1.shape[-1] != x2.shape[-1]:
        return _cdist(x1, x2, p, compute_mode)  # type: ignore[no-any-return]
    x1, x2 = _as_cast(x1, x2)
    return _sizes(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _written_pdist(input: Tensor, p: float = 2.0) -> Tensor:
    if may_be_fused(input) or not _is_ordinary(input) or input.dim() != 2 or not p >= 0:
        return _pdist(input, p)  # type: ignore[no-any-return]
    (input,) = _as_cast(input)
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _sizes(input.index_select(0, first) - input.index_select(0, second), p)


_Exchange = tuple[Any, str, Any, Any]
_EXCHANGED: tuple[_Exchange, ...] = (
    (_nn, "mse_loss", _mse_loss, _written_mse_loss),
    (_nn, "huber_loss", _huber_loss, _written_huber_loss),
    (_nn, "soft_margin_loss", _soft_margin_loss, _written_soft_margin_loss),
    (_nn, "hardsigmoid", _hardsigmoid, _written_hardsigmoid),
    (_nn, "hardsigmoid_", _hardsigmoid_, _written_hardsigmoid_),
    (_VF, "cdist", _cdist, _written_cdist),
    (torch, "pdist", _pdist, _written_pdist),
    (F, "pdist", _pdist, _written_pdist),
)


def _exchange(table: tuple[_Exchange, ...], back: bool) -> None:
    """What others have put in these places stays."""
    for holder, name, fused, written in table:
        before, after = (written, fused) if back else (fused, written)
        if getattr(holder, name) is before:
            setattr(holder, name, after)


def enable_lacking(enabled: bool) -> None:
    """Whether these functions are PyTorch's own."""
    _exchange(_EXCHANGED, enabled)


# While a function is traced: as for norms, those that the tracer takes for operators.
_F_mse_loss: Any = F.mse_loss
_F_huber_loss: Any = F.huber_loss
_F_soft_margin_loss: Any = F.soft_margin_loss
_F_hardsigmoid: Any = F.hardsigmoid
_torch_cdist: Any = torch.cdist
_REDUCTIONS = {"none": 0, "mean": _MEAN, "sum": _SUM}


def _traced_mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    if weight is not None or size_average is not None or reduce is not None or reduction not in _REDUCTIONS:
        return _F_mse_loss(input, target, size_average, reduce, reduction, weight)  # type: ignore[no-any-return]
    shape = torch.broadcast_shapes(input.shape, target.shape)  # type: ignore[no-untyped-call]
    return _written_mse_loss(input.expand(shape), target.expand(shape), _REDUCTIONS[reduction])


def _traced_huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    if weight is not None or reduction not in _REDUCTIONS:
        return _F_huber_loss(input, target, reduction, delta, weight)  # type: ignore[no-any-return]
    shape = torch.broadcast_shapes(input.shape, target.shape)  # type: ignore[no-untyped-call]
    return _written_huber_loss(input.expand(shape), target.expand(shape), _REDUCTIONS[reduction], delta)


def _traced_soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if size_average is not None or reduce is not None or reduction not in _REDUCTIONS:
        return _F_soft_margin_loss(input, target, size_average, reduce, reduction)  # type: ignore[no-any-return]
    return _written_soft_margin_loss(input, target, _REDUCTIONS[reduction])


def _traced_hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return _written_hardsigmoid_(input) if inplace else _written_hardsigmoid(input)


def _traced_cdist(
    x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "use_mm_for_euclid_dist_if_necessary"
) -> Tensor:
    return _written_cdist(x1, x2, p)


_TRACED: tuple[_Exchange, ...] = (
    (F, "mse_loss", _F_mse_loss, _traced_mse_loss),
    (F, "huber_loss", _F_huber_loss, _traced_huber_loss),
    (F, "soft_margin_loss", _F_soft_margin_loss, _traced_soft_margin_loss),
    (F, "hardsigmoid", _F_hardsigmoid, _traced_hardsigmoid),
    (torch, "cdist", _torch_cdist, _traced_cdist),
    (torch, "pdist", _pdist, _written_pdist),
    (F, "pdist", _pdist, _written_pdist),
)


def enable_traced_lacking(enabled: bool) -> None:
    """The same, while ``torch.compile`` traces; it undoes that as the block ends."""
    _exchange(_TRACED, enabled)
