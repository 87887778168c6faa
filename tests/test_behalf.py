"""What runs in a backward pass belongs to the call that waits for it, in a thread of a device's, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_threads import move_backward_passes
from sines import ForwardSine
from torch import Tensor

from torchzygote import (
    Params,
    checkpointed,
    eager_update,
    gradient,
    hessian_reverse,
    hook,
    isderiving,
    jacobian,
    showgrad,
)

X = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)


@pytest.fixture(params=["here", "elsewhere"], autouse=True)
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes run in the thread of their call, or each in one of its own."""
    if request.param == "elsewhere":
        move_backward_passes(monkeypatch)


class Asks(ForwardSine):
    said: list[bool]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        Asks.said.append(isderiving())
        return g * x.cos()


def test_a_backward_pass_is_part_of_a_derivative() -> None:
    said: list[bool] = []
    Asks.said = said
    asked = lambda x: hook(lambda g: (said.append(isderiving()), g)[1], x).square().sum()
    gradient(asked, X)
    hessian_reverse(asked, X, chunk_size=1)
    gradient(lambda x: Asks.apply(x).sum(), X)  # type: ignore[no-untyped-call]
    assert len(said) > 3
    assert all(said)
    assert not isderiving()


def test_plain_autograd_is_none() -> None:
    said: list[bool] = []
    y = hook(lambda g: said.append(isderiving()), X.clone().requires_grad_()).sum()
    torch.autograd.grad(y, y, allow_unused=True)
    y.backward()  # type: ignore[no-untyped-call]
    assert said == [False]


@pytest.mark.parametrize("take", [gradient, lambda f, x: jacobian(f, x, mode="reverse")])
def test_hooks_inside_of_hooks_report_none(take: Callable[..., Any]) -> None:
    seen: list[Tensor | None] = []

    def inside(g: Tensor) -> Tensor:
        hook(seen.append, X * 1)
        return g

    take(lambda x: hook(inside, x).sum(), X)
    assert seen == [None]


def test_showgrad_inside_of_a_hook_prints_none(capsys: pytest.CaptureFixture[str]) -> None:
    gradient(lambda x: hook(lambda g: (showgrad(x * 2, "unused"), g)[1], x).sum(), X)
    assert capsys.readouterr().out == "∂(unused) = None\n"


def test_hooks_of_a_second_run_report_once() -> None:
    seen: list[Tensor | None] = []

    def f(x: Tensor) -> Tensor:
        hook(seen.append, x * 5)
        return x.sin()

    gradient(lambda x: checkpointed(f, x).sum(), X)
    assert seen == [None]


def test_what_an_update_differentiates_updates_nothing() -> None:
    p, q = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = lambda: (p * q).sum()

    def update(w: Tensor, g: Tensor) -> None:
        gradient(loss, Params([p, q]))
        w.sub_(0.1 * g)

    with eager_update(update, [p, q]):
        gradient(loss, Params([p, q]))
    for w in (p, q):
        torch.testing.assert_close(w.detach(), torch.full((2,), 0.9, dtype=torch.float64))


def test_flags_that_the_call_itself_has_set_are_not_those_of_another_thread() -> None:
    w, x = torch.ones(3, dtype=torch.float64, requires_grad=True), X.clone()
    ran: list[None] = []

    def f() -> Tensor:
        y = x.sin() * w
        ran.append(None)
        return y + 1

    with eager_update(lambda p, g: p.sub_(g), [w]):
        gradient(lambda: (checkpointed(f) ** 2).sum(), Params([w, x]))
    assert len(ran) <= 2
    expected = torch.ones(3, dtype=torch.float64) - 2 * (X.sin() + 1) * X.sin()
    torch.testing.assert_close(w.detach(), expected)
