"""What runs in the threads of devices: hooks, updates and second runs of checkpoints, and what they draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from device_cases import FIRST, PLACES, SECOND, arrays, case
from torch import Tensor

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    eager_update,
    forwarddiff,
    gradient,
    hessian,
    hessian_reverse,
    hook,
    isderiving,
    jacobian,
    pullback,
    pushforward,
    withgradient,
    withhessian,
    withjacobian,
)

# So often: which of two threads is first isn't always the same.
AGAIN = 20


def ones(device: str) -> Tensor:
    return torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)


@case
def updates_that_differentiate() -> None:
    for a, b in PLACES:
        for _ in range(AGAIN):
            p, q = ones(a), ones(b)
            updated: list[str] = []

            def update(w: Tensor, g: Tensor) -> None:
                updated.append("p" if w is p else "q")
                # of a sum, which keeps neither: the other one may be written to meanwhile
                gradient(lambda: (p + q.to(a)).sum(), Params([p, q]))
                w.sub_(0.1 * g)

            with eager_update(update, [p, q]):
                gradient(lambda: (p * q.to(a)).sum(), Params([p, q]))
            assert sorted(updated) == ["p", "q"], (a, b, updated)
            for w in (p, q):
                torch.testing.assert_close(w.detach().cpu(), torch.full((2,), 0.9, dtype=torch.float64))


@case
def updates_that_wait_for_another_device() -> None:
    """Meanwhile the thread of ``p`` runs what else is to be done on its device: the update of ``r``."""
    for _ in range(AGAIN):
        p, q, r = ones(FIRST), ones(SECOND), ones(FIRST)
        updated: list[Tensor] = []

        def update(w: Tensor, g: Tensor) -> None:
            updated.append(w)
            for _ in range(2):
                gradient(lambda: (p + q.to(FIRST) + r).sum(), Params([p, q, r]))
            w.sub_(0.1 * g)

        with eager_update(update, [p, r]):
            gradient(lambda: (p * r).sum() + (q.to(FIRST) * r).sum(), Params([p, q, r]))
        assert sorted(map(id, updated)) == sorted(map(id, (p, r)))


@case
def updates_in_backward() -> None:
    for a, b in PLACES:
        p, q = ones(a), ones(b)
        with eager_update(lambda w, g: w.sub_(0.1 * g), [p, q]):
            ((p + q.to(a)) * 2).sum().backward()  # type: ignore[no-untyped-call]
        for w in (p, q):
            torch.testing.assert_close(w.detach().cpu(), torch.full((2,), 0.8, dtype=torch.float64))


@case
def checkpoints_under_params_in_updates() -> None:
    for device in (FIRST, SECOND):
        x, _ = arrays(device, device)
        w = torch.ones(6, dtype=torch.float64, device=device, requires_grad=True)
        with eager_update(lambda p, g: p.sub_(g), [w]):
            found = gradient(lambda: (checkpointed(lambda: x.sin() + w) ** 2).sum(), Params([w, x]))
        torch.testing.assert_close(found[x], 2 * (x.sin() + 1) * x.cos())
        assert found[w] is None


@case
def derivatives_know_that_they_are() -> None:
    x, _ = arrays(SECOND, SECOND)
    said: list[bool] = []

    class Asks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            said.append(isderiving())
            return g * ctx.saved_tensors[0].cos()

    asked = lambda x: hook(lambda g: (said.append(isderiving()), g * 2)[1], x).square().sum()
    for take in (gradient, hessian_reverse, hessian):
        take(asked, x)
    gradient(lambda x: Asks.apply(x).sum(), x)  # type: ignore[no-untyped-call]
    gradient(lambda x: checkpointed(lambda x: (said.append(isderiving()), x.sin())[1], x).sum(), x)
    assert len(said) > 5
    assert all(said)
    asked(x.clone().requires_grad_()).backward()
    assert not said.pop()


@case
def hooks_inside_of_hooks() -> None:
    x, _ = arrays(SECOND, SECOND)
    for take in (gradient, lambda f, x: jacobian(f, x, mode="reverse")):
        seen: list[Tensor | None] = []
        take(lambda x: hook(lambda g: (hook(seen.append, x * 1), g)[1], x).sum(), x)
        assert seen == [None]
    for run in (lambda f, x: f(x), checkpointed):
        seen = []
        f = lambda x: (hook(seen.append, x * 5), x.sin())[1]
        gradient(lambda y: torch.func.grad(lambda x: run(f, x).sum())(x).sum() + y.sum(), x * 2)
        assert seen == [None]


@case
def hooks_that_differentiate_over_both_devices() -> None:
    """Each takes forward mode, which is one thread's, and a backward pass over the other's device, too."""
    x, y = arrays(FIRST, SECOND)

    def slopes(x: Tensor, other: str) -> Tensor:
        return gradient(lambda t: (t.to(other) ** 3).sin().to(t.device).sum(), x)[0]

    def bent(x: Tensor, other: str) -> Tensor:
        pushed = lambda: jacobian(lambda t: (t.to(other) ** 3).to(t.device), x, mode="forward")[0].sum(0)
        return hook(lambda g: g * pushed() * slopes(x, other), x)

    both = lambda x, y: bent(x, SECOND).sum() + bent(y, FIRST).sum().to(FIRST)
    expected = [3 * v**2 * (3 * v**2 * (v**3).cos()) for v in (x, y)]
    for _ in range(AGAIN):
        torch.testing.assert_close(list(gradient(both, x, y)), expected)
    again = lambda x, y: (
        checkpointed(lambda x: x.sin() * slopes(x, SECOND), x).sum()
        + checkpointed(lambda y: y.sin() * slopes(y, FIRST), y).sum().to(FIRST)
    )
    plain = lambda x, y: (x.sin() * slopes(x, SECOND)).sum() + (y.sin() * slopes(y, FIRST)).sum().to(FIRST)
    torch.testing.assert_close(gradient(again, x, y), gradient(plain, x, y))


# ---- random numbers: a derivative is that of the draw which gave the value ---------------------------------


@case
def derivatives_of_what_was_drawn() -> None:
    x = arrays(SECOND, FIRST)[0].repeat(5)
    draw = lambda x: F.dropout(x, 0.5)
    half = lambda run: lambda x: (run(x) ** 2).sum() / 2
    for run in (draw, lambda x: checkpointed(draw, x), lambda x: checkpointed(checkpointed, draw, x)):
        for mode in ("auto", "forward", "reverse"):
            y, (J,) = withjacobian(run, x, mode=mode, chunk_size=7)
            assert torch.equal(J.diagonal(), (y != 0) * 2.0), mode
        y, (g,) = withgradient(half(run), x)
        torch.testing.assert_close((g * x).sum() / 2, y)
        _, g, H = withhessian(half(run), x)
        torch.testing.assert_close(H @ x, g)
        y, back = pullback(run, x)
        for _ in range(2):
            assert torch.equal(back(torch.ones_like(y))[0], (y != 0) * 2.0)
        push = pushforward(run, x)
        assert torch.equal(push(torch.ones_like(x)), push(torch.ones_like(x)))


@case
def generators_go_on_as_after_a_plain_call() -> None:
    x, _ = arrays(SECOND, FIRST)
    f = lambda x: (F.dropout(x, 0.5) * torch.rand(6, device=FIRST, dtype=torch.float64).to(x.device)).sum()

    def following(run: Callable[[], Any]) -> list[Tensor]:
        torch.manual_seed(3)
        run()
        return [torch.rand(3, device=device).cpu() for device in (FIRST, SECOND, "cpu")]

    expected = following(lambda: f(x))
    for take in (
        gradient,
        hessian,
        hessian_reverse,
        diaghessian,
        lambda f, x: jacobian(f, x, mode="reverse"),
        lambda f, x: jacobian(f, x, mode="forward", chunk_size=1),
        lambda f, x: jacobian(f, x, sparse=True),
        lambda f, x: gradient(lambda x: checkpointed(f, x), x),
        lambda f, x: gradient(lambda x: forwarddiff(f, x), x),
    ):
        torch.testing.assert_close(following(lambda: take(f, x)), expected, rtol=0, atol=0)


@case
def checkpoints_of_two_devices() -> None:
    """Their second runs are in two threads, one after the other."""

    def layers(x: Tensor) -> Tensor:
        for _ in range(4):
            x = F.dropout(x * 1.0, 0.1) * x.cos().exp().cos()
        return x

    for _ in range(AGAIN):
        values: list[Tensor] = []

        def loss(x: Tensor) -> Tensor:
            values[:] = [checkpointed(layers, checkpointed(layers, x).to(SECOND))]
            return values[0].sum()

        (g,) = gradient(loss, torch.ones(500, dtype=torch.float64, device=FIRST))
        assert torch.equal(g.cpu() == 0, values[0].cpu() == 0)


@case
def checkpoints_remember_autocast() -> None:
    x = torch.linspace(-1, 1, 16).reshape(4, 4).to(SECOND)
    seen: list[torch.dtype] = []

    def f(x: Tensor) -> Tensor:
        y = x @ x
        seen.append(y.dtype)
        return y.float().square().sum()

    with torch.autocast("cuda", dtype=torch.bfloat16):
        _, back = pullback(lambda x: checkpointed(f, x), x)
    back(1.0)
    assert len(seen) > 1
    assert set(seen) == {torch.bfloat16}
