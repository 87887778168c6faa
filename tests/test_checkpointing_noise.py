"""Checkpoints that end with `rrelu`, which saves its noise before it draws it; the oracle has none around."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchzygote import checkpointed, diaghessian, gradient, hessian, jacobian, pullback

X = torch.tensor([-1.0, -0.5, 0.5, -2.0], dtype=torch.float64)

Function = Callable[[Tensor], Tensor]
NOISY: dict[str, Function] = {
    "function": lambda x: F.rrelu(x, 0.1, 0.9, training=True),
    "module": nn.RReLU(0.1, 0.9),
    "in place": lambda x: F.rrelu_(x.clone(), 0.1, 0.9, training=True),
    "operator": lambda x: torch.ops.aten.rrelu_with_noise(x, torch.empty_like(x), 0.1, 0.9, True),
    "operator, in memory written to": lambda x: torch.ops.aten.rrelu_with_noise(
        x, torch.full_like(x, 5.0).zero_(), 0.1, 0.9, True
    ),
    "twice": lambda x: F.rrelu(F.rrelu(x, training=True) + x, training=True),
    "and something that saves nothing": lambda x: F.rrelu(x, 0.1, 0.9, training=True) + 1,
}
CALLS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "gradient": lambda f, x: gradient(lambda x: f(x).sin().sum(), x)[0],
    "pullback": lambda f, x: pullback(f, x)[1](torch.ones_like(x))[0],
    "jacobian": lambda f, x: jacobian(f, x, mode="reverse", chunk_size=1)[0],  # PyTorch can't batch it
    "hessian": lambda f, x: hessian(lambda x: f(x).sin().sum(), x, chunk_size=1),
    "diaghessian": lambda f, x: diaghessian(lambda x: f(x).sin().sum(), x, chunk_size=1)[0],
}
WAYS: dict[str, Callable[..., Any]] = {
    "checkpointed": checkpointed,
    "reentrant": lambda f, *args: checkpoint(f, *args, use_reentrant=True),
}


def drawn(call: Callable[[Function, Tensor], Tensor], f: Function) -> Tensor:
    """What ``call`` gives, while memory that was freed has numbers in it."""
    used = [torch.full_like(X, 7.0) for _ in range(50)]
    del used
    torch.manual_seed(3)
    return call(f, X)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NOISY)
def test_the_second_run_draws_the_noise_that_it_saved(name: str, call: str, way: str) -> None:
    f = NOISY[name]
    found = drawn(CALLS[call], lambda x: WAYS[way](f, x))
    torch.testing.assert_close(found, drawn(CALLS[call], f))


@pytest.mark.parametrize("name", ["function", "module", "twice"])
def test_forward_mode_sees_the_same_noise(name: str) -> None:
    f = NOISY[name]
    pushed = lambda f, x: jacobian(f, x, mode="forward", chunk_size=1)[0]
    torch.testing.assert_close(drawn(pushed, lambda x: checkpointed(f, x)), drawn(pushed, f))


def test_backward_around_one() -> None:
    def grad(f: Function, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x).sum(), x)[0]

    found = drawn(grad, lambda x: checkpointed(NOISY["function"], x))
    torch.testing.assert_close(found, drawn(grad, NOISY["function"]))


@pytest.mark.parametrize("way", [checkpointed, lambda f, x: f(x)])
def test_a_derivative_inside_one_has_its_noise(way: Callable[..., Any]) -> None:
    def f(x: Tensor) -> Tensor:
        found: Tensor = gradient(lambda y: F.rrelu(y**3, training=True).sum(), x)[0]
        return found * x

    slopes = drawn(lambda f, x: F.rrelu(f(x), training=True) / f(x), lambda x: x**3)
    found = drawn(lambda f, x: gradient(lambda x: way(f, x).sum(), x)[0], f)
    torch.testing.assert_close(found, slopes * 9 * X**2)


def test_settings_of_other_threads_are_left_alone() -> None:
    """Two threads that leave in the order in which they came."""
    before = torch.utils.checkpoint._enable_checkpoint_early_stop
    inside = [threading.Event(), threading.Event()]
    go = [threading.Event(), threading.Event()]

    def body(i: int, x: Tensor) -> Tensor:
        if not go[i].is_set():
            inside[i].set()
            go[i].wait(60)
        return x.sin()

    def derivative(i: int) -> None:
        gradient(lambda x: checkpoint(body, i, x, use_reentrant=True).sum(), X)

    threads = [threading.Thread(target=derivative, args=(i,)) for i in range(2)]
    for thread, entered in zip(threads, inside, strict=True):
        thread.start()
        entered.wait(60)
    for thread, leave in zip(threads, go, strict=True):
        leave.set()
        thread.join()
    assert torch.utils.checkpoint._enable_checkpoint_early_stop is before


@pytest.mark.parametrize(
    "last",
    [
        lambda x: F.rrelu(x, training=True).sin(),
        lambda x: x * torch.full((4,), 2.0, dtype=torch.float64),
        lambda x: x @ torch.eye(4, dtype=torch.float64),
    ],
)
def test_a_checkpoint_that_ends_otherwise_still_ends_early(last: Function) -> None:
    ran = []

    def f(x: Tensor) -> Tensor:
        y = last(x)
        ran.append(len(ran))
        return y

    gradient(lambda x: checkpointed(f, x).sum(), X)
    assert ran == [0]


def test_a_function_that_begins_again_for_torch_func_draws_the_same() -> None:

    def f(x: Tensor) -> Tensor:
        u = torch.rand(())
        return torch.func.grad(lambda y: (y**2 * u).sum())(x)

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    torch.manual_seed(1)
    expected, following = f(x), torch.rand(())
    torch.manual_seed(1)
    found = checkpointed(f, x)
    assert torch.equal(found, expected)
    assert torch.equal(torch.rand(()), following)
