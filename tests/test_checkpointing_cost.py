"""Checkpointing: how often functions run again, and what is stored."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vjp, vmap
from torch.utils import _pytree as pytree

from torchzygote import (
    gradient,
    hessian_reverse,
    jacobian,
    pullback,
    pushforward,
)
from torchzygote.checkpointing import checkpointed

Function = Callable[[Tensor], Tensor]
Checkpoint = Callable[..., Any]


def plainly(f: Callable[..., Any], *xs: Any, **kwargs: Any) -> Any:
    return f(*xs, **kwargs)


def scalar(f: Any) -> Any:
    return lambda *args: (f(*args) ** 2).sum()


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)


@pytest.fixture
def w() -> Tensor:
    return torch.tensor([0.9, 1.2, -0.4], dtype=torch.float64)


# ---- how often f runs --------------------------------------------------------------------------------------


class Counted:
    """A layer that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        return (x.sin() * x).exp()


@pytest.mark.parametrize(
    ("derivative", "runs"),
    [
        (lambda f, x: f(x), 1),
        (lambda f, x: gradient(scalar(f), x), 2),
        (lambda f, x: jacobian(f, x, mode="reverse"), 2),
        (lambda f, x: jacobian(f, x, mode="reverse", chunk_size=1), 1 + 3),
        (lambda f, x: jacobian(f, x, mode="reverse", chunk_size=2), 1 + 2),
        (lambda f, x: pushforward(f, x)(x), 1),
        (lambda f, x: hessian_reverse(scalar(f), x), 1 + 2),
        (lambda f, x: grad(scalar(f))(x), 2),
        (lambda f, x: jacrev(f)(x), 2),
        (lambda f, x: jacrev(f, chunk_size=2)(x), 1 + 2),
        (lambda f, x: jacfwd(f)(x), 1),
        (lambda f, x: torch.func.hessian(scalar(f))(x), 2),
        (lambda f, x: vmap(grad(scalar(f)))(torch.stack([x, x])), 2),
    ],
)
def test_f_runs_once_more_per_backward_pass_never_once_per_row(derivative: Any, runs: int, x: Tensor) -> None:
    f = Counted()
    derivative(lambda x: checkpointed(f, x), x)
    assert f.runs == runs


def test_each_pullback_runs_f_once_more(x: Tensor) -> None:
    f = Counted()
    _, back = pullback(lambda x: checkpointed(f, x), x)
    first = back(x)
    assert f.runs == 2
    torch.testing.assert_close(back(x), first)
    assert f.runs == 3


def test_nothing_runs_again_without_a_backward_pass(x: Tensor) -> None:
    f = Counted()
    with torch.no_grad():
        checkpointed(f, x.requires_grad_())
    checkpointed(f, x.detach())
    assert f.runs == 2


# ---- what is stored ----------------------------------------------------------------------------------------


def differentiate(looked: Function, where: str, x: Tensor) -> None:
    if where == "tape":
        looked(x.requires_grad_()).backward()
    elif where == "vmap on the tape":
        vmap(looked)(torch.stack([x, x])).sum().backward()
    elif where == "grad on the tape":
        grad(looked)(x).sum().backward()
    elif where == "grad":
        grad(looked)(x)
    elif where == "vjp":
        vjp(looked, x)[1](torch.ones((), dtype=x.dtype))
    else:
        jacrev(jacrev(looked))(x)


@pytest.mark.parametrize(
    "where", ["tape", "grad", "vjp", "vmap on the tape", "grad on the tape", "jacrev of jacrev"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_inside_is_gone_when_f_returns(where: str, nested: bool, x: Tensor, w: Tensor) -> None:
    inside: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    w.requires_grad_("tape" in where)

    def f(x: Tensor) -> Tensor:
        for _ in range(5):
            x = (x * w).sin()
            inside.append(weakref.ref(x))
        return x * x

    def looked(checkpoint: Checkpoint, x: Tensor) -> Tensor:
        y = checkpoint(functools.partial(checkpoint, f), x) if nested else checkpoint(f, x)
        gc.collect()
        alive.append(sum(ref() is not None for ref in inside))
        return (y**2).sum()

    for checkpoint in (checkpointed, plainly):
        inside.clear()
        differentiate(functools.partial(looked, checkpoint), where, x)
    assert alive[0] == 0
    if "vmap" not in where:  # where what is saved is not what f sees
        assert alive[-1] > 0


def test_a_backward_pass_through_a_chain_holds_one_link_at_a_time() -> None:
    """The most that is alive at once, where each of 20 links makes ten tensors."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def link(x: Tensor) -> Tensor:
        nonlocal most
        for _ in range(10):
            x = x.sin()
            alive.add(x)
            most = max(most, len(alive))
        return x

    def chain(checkpoint: Checkpoint, x: Tensor) -> Tensor:
        for _ in range(20):
            x = checkpoint(link, x)
        return x.sum()

    x = torch.randn(4)
    expected = grad(functools.partial(chain, plainly))(x)
    assert most >= 200
    for derivative in (lambda f: gradient(f, x)[0], lambda f: grad(f)(x)):
        most = 0
        torch.testing.assert_close(derivative(functools.partial(chain, checkpointed)), expected)
        assert most <= 20 + 2 * 10


def test_nothing_of_a_recomputation_outlives_the_backward_pass() -> None:
    """Exceptions that end recomputations must not keep their frames, and so their tensors, in a cycle."""
    inside: list[weakref.ref[Tensor]] = []

    def f(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x.sin()
            inside.append(weakref.ref(x))
        return x * 2

    x = torch.randn(5, requires_grad=True)
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        checkpointed(f, checkpointed(f, x)).sum().backward()
        assert len(inside) > 6  # run again, in part
        assert not any(ref() is not None for ref in inside)
    finally:
        if was_collecting:
            gc.enable()


class Called:
    def __init__(self, f: Callable[..., Any]) -> None:
        self.f, self.calls = f, 0

    def __call__(self, *xs: Any) -> Any:
        self.calls += 1
        return self.f(*xs)


LINEAR: dict[str, Callable[[Tensor], Any]] = {
    "identity": lambda x: x,
    "twice": lambda x: 2 * x,
    "sum": lambda x: x.sum(),
    "a view": lambda x: x.view(-1)[1:],
    "two": lambda x: (x.sum(), [x * 3, 5]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_saves_nothing_runs_again_all_the_same(name: str) -> None:
    f = Called(LINEAR[name])
    total = lambda y: sum(t.sum() for t in pytree.tree_leaves(y) if isinstance(t, Tensor))
    _, back = pullback(lambda x: total(checkpointed(f, x)), torch.ones(3, dtype=torch.float64))
    assert f.calls == 1
    for calls in (2, 3):
        torch.testing.assert_close(back(1.0), gradient(lambda x: total(f.f(x)), torch.ones(3).double()))
        assert f.calls == calls
    x = torch.ones(3, requires_grad=True)
    h = x.exp()
    for given in (x, h):
        f.calls = 0
        out = total(checkpointed(f, given))
        (2 * given.sum()).backward(retain_graph=True)  # hooks nothing of the caller's
        assert f.calls == 1
        out.backward(retain_graph=True)
        assert f.calls == 2


def test_what_saves_nothing_takes_a_batch_of_rows_at_once() -> None:
    f = Called(lambda x: 2 * x)
    J = jacobian(lambda x: checkpointed(f, x), torch.ones(5), mode="reverse")[0]
    torch.testing.assert_close(J, 2 * torch.eye(5))
    assert f.calls == 2


def test_what_saves_nothing_may_lose_its_arguments() -> None:
    x = torch.ones(3, requires_grad=True)
    h = x * 1
    y = checkpointed(lambda h: 2 * h, h)
    h += 1
    y += 1
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0))


def test_what_saves_nothing_leaves_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    y = checkpointed(lambda x: 2 * x, x * 1)
    f = weakref.ref(y)
    y.sum().backward()
    del y
    assert f() is None
