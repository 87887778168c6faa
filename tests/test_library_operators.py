"""Operators made with ``torch.library``, of which PyTorch's forward mode gives zeros: refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import forwarddiff, gradient, hessian, hessian_dual, jacobian, pushforward

X = torch.tensor([1.0, 2.0, 3.0])


@torch.library.custom_op("torchzygote_tests::squared", mutates_args=())
def squared(x: Tensor) -> Tensor:
    return x * x


squared.register_autograd(
    lambda ctx, g: 2 * g * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def f(x: Tensor) -> Tensor:
    return (squared(x) * x).sum()


REFUSED: dict[str, Callable[[], Any]] = {
    "pushforward": lambda: pushforward(f, X)(X),
    "forwarddiff": lambda: gradient(lambda x: forwarddiff(f, x), X),
    "hessian_dual": lambda: hessian_dual(f, X),
    "hessian": lambda: hessian(f, X, mode="forward_over_reverse"),
    "pushforward of a gradient": lambda: pushforward(lambda x: gradient(f, x)[0], X)(X),
}


@pytest.mark.parametrize("name", REFUSED)
def test_forward_mode_refuses_them_by_name(name: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"operator torchzygote_tests::squared has no forward.*reverse mode"
    ):
        REFUSED[name]()


def test_so_does_a_jacobian() -> None:
    with pytest.raises(
        RuntimeError, match="operators made with torch.library.*found torchzygote_tests_squared"
    ):
        jacobian(f, X, mode="forward")


def test_reverse_mode_is_right() -> None:
    assert torch.equal(gradient(f, X)[0], 3 * X**2)
    torch.testing.assert_close(hessian(f, X), torch.diag(6 * X))
