"""eager_update with updates that write into the gradient: nobody else sees it, and little is copied."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import Params, eager_update, gradient, pullback


def tenfold(p: Tensor, g: Tensor) -> None:
    g.mul_(10)
    p -= g


class Kept(torch.autograd.Function):
    """A sum, whose backward pass gives a tensor that somebody else holds."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, held: Tensor) -> Tensor:
        ctx.save_for_backward(held)
        return (w * held).sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (held,) = ctx.saved_tensors
        return held.view(3), None


HELD = torch.tensor([1.0, 2.0, 3.0])
SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda w, v: ((w + v) * HELD).sum(),
    "views": lambda w, v: ((w.view(1, 3) + v.view(1, 3)) * HELD).sum(),
    "cat": lambda w, v: (torch.cat([w, v]) * torch.cat([HELD, HELD])).sum(),
    "stack": lambda w, v: (torch.stack([w, v]) * HELD).sum(),
    "twice": lambda w, v: ((w + v + w - w) * HELD).sum(),
    "saved": lambda w, v: Kept.apply(w, HELD) + Kept.apply(v, HELD),
    "not shared": lambda w, v: (w * HELD).sum() + (v * HELD).sum(),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("way", ["gradient", "pullback", "backward"])
def test_gradients_that_are_one_tensor(name: str, way: str) -> None:
    w, v = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    f = lambda: SUMS[name](w, v)
    with eager_update(tenfold, [w, v]):
        if way == "gradient":
            gradient(f, Params([w, v]))
        elif way == "pullback":
            pullback(f, Params([w, v]))[1](1.0)
        else:
            f().backward()
    assert (w.tolist(), v.tolist()) == ([-10, -20, -30], [-10, -20, -30])
    assert HELD.tolist() == [1, 2, 3]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("f", [lambda w: w + 0, lambda w: w.view(1, 3), lambda w: w[None], lambda w: w * 1])
def test_the_callers_cotangent(f: Callable[[Tensor], Tensor], backward: bool) -> None:
    w = torch.zeros(3, requires_grad=True)
    ybar = torch.ones_like(f(w))
    with eager_update(tenfold, [w]):
        if backward:
            f(w).backward(ybar)
        else:
            pullback(lambda: f(w), Params([w]))[1](ybar)
    assert w.tolist() == [-10, -10, -10]
    assert torch.equal(ybar, torch.ones_like(ybar))


def test_an_expanded_gradient() -> None:
    w = torch.zeros(3)
    with eager_update(tenfold, [w]):
        gradient(lambda: w.sum(), Params([w]))
    assert w.tolist() == [-10, -10, -10]


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """What was copied, as long as it is alive."""
    copies: list[weakref.ref[Tensor]] = []
    clone = Tensor.clone

    def noted(x: Tensor, **options: Any) -> Tensor:
        copy = clone(x, **options)
        copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(Tensor, "clone", noted)
    return copies


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))


def test_backward_copies_nothing_of_what_layers_give(copied: list[weakref.ref[Tensor]]) -> None:
    model, x = network(), torch.randn(5, 3)
    with eager_update(tenfold, model):
        model(x).square().sum().backward()
    assert not copied


def test_there_is_one_copy_at_a_time(copied: list[weakref.ref[Tensor]]) -> None:
    model, x = network(), torch.randn(5, 3)
    alive: list[int] = []

    def update(p: Tensor, g: Tensor) -> None:
        alive.append(sum(copy() is not None for copy in copied))
        p -= g

    with eager_update(update, model):
        gradient(lambda: model(x).square().sum(), Params(model))
    assert alive == [1] * len(list(model.parameters()))
