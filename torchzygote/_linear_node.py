"""A value whose derivative is a given matrix, in every mode of differentiation.

Knows nothing of where the matrix comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._torch_private import forward_mode_enabled, primal

__all__ = ["known_derivative", "recomputed_derivative"]


class _Known(torch.autograd.Function):
    """``y``, as a function of ``x`` whose Jacobian is the transpose of ``columns``.

    ``x``: (..., n), ``y``: (..., m), ``columns``: (..., n, m). The derivative of ``columns`` is theirs: it
    gives the second derivative of ``y``.
    """

    torchzygote_composes = True
    derivative_of_forward = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, ybar: Tensor) -> Any:
        (columns,) = ctx.saved_tensors
        return pulled(columns, ybar), None, None

    @staticmethod
    def jvp(ctx: Any, xdot: Tensor, _y: Any, _columns: Any) -> Tensor:
        (columns,) = ctx.saved_tensors
        # PyTorch switches forward mode off around this, and with it the levels outside of this one.
        with forward_mode_enabled():  # columns have the dtype of y
            return (xdot.to(columns.dtype).unsqueeze(-2) @ primal(columns)).squeeze(-2)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *tensors: Tensor) -> Any:
        x, y, columns = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip(tensors, in_dims, strict=True)
        )
        return _Known.apply(x, y, columns), 0  # type: ignore[no-untyped-call]


def pulled(columns: Tensor, ybar: Tensor) -> Tensor:
    """The cotangent ``ybar`` pulled back."""
    return (columns @ ybar.unsqueeze(-1)).squeeze(-1)


def known_derivative(x: Tensor, y: Tensor, columns: Tensor) -> Tensor:
    """``y`` with the derivative ``columns`` by ``x``; what else ``y`` depends on is forgotten."""
    result: Tensor = _Known.apply(x, y, columns)  # type: ignore[no-untyped-call]
    return result


class _Recomputed(torch.autograd.Function):
    """Like :class:`_Known`, on the tape: ``columns`` is found anew where they must be differentiable."""

    torchzygote_composes = True
    derivative_of_forward = True

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, columns: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x, columns)
        ctx.again = again
        return y.clone()

    @staticmethod
    def backward(ctx: Any, ybar: Tensor) -> Any:
        x, columns = ctx.saved_tensors
        if torch.is_grad_enabled():  # the backward pass is recorded, to be differentiated itself
            columns = ctx.again(x)
        return pulled(columns, ybar), None, None, None


def recomputed_derivative(x: Tensor, y: Tensor, columns: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """Like :func:`known_derivative` for plain ``columns``, which ``again(x)`` gives with their derivative."""
    result: Tensor = _Recomputed.apply(x, y, columns, again)  # type: ignore[no-untyped-call]
    return result
