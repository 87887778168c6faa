"""Checkpointing custom functions whose backward looks at what it has saved more than once."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import checkpointed, gradient, hessian, jacobian
from torchzygote._checkpoint import asked_again

X = torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64)
W = torch.tensor([1.5, 0.4, -2.0], dtype=torch.float64)


class Weighted(torch.autograd.Function):
    """``x² w``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        assert len(ctx.saved_tensors) == 2
        x, w = ctx.saved_tensors[0], ctx.saved_tensors[1]
        return 2 * g * x * w, g * x * x


def weighted(x: Tensor, w: Tensor) -> Tensor:
    y: Tensor = Weighted.apply(Weighted.apply(x.sin(), w), w)  # type: ignore[no-untyped-call]
    return y.cos()


def plain(x: Tensor, w: Tensor) -> Tensor:
    return ((x.sin() ** 2 * w) ** 2 * w).cos()


def test_derivatives_are_those_without_a_checkpoint() -> None:
    inside = lambda x, w: checkpointed(weighted, x, w)
    for found, expected in zip(
        gradient(lambda x, w: inside(x, w).sum(), X, W),
        gradient(lambda x, w: plain(x, w).sum(), X, W),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    for chunk_size in (1, 2, None):
        (found,) = jacobian(inside, X, W, argnums=0, mode="reverse", chunk_size=chunk_size)[:1]
        torch.testing.assert_close(found, jacobian(plain, X, W, argnums=0)[0])
    torch.testing.assert_close(
        hessian(lambda x: inside(x, W).sum(), X), hessian(lambda x: plain(x, W).sum(), X)
    )


def test_a_graph_can_be_pulled_back_twice() -> None:
    x = X.clone().requires_grad_()
    y = checkpointed(weighted, x, W).sum()
    first, again = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, again)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_kept_after_the_pass(fails: bool) -> None:
    x = X.clone().requires_grad_()
    inside = x.sin()
    seen = weakref.ref(inside)
    y = checkpointed(lambda x: weighted(x, W), inside).sum()
    if fails:
        inside.register_hook(lambda g: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            torch.autograd.grad(y, x)
    else:
        torch.autograd.grad(y, x)
        assert asked_again._last.node() is None
    del inside, y
    gc.collect()
    assert seen() is None
    assert asked_again._last.node() is None


class Failing(torch.autograd.Function):
    fails = False

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * x * w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        if Failing.fails:
            raise OverflowError
        return 2 * g * x * w, None


def test_a_second_pass_does_not_get_what_one_that_failed_has_got(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scale = X.clone().requires_grad_(), torch.ones(3, dtype=torch.float64)
    y = checkpointed(lambda x: Failing.apply(x.sin() * scale, W), x).sum()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(Failing, "fails", True)
    with pytest.raises(OverflowError):
        torch.autograd.grad(y, x, retain_graph=True)
    monkeypatch.setattr(Failing, "fails", False)
    scale.data.mul_(2)  # uncounted
    (found,) = torch.autograd.grad(y, x)
    (expected,) = torch.autograd.grad(((x.sin() * scale) ** 2 * W).sum(), x)
    torch.testing.assert_close(found, expected)
