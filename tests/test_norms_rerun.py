"""Norms and weight norm that run again, as under checkpoints: they do what they did, whoever else runs."""

from __future__ import annotations

import _thread
import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hessian_reverse,
    jacobian,
    plan_hessian,
    pushforward,
    withgradient,
)
from torchzygote._torch_private import wanted_here_as

D = torch.float64
X = torch.tensor([0.3, -0.2, 0.5, 0.1], dtype=D)
W = torch.linspace(0.5, 2, 4, dtype=D)
H = torch.linspace(0, 9, 16, dtype=D).cos().view(4, 4)
Function = Callable[[Tensor], Tensor]


def normed(t: Tensor) -> Tensor:
    return F.layer_norm((H * t).sin(), (4,)) ** 3


def weight_normed(t: Tensor) -> Tensor:
    return torch._weight_norm((H * t).sin(), (1 + H.sum(1, keepdim=True) ** 2), 0) ** 3


def by_formula(t: Tensor) -> Tensor:
    h = (H * t).sin()
    centered = h - h.mean(-1, keepdim=True)
    return (centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()) ** 3


def weight_normed_by_formula(t: Tensor) -> Tensor:
    v = (H * t).sin()
    return (v * (1 + H.sum(1, keepdim=True) ** 2) / v.square().sum(1, keepdim=True).sqrt()) ** 3


BODIES: dict[str, tuple[Function, Function]] = {
    "layer norm": (normed, by_formula),
    "weight norm": (weight_normed, weight_normed_by_formula),
}
CHECKPOINTS: dict[str, Callable[[Function], Function]] = {
    "torch": lambda body: lambda x: checkpoint(body, x, use_reentrant=False),
    "torchzygote": lambda body: lambda x: checkpointed(body, x),
}


def scalar(body: Function) -> Function:
    return lambda x: (body(x) @ W).sum()


class Elsewhere:
    """A derivative in another thread, which is begun when asked for, and ended as the block ends."""

    def __init__(self, begin: Callable[[Function], object]) -> None:
        self.begun = threading.Event()
        self._start, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(begin,))

    def _run(self, begin: Callable[[Function], object]) -> None:
        def f(y: Tensor) -> Tensor:
            self.begun.set()
            self._end.wait(60)
            return (y**3).sum()

        self._start.wait(60)
        begin(f)

    def start(self) -> None:
        self._start.set()
        self.begun.wait(60)

    def __enter__(self) -> Elsewhere:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._start.set()
        self._end.set()
        self._thread.join()


BEGUN: dict[str, Callable[[Function], object]] = {
    "a kept Hessian": lambda f: gradient(lambda y: hessian(f, y).sum(), X),
    "a Hessian": lambda f: hessian_reverse(f, X),
    "forward mode": lambda f: pushforward(f, X)(X),
}
WAYS: dict[str, Callable[[Function], Tensor]] = {
    "gradient": lambda f: gradient(f, X)[0],
    "hessian_reverse": lambda f: hessian_reverse(f, X),
    "diaghessian": lambda f: diaghessian(f, X)[0],
    "plain autograd": lambda f: of_autograd(f, X),
}


def of_autograd(f: Function, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("body", BODIES)
def test_what_another_thread_begins_meanwhile(body: str, kind: str, way: str, begun: str) -> None:
    own, formula = BODIES[body]
    with Elsewhere(BEGUN[begun]) as elsewhere:

        def f(x: Tensor) -> Tensor:
            y = CHECKPOINTS[kind](own)(x)
            elsewhere.start()
            return (y @ W).sum()

        found = WAYS[way](f)
    torch.testing.assert_close(found, WAYS[way](scalar(formula)))


@pytest.mark.parametrize("begun", BEGUN)
@pytest.mark.parametrize("way", ["gradient", "plain autograd"])
@pytest.mark.parametrize("body", BODIES)
def test_values_do_not_depend_on_other_threads(body: str, way: str, begun: str) -> None:
    """Not even in their rounding."""
    f = scalar(BODIES[body][0])
    value, expected = f(X), WAYS[way](f)
    with Elsewhere(BEGUN[begun]) as elsewhere:
        elsewhere.start()
        found = f(X), WAYS[way](f)
    torch.testing.assert_close(found, (value, expected), rtol=0, atol=0)


@pytest.fixture
def running_again() -> Iterator[Callable[[], None]]:
    """Another thread that runs something again as it ran before derivatives began, while called."""
    first, again, leave, begun = (threading.Event() for _ in range(4))

    def slow(y: Tensor) -> Tensor:
        if begun.is_set():
            again.set()
            leave.wait(60)
        return (y * y).sum()

    def outer(y: Tensor) -> Tensor:
        z = checkpointed(slow, y)
        first.set()
        begun.wait(60)
        return z

    def start() -> None:
        begun.set()
        again.wait(60)

    thread = threading.Thread(target=lambda: gradient(outer, torch.ones(2)))
    thread.start()
    first.wait(60)
    yield start
    begun.set()
    leave.set()
    thread.join()


@pytest.mark.parametrize("body", BODIES)
def test_what_runs_again_elsewhere(body: str, running_again: Callable[[], None]) -> None:
    own, formula = map(scalar, BODIES[body])

    def f(x: Tensor) -> Tensor:
        running_again()
        return own(x)

    found = gradient(lambda x: hessian(f, x).sin().sum(), X)
    torch.testing.assert_close(found, gradient(lambda x: hessian(formula, x).sin().sum(), X))


def test_threads_of_pytorch_go_by_all_derivatives_unless_told() -> None:
    """A backward pass on a device runs there what another thread has asked for."""
    seen: list[bool] = []
    done = threading.Event()

    def run() -> None:
        x = X.clone().requires_grad_()
        for told in (False, True):
            with wanted_here_as(0) if told else contextlib.nullcontext():
                y = checkpoint(lambda t: F.layer_norm(t, (4,)), x, use_reentrant=False)
            seen.append(y.grad_fn.name() == "NativeLayerNormBackward0")
        done.set()

    def f(x: Tensor) -> Tensor:
        _thread.start_new_thread(run, ())
        done.wait(60)
        return (x**3).sum()

    hessian_reverse(f, X)
    assert seen == [False, True]


INSIDE: dict[str, Callable[[Function], Function]] = {
    "gradient": lambda f: lambda x: gradient(f, x)[0].sin().sum(),
    "gradient of withgradient": lambda f: lambda x: withgradient(f, x).grad[0].sin().sum(),
    "value of withgradient": lambda f: lambda x: withgradient(f, x).val,
    "jacobian": lambda f: lambda x: jacobian(f, x)[0].sin().sum(),
}
SECOND: dict[str, Callable[[Function], Tensor]] = {
    "hessian": lambda f: hessian(f, X),
    "hessian_reverse": lambda f: hessian_reverse(f, X),
    "diaghessian": lambda f: diaghessian(f, X)[0],
    "plan": lambda f: plan_hessian(f, X)(X).to_dense(),
}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("inside", INSIDE)
def test_second_derivatives_of_derivatives_around_a_checkpoint(inside: str, way: str) -> None:
    own, formula = scalar(CHECKPOINTS["torch"](normed)), scalar(by_formula)
    torch.testing.assert_close(SECOND[way](INSIDE[inside](own)), SECOND[way](INSIDE[inside](formula)))
