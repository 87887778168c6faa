"""Layer, batch and instance norm by their formulas, in place of PyTorch's operators.

The double backward of these operators takes mean and deviation, which they saved, for constants: what is
differentiated a third time, or by reverse mode after forward mode, is wrong (2.13). There is no switch, so
that the functions which ``torch.nn.functional`` calls are exchanged. Second derivatives that nobody
differentiates are right, and by the operators faster.

Group norm is right, but for input in channels-last memory: its backward ends the process where the input's
own gradient isn't asked for, and its forward derivative raises (2.13). It is given another layout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .exchanges import Exchange, known_to_torchscript
from .forward import has_tangent, in_forward_ad
from .levels import in_functorch, in_functorch_derivative, in_functorch_forward
from .wants import norms_are_wanted, runs_fused_here, under_hooks
from .wrappers import layers

__all__ = ["NORMS", "TRACED_NORMS", "may_be_fused", "may_be_pushed"]

_layer_norm: Any = torch.layer_norm
_batch_norm: Any = torch.batch_norm
_instance_norm: Any = torch.instance_norm
_group_norm: Any = torch.group_norm
_HALVES = (torch.float16, torch.bfloat16)


def may_be_fused(*tensors: Tensor | None) -> bool:
    """Whether nobody here wants the formula: what comes of these is differentiated once, in reverse mode."""
    if torch.compiler.is_compiling():
        return False
    if under_hooks() or runs_fused_here():  # as without the derivatives of other threads
        return runs_fused_here()
    return not (in_functorch_derivative() or norms_are_wanted() or may_be_pushed(*tensors))


def may_be_pushed(*tensors: Any) -> bool:
    """Whether forward mode may differentiate these: it may run for another thread, but no tangent does."""
    return in_forward_ad() and (in_functorch_forward() or any(map(_may_be_dual, tensors)))


def _may_be_dual(x: Any) -> bool:
    if not isinstance(x, Tensor):
        return False
    if not in_functorch():
        return has_tangent(x)
    # Under vmap a tangent can be asked for below its level alone.
    *_, (_, inner) = layers(x)
    return isinstance(inner, FakeTensor) or has_tangent(inner)


def _standardized(
    x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``weight`` and ``bias`` in a shape that broadcasts; halves are computed in float32, as PyTorch does."""
    wide = x.float() if x.dtype in _HALVES else x
    centered = wide - wide.mean(dims, keepdim=True)
    y: Tensor = centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def _is_ordinary(x: Any, weight: Any, bias: Any) -> bool:
    """Whether the operator would take these; what it refuses, or knows how to take apart, is left to it."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or x.layout != torch.strided:
        return False
    allowed = (x.dtype, torch.float32) if x.dtype in _HALVES else (x.dtype,)
    return all(one is None or (isinstance(one, Tensor) and one.dtype in allowed) for one in (weight, bias))


def _written_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    cudnn_enable: bool = True,
) -> Tensor:
    if may_be_fused(input, weight, bias):
        return _layer_norm(input, normalized_shape, weight, bias, eps, cudnn_enable)  # type: ignore[no-any-return]
    shape = tuple(normalized_shape)
    fits = 0 < len(shape) <= getattr(input, "ndim", 0) and tuple(input.shape[-len(shape) :]) == shape
    parts = [one for one in (weight, bias) if one is not None]
    if not fits or any(tuple(one.shape) != shape for one in parts) or not _is_ordinary(input, weight, bias):
        return _layer_norm(input, normalized_shape, weight, bias, eps, cudnn_enable)  # type: ignore[no-any-return]
    if input.dtype in _HALVES and torch.is_autocast_enabled(input.device.type):
        # whether autocast takes it to float32 depends on the device
        input = input.to(_layer_norm(input.new_zeros(shape), shape).dtype)
    return _standardized(input, tuple(range(-len(shape), 0)), weight, bias, eps)


def _by_channel(
    operator: Callable[..., Any], x: Tensor, dims: tuple[int, ...], args: tuple[Any, ...]
) -> Tensor | None:
    """A norm with statistics of its own; the operator itself moves the running ones. ``None``: is for it."""
    weight, bias, running_mean, running_var, _, _, eps, _ = args
    if not _is_ordinary(x, weight, bias) or x.dim() < 2 or x.numel() == 0:
        return None
    if any(one is not None and one.shape != (x.shape[1],) for one in (weight, bias)):
        return None
    if running_mean is not None or running_var is not None:
        with torch.no_grad():
            operator(x.detach(), *args)
    shape = (1, x.shape[1]) + (1,) * (x.dim() - 2)
    weight, bias = (None if one is None else one.view(shape) for one in (weight, bias))
    return _standardized(x, dims, weight, bias, eps)


def _written_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    args = (weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
    found = None
    if training and not may_be_fused(input, weight, bias):
        dims = tuple(axis for axis in range(input.dim()) if axis != 1)
        found = _by_channel(_batch_norm, input, dims, args)
    return _batch_norm(input, *args) if found is None else found


def _written_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    args = (weight, bias, running_mean, running_var, use_input_stats, momentum, eps, cudnn_enabled)
    found = None
    if use_input_stats and input.dim() > 2 and not may_be_fused(input, weight, bias):
        found = _by_channel(_instance_norm, input, tuple(range(2, input.dim())), args)
    return _instance_norm(input, *args) if found is None else found


def _is_channels_last(x: Any) -> bool:
    """Whether channels lie side by side, in a part of an image, too; vmap can't be asked for more."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_nested or x.dim() not in (4, 5):
        return False
    return not x.is_contiguous() and x.stride(1) == 1


def _written_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
    cudnn_enabled: bool = True,
) -> Tensor:
    args = (num_groups, weight, bias, eps, cudnn_enabled)
    if torch.compiler.is_compiling() or runs_fused_here() or not _is_channels_last(input):
        return _group_norm(input, *args)  # type: ignore[no-any-return]
    y: Tensor = _group_norm(input.contiguous(), *args)
    # As it came: f may take views of that. Not by its memory_format, which vmap doesn't know.
    return y.movedim(1, -1).contiguous().movedim(-1, 1)


NORMS = (
    Exchange(torch, "layer_norm", _layer_norm, _written_layer_norm),
    Exchange(torch, "batch_norm", _batch_norm, _written_batch_norm),
    Exchange(torch, "instance_norm", _instance_norm, _written_instance_norm),
    Exchange(torch, "group_norm", _group_norm, _written_group_norm),
)
known_to_torchscript(NORMS)


# While a function is traced, those of torch.nn.functional itself are exchanged: the tracer takes them for
# operators, and doesn't look inside.
_F_layer_norm: Any = F.layer_norm
_F_batch_norm: Any = F.batch_norm
_F_instance_norm: Any = F.instance_norm


def _traced_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-05,
) -> Tensor:
    return _written_layer_norm(input, normalized_shape, weight, bias, eps)


def _traced_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-05,
) -> Tensor:
    if training:
        with torch.no_grad():  # refuses what it refuses
            _F_batch_norm(input.detach(), None, None, training=True)
    args = (weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled)
    return _written_batch_norm(input, *args)


def _traced_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-05,
) -> Tensor:
    if use_input_stats:
        with torch.no_grad():
            _F_instance_norm(input.detach())
    args = (weight, bias, running_mean, running_var, use_input_stats, momentum, eps)
    return _written_instance_norm(input, *args, torch.backends.cudnn.enabled)


TRACED_NORMS = (
    *NORMS,
    Exchange(F, "layer_norm", _F_layer_norm, _traced_layer_norm),
    Exchange(F, "batch_norm", _F_batch_norm, _traced_batch_norm),
    Exchange(F, "instance_norm", _F_instance_norm, _traced_instance_norm),
)
