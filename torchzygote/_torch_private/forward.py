"""Forward mode: dual numbers, and where they may be about."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as _C_functorch
from torch._functorch import eager_transforms as _eager_transforms
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad as _forward_ad

from .levels import in_functorch

__all__ = [
    "Pushes",
    "forward_mode_enabled",
    "has_tangent",
    "in_forward_ad",
    "in_plain_eager",
    "leave_forward_mode",
    "primal",
    "tangent",
]

_unpack_dual: Callable[..., tuple[Tensor, Tensor | None]] = torch._VF._unpack_dual
_JVP = _C_functorch.TransformType.Jvp
_PLAIN = frozenset((Tensor, nn.Parameter))


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
    return _unpack_dual(x, level=0)[1]


def primal(x: Tensor) -> Tensor:
    """``x`` without its tangent of the innermost forward mode; as in :func:`has_tangent`."""
    return _unpack_dual(x, level=0)[0]


# Around the ``jvp`` of a custom function, which PyTorch runs with forward mode off, at all levels.
forward_mode_enabled = functools.partial(_forward_ad._set_fwd_grad_enabled, True)


class PushedOperand(NamedTuple):
    """The one operand that has a tangent."""

    place: int
    value: Tensor
    tangent: Tensor


# To ask a tensor for its tangent takes as long as a small operator, and most pairs of what was made inside
# are both pushed: after so many in a row some are passed over, later ones where a constant has been found.
_AT_FIRST, _AFTER_A_CONSTANT, _PASSED_OVER = 4, 16, 15


class Pushes:
    """Which operand is the only one that is pushed, during one call."""

    __slots__ = ("_left", "_passing")

    def __init__(self) -> None:
        self._left, self._passing = _AT_FIRST, 0

    def only_one(self, operands: Sequence[Any]) -> PushedOperand | None:
        """The only one with a tangent of the innermost transform, where all are dense tensors.

        ``None`` also where a reverse mode runs inside, which records the operator as it is, and in inference
        mode, which makes no dual numbers.
        """
        top = _C_functorch.peek_interpreter_stack()
        if top is None:
            return None
        level, places = top.level(), []
        for place, x in enumerate(operands):
            if type(x) not in _PLAIN:
                return None
            if _C_functorch.maybe_get_level(x) == level:
                places.append(place)
        if len(places) > 1 and self._passing:
            self._passing -= 1
            return None
        if not places or top.key() != _JVP or torch.is_inference_mode_enabled():
            return None
        if any(x.layout is not torch.strided for x in operands):
            return None
        found = self._only_one_of(operands, places)
        return None if found is None or operands[found.place].requires_grad else found

    def _only_one_of(self, operands: Sequence[Any], places: Sequence[int]) -> PushedOperand | None:
        found = None
        for place in places:
            value, tangent = _unpack_dual(operands[place], level=0)
            if tangent is None:
                self._left = _AFTER_A_CONSTANT
            elif found is None:
                found = PushedOperand(place, value, tangent)
            else:
                self._left -= 1
                if self._left <= 0:
                    self._passing = _PASSED_OVER
                return None
        return found
