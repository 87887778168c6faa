"""Reentrant checkpoints of PyTorch's inside derivatives: the oracle is the function without a checkpoint."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    ignore_derivatives,
    jacobian,
    plan_hessian,
    pullback,
)

X = torch.tensor([1.0, 2.0, 3.0])


def reentrant(f: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(f, *args, use_reentrant=True)


def plain(f: Callable[..., Any], *args: Any) -> Any:
    return f(*args)


def cubic(way: Callable[..., Any], w: Tensor, x: Tensor = X) -> Tensor:
    y: Tensor = way(lambda a: (a * w**2).sin(), x).sum() + w**3
    return y


CALLS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "gradient": lambda f, w: gradient(f, w)[0],
    "pullback": lambda f, w: pullback(f, w)[1](1)[0],
    "jacobian": lambda f, w: jacobian(f, w)[0],
    "jacobian, forward": lambda f, w: jacobian(f, w, mode="forward")[0],
    "hessian": hessian,
    "diaghessian": lambda f, w: diaghessian(f, w)[0],
    "plan": lambda f, w: plan_hessian(f, w)(w),
    "gradient of gradient": lambda f, w: gradient(lambda w: gradient(f, w)[0], w)[0],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_what_a_reentrant_checkpoint_closes_over_is_seen(call: str, requires_grad: bool) -> None:
    x, w = X.clone().requires_grad_(requires_grad), torch.tensor(0.7)
    found = CALLS[call](lambda w: cubic(reentrant, w, x), w)
    torch.testing.assert_close(found, CALLS[call](lambda w: cubic(plain, w), w))
    assert not found.requires_grad


@pytest.mark.parametrize("call", [gradient, jacobian, diaghessian])
def test_so_are_parameters_inside_of_it(call: Callable[..., Any]) -> None:
    m = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = X.double()
    found = call(lambda: m[2](reentrant(m[:2], x)).sum(), Params(m))
    expected = call(lambda: m[2](m[:2](x)).sum(), Params(m))
    for p in m.parameters():
        torch.testing.assert_close(found[p], expected[p])
        assert expected[p].any() or call is diaghessian


def test_it_is_a_checkpoint_still_with_the_same_random_numbers() -> None:
    drawn = []

    def noisy(a: Tensor) -> Tensor:
        drawn.append(torch.rand(3))
        return (a * drawn[-1]).exp()

    state = torch.get_rng_state()
    (found,) = gradient(lambda w: reentrant(lambda a: noisy(a * w), X).sum(), 0.5)
    assert len(drawn) == 2
    assert torch.equal(*drawn)
    torch.set_rng_state(state)
    (expected,) = gradient(lambda w: noisy(X * w).sum(), 0.5)
    torch.testing.assert_close(found, expected)


def test_nested_ones_run_again_alike_after_the_derivative_has_ended() -> None:
    def f(way: Callable[..., Any]) -> Tensor:
        w = torch.tensor(0.7, requires_grad=True)
        loss = lambda w: way(lambda a: way(lambda c: (c * w).sin(), a) * w, X).sum() * w
        (g,) = gradient(loss, w, create_graph=True)
        g.backward()
        assert w.grad is not None
        return w.grad

    torch.testing.assert_close(f(reentrant), f(plain))


def node_of_a_checkpoint() -> str:
    x = X.clone().requires_grad_()
    return type(reentrant(torch.sin, x).grad_fn).__name__


def test_outside_of_derivatives_it_is_pytorchs_own() -> None:
    theirs = node_of_a_checkpoint()
    assert theirs == "CheckpointFunctionBackward"
    seen: list[str] = []

    def f(w: Tensor) -> Tensor:
        other = threading.Thread(target=lambda: seen.append(node_of_a_checkpoint()))
        other.start()
        other.join()
        seen.append(ignore_derivatives(node_of_a_checkpoint))
        return w * 2

    gradient(f, 1.0)
    assert [*seen, node_of_a_checkpoint()] == [theirs] * 3
    with pytest.raises(RuntimeError, match="use_reentrant=True"):  # what PyTorch says of its own
        torch.autograd.grad(reentrant(torch.sin, x := X.clone().requires_grad_()).sum(), x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_under_no_grad_it_is_a_constant_as_without_a_checkpoint() -> None:
    def f(way: Callable[..., Any], w: Tensor) -> Tensor:
        with torch.no_grad():
            kept = way(lambda a: a * w, X)
        return (kept * w).sum()

    assert gradient(lambda w: f(reentrant, w), 2.0) == gradient(lambda w: f(plain, w), 2.0)


class Counted(CheckpointFunction):
    """A checkpoint of its own kind."""

    runs = 0

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        Counted.runs += 1
        return CheckpointFunction.forward(ctx, *args)


def test_classes_made_of_it_stay_as_they_are() -> None:
    Counted.runs = 0
    x = X.clone().requires_grad_()
    y: Any = Counted.apply(torch.sin, True, x)
    assert Counted.runs == 1
    assert type(y.grad_fn).__name__ == "CountedBackward"
    y.sum().backward()
    torch.testing.assert_close(x.grad, X.cos())
    assert pickle.loads(pickle.dumps(CheckpointFunction.apply)) == CheckpointFunction.apply
