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
from torchzygote._torch_private import are_right_as_they_are, survey, surveys, walked

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


def half_written(x: Tensor) -> Tensor:
    y = x.clone()
    y[1:] *= 2
    return y


F = torch.nn.functional
IMAGE = torch.linspace(-1, 1, 36, dtype=torch.float64).view(1, 1, 6, 6)
LIKE_X = torch.linspace(1, 2, 6, dtype=torch.float64)
# Functions of a vector of 6, and whether a recorded pullback needs nothing but itself.
KINDS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "plain": (lambda x: (x * x).sin() @ x, True),
    "convolution": (lambda x: F.conv2d(IMAGE, x.view(1, 1, 2, 3)), True),
    "cdist": (lambda x: torch.cdist(x.view(2, 3), x.view(2, 3) + 1), True),
    "solve": (lambda x: torch.linalg.solve(torch.eye(6, dtype=x.dtype) + x.outer(x), x), True),
    "masked_select": (lambda x: x.masked_select(LIKE_X > 1.5), True),
    "layer_norm": (lambda x: F.layer_norm(x, (6,), x + 2, x), True),
    "layer_norm, a bias alone": (lambda x: F.layer_norm(LIKE_X, (6,), None, x), False),
    "group_norm": (lambda x: F.group_norm(x.view(1, 6), 2, x + 2, x), True),
    "checkpointed": (lambda x: checkpointed(torch.sin, x), True),
    "custom": (lambda x: Cube.apply(x), False),
    "written into": (half_written, False),
    "logcumsumexp": (lambda x: x.logcumsumexp(0), False),
    "weight_norm": (lambda x: torch._weight_norm(x.view(2, 3), LIKE_X[:2, None]), False),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_nodes_tell_what_a_survey_does(name: str) -> None:
    f, right = KINDS[name]
    x = torch.linspace(0.5, 1.5, 6, dtype=torch.float64, requires_grad=True)
    number = walked.next_number()
    y = f(x)
    for _ in range(2):  # kinds are learned
        assert are_right_as_they_are([y], (), number) is right
        assert are_right_as_they_are([y]) is right
        told = survey([y])
        found = [told.custom, told.copies, told.sparse, told.running, told.biased, told.once]
        assert any(found) is not right


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many nodes lead to the inputs, each time that it is asked which."""
    found: list[int] = []
    leading = walked.leading

    def noted(*args: Any) -> list[Any]:
        nodes = leading(*args)
        found.append(len(nodes))
        return nodes

    monkeypatch.setattr(surveys, "leading", noted)
    return found


def test_one_look_at_each_node_where_all_are_plain(searches: list[int], looks: list[object]) -> None:
    xs = [torch.randn(3) for _ in range(50)]
    found = gradient(lambda *xs: sum((x * x).sum() for x in xs), *xs, create_graph=True)
    assert searches == []
    assert len(looks) <= 3 * len(xs)  # a product, a sum and an addition; nothing is noted on leaves
    assert all(torch.equal(g, 2 * x) for g, x in zip(found, xs, strict=True))


def test_repeated_pullbacks_look_once(looks: list[object]) -> None:
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    _, back = pullback(lambda x: x.sin() * x, x, create_graph=True)
    first = back(x)[0]
    assert looks
    looks.clear()
    assert torch.equal(first, back(x)[0])
    assert looks == []


@pytest.mark.parametrize("before", [False, True])
def test_others_are_searched_for_where_there_are_some(before: bool, searches: list[int]) -> None:
    """One that was recorded before doesn't lead to the inputs, and is told of by nobody."""
    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64, requires_grad=True)
    w = Cube.apply(x)
    (g,) = gradient(lambda z: ((w if before else Cube.apply(z)) * z).sum(), x, create_graph=True)
    assert searches
    (second,) = torch.autograd.grad(g.sum(), x)
    torch.testing.assert_close(second, 3 * x**2 if before else 12 * x**2)
    if before:  # now a walk has come to it
        searches.clear()
        gradient(lambda z: (w * z).sum(), x, create_graph=True)
        assert searches == []


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
