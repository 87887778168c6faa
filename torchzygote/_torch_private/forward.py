"""Forward mode: dual numbers, and where they may be about."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._functorch import eager_transforms as _eager_transforms
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad as _forward_ad

from .levels import in_functorch

__all__ = [
    "forward_mode_enabled",
    "has_tangent",
    "in_forward_ad",
    "in_plain_eager",
    "leave_forward_mode",
    "primal",
    "tangent",
]


def in_forward_ad() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is open: dual tensors may be about."""
    return _forward_ad._current_level >= 0


def leave_forward_mode() -> None:
    """Close all levels, as those of a thread that is no more; ``torch.func`` counts its own in a global."""
    while in_forward_ad():
        _forward_ad.exit_dual_level()  # type: ignore[no-untyped-call]
    _eager_transforms.JVP_NESTING = 0


def in_plain_eager() -> bool:
    """Whether PyTorch runs operations right away and on plain memory: no transform, mode or dual level.

    There are no public questions for these; the answer decides whether a Buffer may write in place.
    """
    return not in_functorch() and torch._C._len_torch_dispatch_stack() == 0 and not in_forward_ad()


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is a dual number of the running forward mode, ``torch.func.jvp`` included.

    ``torch.autograd.forward_ad.unpack_dual`` answers only where it opened the level itself.
    """
    return tangent(x) is not None


def tangent(x: Tensor) -> Tensor | None:
    """The tangent of ``x``, if it has one; as in :func:`has_tangent`."""
    if isinstance(x, FakeTensor):
        return None
    found: Tensor | None = torch._VF._unpack_dual(x, level=0)[1]
    return found


def primal(x: Tensor) -> Tensor:
    """``x`` without its tangent of the innermost forward mode; as in :func:`has_tangent`."""
    value: Tensor = torch._VF._unpack_dual(x, level=0)[0]
    return value


# Around the ``jvp`` of a custom function, which PyTorch runs with forward mode off, at all levels.
forward_mode_enabled = functools.partial(_forward_ad._set_fwd_grad_enabled, True)
