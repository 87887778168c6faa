"""Loops of derivatives that close over what the loop computes: each walk ends where earlier ones began."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    pullback,
    pushforward,
    withgradient,
)
from torchzygote._torch_private import walked

W = torch.linspace(-1, 1, 9, dtype=torch.float64).view(3, 3)


def energy(q: Tensor, p: Tensor) -> Tensor:
    return (torch.tanh(W @ q) * p).sum() + (q**3).sum() * p.sum()


def force(q: Tensor, p: Tensor) -> Tensor:
    return torch.tanh(W @ q) * p


# One step of a loop: a derivative by q of something that closes over p.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda q, p: gradient(lambda q: energy(q, p), q)[0],
    "withgradient": lambda q, p: withgradient(lambda q: energy(q, p), q).grad[0],
    "pullback": lambda q, p: pullback(lambda q: force(q, p), q)[1](p)[0],
    "pushforward": lambda q, p: pushforward(lambda q: force(q, p), q)(q),
    "jacobian": lambda q, p: jacobian(lambda q: force(q, p), q)[0].sum(0),
    "jacobian, forward": lambda q, p: jacobian(lambda q: force(q, p), q, mode="forward")[0].sum(0),
    "hessian": lambda q, p: hessian(lambda q: energy(q, p), q).sum(0),
    "hessian_dual": lambda q, p: hessian_dual(lambda q: energy(q, p), q).sum(0),
    "diaghessian": lambda q, p: diaghessian(lambda q: energy(q, p), q)[0],
}


def by_hand(which: str, q: Tensor, p: Tensor) -> Tensor:
    grad = torch.func.grad(energy)
    if which in ("gradient", "withgradient"):
        return grad(q, p)
    if which == "pullback":
        return torch.func.vjp(lambda q: force(q, p), q)[1](p)[0]
    if which == "pushforward":
        return torch.func.jvp(lambda q: force(q, p), (q,), (q,))[1]
    if which.startswith("jacobian"):
        return torch.func.jacrev(force)(q, p).sum(0)
    H = torch.func.jacrev(grad)(q, p)
    return H.diagonal() if which == "diaghessian" else H.sum(0)


def loop(step: Callable[[Tensor, Tensor], Tensor], q: Tensor, steps: int) -> Tensor:
    p = q.cos()
    for _ in range(steps):
        p = p - 0.05 * step(q, p)
        q = q + 0.05 * p
    return (q * p).sum()


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with every node that a walk looks at."""
    found: list[object] = []
    noted = walked._noted

    def counted(node: object, walk: int) -> int:
        found.append(node)
        return noted(node, walk)

    monkeypatch.setattr(walked, "_noted", counted)
    return found


@pytest.mark.parametrize("which", STEPS)
def test_loops_are_differentiated(which: str) -> None:
    q = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)
    (g,) = gradient(lambda q: loop(STEPS[which], q, 6), q)
    expected = torch.func.grad(lambda q: loop(lambda q, p: by_hand(which, q, p), q, 6))(q)
    torch.testing.assert_close(g, expected)


# Forward mode, in levels of its own, walks along nothing.
@pytest.mark.parametrize("which", sorted(set(STEPS) - {"hessian_dual", "pushforward"}))
def test_walks_do_not_grow_with_the_loop(which: str, looks: list[object]) -> None:
    q = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)
    counts = []
    for steps in (8, 16, 32):
        looks.clear()
        gradient(lambda q, steps=steps: loop(STEPS[which], q, steps), q)
        counts.append(len(looks))
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert 0 < second <= 2 * first + 4


def test_by_an_outer_backward_pass(looks: list[object]) -> None:
    """Numbers outlive a call: a loop that plain autograd differentiates."""
    step = lambda q, p: gradient(lambda q: energy(q, p), q, create_graph=True)[0]
    counts = []
    for steps in (8, 16, 32):
        looks.clear()
        q = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(loop(step, q, steps), q)
        counts.append(len(looks))
    assert counts[2] - counts[1] <= 2 * (counts[1] - counts[0]) + 4
    expected = torch.func.grad(lambda q: loop(lambda q, p: by_hand("gradient", q, p), q, 32))(q.detach())
    torch.testing.assert_close(g, expected)


class Cube(torch.autograd.Function):
    """Told of by a walk, unlike PyTorch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


# What a checkpoint runs again finds the same, though its first run has walked along what it closes over.
BEFORE: dict[str, Callable[[Tensor], Tensor]] = {
    "a custom function": lambda w: Cube.apply(w),
    "much": lambda w: torch.outer(w, w).sum(1),
    "half precision": lambda w: w.to(torch.float16).to(torch.float64) + w,
}
INNER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda u, h: gradient(lambda z: (z.sin() * h * z).sum(), u)[0].sum(),
    "jacobian": lambda u, h: jacobian(lambda z: z.sin() * h, u)[0].sum(),
    "jacobian, forward": lambda u, h: jacobian(lambda z: z.sin() * h, u, mode="forward")[0].sum(),
    "hessian": lambda u, h: hessian(lambda z: ((z * h) ** 3).sum(), u).sum(),
    "diaghessian": lambda u, h: diaghessian(lambda z: ((z * h) ** 3).sum(), u)[0].sum(),
    "twice": lambda u, h: sum(gradient(lambda z: (z**3 * h).sum(), u)[0].sum() for _ in range(2)),
}


@pytest.mark.parametrize("n", [3, 100])
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("before", BEFORE)
def test_checkpoints_around_loops(before: str, inner: str, n: int) -> None:
    w = torch.linspace(0.1, 1, n, dtype=torch.float64)

    def through(call: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        def f(w: Tensor) -> Tensor:
            h = BEFORE[before](w)
            return call(lambda u: INNER[inner](u, h), w)

        return f

    expected = gradient(through(lambda g, w: g(w)), w)[0]
    torch.testing.assert_close(gradient(through(checkpointed), w)[0], expected)
    by_pytorch = functools.partial(checkpoint, use_reentrant=False)
    torch.testing.assert_close(gradient(through(by_pytorch), w)[0], expected)


def test_nobody_holds_the_graph() -> None:
    """What is noted is noted on the nodes."""

    class Held:
        pass

    q = torch.ones(3, dtype=torch.float64, requires_grad=True)
    p = q.sin()
    held = Held()
    p.grad_fn.metadata["held"] = held
    (g,) = gradient(functools.partial(energy, p=p), q, create_graph=True)
    alive = weakref.ref(held)
    del held, p, g
    gc.collect()
    assert alive() is None
