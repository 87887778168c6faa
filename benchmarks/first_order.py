"""Gradients, Jacobians and implicit parameters against torch.func, torch.autograd and hand-written code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import forwarddiff, gradient, jacobian, pushforward, withgradient
from torchzygote.params import Params

from . import per_sample
from ._harness import Contender, Row, compare, compare_memory
from ._networks import mlp

Peers = dict[str, Contender | None]

RATES = torch.linspace(0.5, 1.5, 10)


def three_small_ops(x: Tensor) -> Tensor:
    """A function whose derivative is all overhead."""
    return (x.sin() * x).sum()


def by_hand(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    """What one writes without any library."""

    def run() -> Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    return run


def jacobian_peers(f: Callable[[Tensor], Tensor], x: Tensor, *, forward: bool = True) -> Peers:
    """The ways PyTorch itself offers."""
    reverse = torch.func.jacrev(f)
    peers: Peers = {
        "torch.func.jacrev": lambda: reverse(x),
        "autograd.functional.jacobian": lambda: torch.autograd.functional.jacobian(f, x, vectorize=True),
    }
    if forward:
        tangents = torch.func.jacfwd(f)
        peers["torch.func.jacfwd"] = lambda: tangents(x)
    return peers


def ode(x: Tensor) -> Tensor:
    """A 10 to 10 right-hand side: coupled oscillators with a nonlinear term."""
    return torch.roll(x, 1) * (torch.roll(x, -1) - torch.roll(x, 2)) - x.sin() + 8.0


def small_gradients() -> Iterator[Row]:
    x = torch.randn(10)
    func = torch.func.grad(three_small_ops)
    ours = lambda: gradient(three_small_ops, x)
    yield compare(
        "gradient, three small operations", ours, {"torch.func.grad": lambda: func(x)}, target=0.5, rounds=25
    )
    hand: Peers = {"autograd.grad by hand": by_hand(three_small_ops, x)}
    yield compare("gradient, three small operations", ours, hand, target=1.6, rounds=25)


def jacobians() -> Iterator[Row]:
    torch.manual_seed(0)
    x10, x784, x500 = torch.randn(10), torch.randn(784), torch.randn(500)
    x2000 = torch.randn(2000)
    net = mlp(784, 64, 10)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    W = torch.randn(500, 500) / 500**0.5
    cases: list[tuple[str, Callable[[Tensor], Tensor], Tensor, float]] = [
        ("jacobian, ODE right-hand side 10→10", ode, x10, 0.9),
        ("jacobian, MLP 784→10", net, x784, 1.0),
        ("jacobian, elementwise n = 2000", lambda x: x.sin() * x, x2000, 1.0),
        ("jacobian, tanh(W tanh(W x)) n = 500", lambda x: (W @ (W @ x).tanh()).tanh(), x500, 1.0),
    ]
    for work, f, x, target in cases:
        yield compare(work, lambda f=f, x=x: jacobian(f, x), jacobian_peers(f, x), target=target, rounds=15)
    x3 = torch.randn(3)
    t = torch.linspace(0, 1, 10_000)
    curve = lambda p: p[0] * torch.exp(-p[1] * t) + torch.sin(p[2] * t)
    tangents = torch.func.jacfwd(curve)
    yield compare(
        "jacobian, R^3→R^10000 (auto picks forward)",
        lambda: jacobian(curve, x3),
        {"torch.func.jacfwd": lambda: tangents(x3)},
        target=1.0,
    )


def predator_prey(x: Tensor) -> Tensor:
    """A 10 to 10 right-hand side with rates: numbers and constant vectors between what is pushed."""
    return RATES * x * (1 - x / 3.0) - 0.5 * x * torch.roll(x, 1) / (1.0 + RATES * x) + 0.25


def pushes() -> Iterator[Row]:
    torch.manual_seed(0)
    net, wide = mlp(784, 64, 10).requires_grad_(False), mlp(1000, 1000, 1000).requires_grad_(False)
    cases: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = [
        ("pushforward, right-hand side with rates 10→10", predator_prey, torch.rand(10)),
        ("pushforward, MLP 784→10", net, torch.randn(784)),
        ("pushforward, MLP 1000→1000, 64 inputs at once", wide, torch.randn(64, 1000)),
    ]
    for work, f, x in cases:
        v = torch.randn_like(x)
        peers: Peers = {
            "torch.func.jvp": lambda f=f, x=x, v=v: torch.func.jvp(f, (x,), (v,)),
            "autograd.functional.jvp": lambda f=f, x=x, v=v: torch.autograd.functional.jvp(f, x, v),
        }
        yield compare(work, lambda f=f, x=x, v=v: pushforward(f, x)(v), peers, rounds=15)


def orbit(p: Tensor) -> Tensor:
    """200 steps of a pendulum."""
    x, v = p[0], p[1]
    for _ in range(200):
        v = v - 0.01 * torch.sin(x)
        x = x + 0.01 * v
    return torch.stack([x, v])


def forward_inside() -> Iterator[Row]:
    energy = lambda q: 1 - torch.cos(q[0]) + q[1] ** 2 / 2
    p = torch.tensor([1.0, 0.5])
    of_energy = torch.func.grad(energy)

    def by_hand() -> Tensor:
        J, q = torch.func.jacfwd(lambda p: (orbit(p),) * 2, has_aux=True)(p)
        return of_energy(q) @ J.to(q.dtype)  # 0-dim tangents times numbers become float64 there

    ours = lambda: gradient(lambda p: energy(forwarddiff(orbit, p)), p)
    torch.testing.assert_close(ours()[0], by_hand())
    yield compare(
        "gradient through forwarddiff, 200 steps of a pendulum", ours, {"jacfwd and a product": by_hand}
    )


def build_tall(which: str) -> Callable[[], Any]:
    """A Jacobian of 10000 rows by 1000 columns, 40 MB, of an MLP of four layers."""
    net = mlp(1000, 256, 256, 256, 10_000)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(1000)
    small = torch.randn(1000, requires_grad=True)
    jacobian(lambda x: net(x)[:3], small.detach(), chunk_size=2)
    torch.func.jacrev(lambda x: net(x)[:3])(small.detach())
    reverse = torch.func.jacrev(net)
    return {"ours": lambda: jacobian(net, x), "jacrev": lambda: reverse(x)}[which]


def memory() -> Iterator[Row]:
    yield compare_memory(
        "peak memory of a Jacobian 10000 × 1000 (40 MB)",
        "benchmarks.first_order:build_tall",
        {"which": "ours"},
        {"torch.func.jacrev": {"which": "jacrev"}},
        target=1.0,
        note="promised: the matrix and at most the memory budget (a quarter of what is free, 1 GiB at most)",
    )


def many_tensors() -> tuple[list[Tensor], Params]:
    """161 tensors with 25.6 million floats: a ResNet-50's shapes, more or less."""
    torch.manual_seed(0)
    sizes = [(512, 512, 3, 3)] * 9 + [(1000, 1760)] + [(256, 256)] * 40 + [(512,)] * 111
    tensors = [torch.randn(size) for size in sizes]
    return tensors, Params(tensors)


def arithmetic() -> Iterator[Row]:
    tensors, params = many_tensors()
    loss = lambda: sum((0.5 * (t * t).sum() for t in tensors), torch.zeros(()))
    g1, g2 = gradient(loss, params), gradient(loss, params)
    left, right = [g1[p] for p in params], [g2[p] for p in params]
    floats = sum(t.numel() for t in tensors) / 1e6
    size = f"{len(tensors)} tensors, {floats:.1f} M floats"
    yield compare(
        f"g1 + g2, {size}",
        lambda: g1 + g2,
        {"torch._foreach_add": lambda: torch._foreach_add(left, right)},
        target=1.05,
        rounds=25,
        seconds=3,
    )
    held = [t.clone().requires_grad_() for t in tensors]
    for p, g in zip(held, left, strict=True):
        p.grad = g  # the same memory for both: where else it lies can make a tenth of a difference
    norm = float(torch.nn.utils.clip_grad_norm_(held, 1e9))
    yield compare(
        f"g.clip_norm_, {size}",
        lambda: g1.clip_norm_(2 * norm),
        {"nn.utils.clip_grad_norm_": lambda: torch.nn.utils.clip_grad_norm_(held, 2 * norm)},
        target=1.05,
        rounds=25,
        seconds=3,
    )


def training_steps() -> Iterator[Row]:
    torch.manual_seed(0)
    X, y = torch.randn(32, 64), torch.randint(0, 10, (32,))
    ours_model, their_model = mlp(64, 32, 10), mlp(64, 32, 10)
    params = Params(ours_model)
    ours_sgd = torch.optim.SGD(list(params), lr=1e-3)
    their_sgd = torch.optim.SGD(their_model.parameters(), lr=1e-3)

    def ours() -> None:
        grads = gradient(lambda: F.cross_entropy(ours_model(X), y), params)
        grads.clip_norm_(1.0)
        grads.assign_()
        ours_sgd.step()

    def theirs() -> None:
        their_sgd.zero_grad()
        F.cross_entropy(their_model(X), y).backward()
        torch.nn.utils.clip_grad_norm_(their_model.parameters(), 1.0)
        their_sgd.step()

    work = "training step of a small MLP: Params, clip, SGD"
    yield compare(work, ours, {"plain autograd": theirs}, target=1.15, rounds=25)
    with_value = lambda: withgradient(lambda: F.cross_entropy(ours_model(X), y), params)
    forward = list(their_model.parameters())
    plain = lambda: torch.autograd.grad(F.cross_entropy(their_model(X), y), forward)
    yield compare("withgradient of the same, without the step", with_value, {"autograd.grad by hand": plain})


def rows(full: bool = False) -> Iterator[Row]:
    """The table of the first-order functions."""
    yield from small_gradients()
    yield from jacobians()
    yield from pushes()
    yield from forward_inside()
    yield from per_sample.rows()
    yield from memory()
    yield from arithmetic()
    yield from training_steps()
