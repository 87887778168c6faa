"""Loops of derivatives that close over what the loop computes: each walk ends where earlier ones began."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchzygote import (
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    pullback,
    pushforward,
    withgradient,
)
from torchzygote._torch_private import surveys

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
    noted = surveys.noted

    def counted(node: object, walk: int) -> int:
        found.append(node)
        return noted(node, walk)

    monkeypatch.setattr(surveys, "noted", counted)
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
