"""Functions that PyTorch lacks second or forward derivatives of, by their formulas.

``hardsigmoid``, ``cdist`` and ``pdist`` have no double backward, the last two no forward derivative either;
the backwards of three losses have no forward derivative (2.13): that of ``mse_loss`` writes into a constant,
and crashes compiled code. What ``torch.nn.functional`` and ``torch.cdist`` call is exchanged, as norms are.
Euclidean distances by matrix products can be differentiated twice, but with NaN for those of equal points:
there the operator stays, and a mask goes on top of it, from the first run of any second derivative on.

What runs under hooks on saved tensors, as ``torch.utils.checkpoint`` has them, runs again, perhaps when
nothing is exchanged: there the operators stay, and the mask isn't shown to the hooks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .exchanges import Exchange, known_to_torchscript
from .levels import in_functorch
from .norms import may_be_fused, may_be_pushed
from .wants import runs_fused_here, under_hooks

__all__ = ["DISTANCES", "LACKING", "TRACED_LACKING", "WRITTEN"]

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


def _are_pushed(*tensors: Tensor) -> bool:
    """Whether forward mode may be differentiating these, or the tracer, which doesn't tell."""
    return torch.compiler.is_compiling() or may_be_pushed(*tensors)


def _may_stay(*tensors: Tensor) -> bool:
    """Whether an operator without second derivatives does."""
    return not _are_pushed(*tensors) and (under_hooks() or may_be_fused(*tensors))


def _is_ordinary(*tensors: Any) -> bool:
    """Whether the operator would take these; what it refuses is left to it."""
    return all(isinstance(x, Tensor) and x.is_floating_point() and not x.is_nested for x in tensors)


def _as_cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As autocast, which knows the operators by name, hands them on."""
    if torch.is_autocast_enabled(tensors[0].device.type):
        return tuple(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in tensors)
    return tensors


def _marked(x: Tensor) -> Tensor:
    """The same; a number is saved that the operators don't, lest a checkpoint takes one run for the other."""
    return x * torch.ones((), dtype=x.dtype, device=x.device)


def _reduced(losses: Tensor, reduction: int) -> Tensor:
    return losses.mean() if reduction == _MEAN else losses.sum() if reduction == _SUM else losses


def _written_mse_loss(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    if not (_are_pushed(input, target) and _is_ordinary(input, target)):
        return _mse_loss(input, target, reduction)  # type: ignore[no-any-return]
    input, target = _as_cast(input, target)
    return _reduced(_marked(input - target).square(), reduction)


def _written_huber_loss(input: Tensor, target: Tensor, reduction: int = _MEAN, delta: float = 1.0) -> Tensor:
    if not (_are_pushed(input, target) and _is_ordinary(input, target) and delta > 0):
        return _huber_loss(input, target, reduction, delta)  # type: ignore[no-any-return]
    input, target = _as_cast(input, target)
    difference = _marked(input - target)
    size = difference.abs()
    near, far = 0.5 * difference.square(), delta * (size - 0.5 * delta)
    return _reduced(torch.where(size < delta, near, far), reduction)


def _written_soft_margin_loss(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    ordinary = _is_ordinary(input, target) and input.shape == target.shape and not target.requires_grad
    if not (_are_pushed(input, target) and ordinary):
        return _soft_margin_loss(input, target, reduction)  # type: ignore[no-any-return]
    input, target = _as_cast(input, target)
    return _reduced(-F.logsigmoid(_marked(input) * target), reduction)


def _written_hardsigmoid(input: Tensor) -> Tensor:
    if _may_stay(input) or not _is_ordinary(input):
        return _hardsigmoid(input)  # type: ignore[no-any-return]
    ends = (input.detach() > 0).to(input.dtype)
    return torch.where(input.detach().abs() >= 3, ends, input / 6 + 0.5)


def _written_hardsigmoid_(input: Tensor) -> Tensor:
    if _may_stay(input) or not _is_ordinary(input):
        return _hardsigmoid_(input)  # type: ignore[no-any-return]
    return input.copy_(_written_hardsigmoid(input.clone()))


def _sizes(difference: Tensor, p: float) -> Tensor:
    """p-norms along the last axis; the derivatives of one that is zero are zero, as for the operators."""
    if p == 0:
        nowhere = torch.zeros_like(difference, dtype=torch.bool)
        kept = torch.where(nowhere, difference, 0.0)  # zero, with a derivative
        return (kept + (difference.detach() != 0).to(difference.dtype)).sum(-1)
    size = difference.abs()
    if p == 1:
        return size.sum(-1)
    if math.isinf(p):
        if difference.shape[-1] == 0:
            return size.sum(-1)
        largest = size.detach().amax(-1, keepdim=True)
        ties = (size.detach() == largest) & largest.isfinite()  # each has the whole derivative
        return torch.where(ties, size - largest, 0.0).sum(-1) + largest.squeeze(-1)
    if p == 2:
        total = difference.square().sum(-1)
    else:
        nothing = size.detach() == 0
        total = torch.where(nothing, 0.0, torch.where(nothing, 1.0, size).pow(p)).sum(-1)
    nothing = total.detach() == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, total).pow(1 / p))


def _is_by_products(x1: Tensor, x2: Tensor, p: float, compute_mode: int | None) -> bool:
    """Whether the operator multiplies matrices, which it can differentiate twice, in little memory."""
    if p != 2 or 0 in x1.shape or 0 in x2.shape:
        return False
    return compute_mode == 1 or (not compute_mode and max(x1.shape[-2], x2.shape[-2]) > 25)


def _as_saved(x: Tensor) -> Tensor:
    return x


def _flat_at_zero(distances: Tensor) -> Tensor:
    """The same; what PyTorch's backward divides by distances that are zero stays behind the mask.

    Its results have zeros there, but are divided all the same as they are differentiated themselves.
    """
    if torch.compiler.is_compiling() or runs_fused_here():
        return distances
    if not (distances.requires_grad or in_functorch()):
        return distances
    nothing = distances.detach() == 0
    if not under_hooks():
        return distances.masked_fill(nothing, 0.0)
    # A checkpoint isn't told of the mask: perhaps there is none when this runs again.
    with torch.autograd.graph.saved_tensors_hooks(_as_saved, _as_saved):
        return distances.masked_fill(nothing, 0.0)


def _written_cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    ordinary = _is_ordinary(x1, x2) and x1.dtype == x2.dtype and min(x1.dim(), x2.dim()) > 1 and p >= 0
    if (
        _may_stay(x1, x2)
        or not ordinary
        or x1.shape[-1] != x2.shape[-1]
        or (_is_by_products(x1, x2, p, compute_mode) and not _are_pushed(x1, x2))
    ):
        distances: Tensor = _cdist(x1, x2, p, compute_mode)
        return _flat_at_zero(distances) if _is_by_products(x1, x2, p, compute_mode) else distances
    x1, x2 = _as_cast(x1, x2)
    return _sizes(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _written_pdist(input: Tensor, p: float = 2.0) -> Tensor:
    if _may_stay(input) or not _is_ordinary(input) or input.dim() != 2 or not p >= 0:
        return _pdist(input, p)  # type: ignore[no-any-return]
    (input,) = _as_cast(input)
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _sizes(input.index_select(0, first) - input.index_select(0, second), p)


_PDIST = tuple(Exchange(holder, "pdist", _pdist, _written_pdist) for holder in (torch, F))
WRITTEN = (
    Exchange(_nn, "mse_loss", _mse_loss, _written_mse_loss),
    Exchange(_nn, "huber_loss", _huber_loss, _written_huber_loss),
    Exchange(_nn, "soft_margin_loss", _soft_margin_loss, _written_soft_margin_loss),
    Exchange(_nn, "hardsigmoid", _hardsigmoid, _written_hardsigmoid),
    Exchange(_nn, "hardsigmoid_", _hardsigmoid_, _written_hardsigmoid_),
    *_PDIST,
)
# In whose place any second derivative needs a mask.
DISTANCES = (Exchange(_VF, "cdist", _cdist, _written_cdist),)

known_to_torchscript(WRITTEN + DISTANCES)


# While a function is traced: as for norms, those that the tracer takes for operators.
_F_mse_loss: Any = F.mse_loss
_F_huber_loss: Any = F.huber_loss
_F_soft_margin_loss: Any = F.soft_margin_loss
_F_hardsigmoid: Any = F.hardsigmoid
_torch_cdist: Any = torch.cdist
_REDUCTIONS = {"none": 0, "mean": _MEAN, "sum": _SUM}
_MODES = ("use_mm_for_euclid_dist_if_necessary", "use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist")


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


def _traced_cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = _MODES[0]) -> Tensor:
    if compute_mode not in _MODES:
        return _torch_cdist(x1, x2, p, compute_mode)  # type: ignore[no-any-return]
    return _written_cdist(x1, x2, p)


TRACED_LACKING = (
    Exchange(F, "mse_loss", _F_mse_loss, _traced_mse_loss),
    Exchange(F, "huber_loss", _F_huber_loss, _traced_huber_loss),
    Exchange(F, "soft_margin_loss", _F_soft_margin_loss, _traced_soft_margin_loss),
    Exchange(F, "hardsigmoid", _F_hardsigmoid, _traced_hardsigmoid),
    Exchange(torch, "cdist", _torch_cdist, _traced_cdist),
    *_PDIST,
)
