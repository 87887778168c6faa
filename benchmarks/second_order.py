"""Hessians and their diagonals against torch.func, torch.autograd.functional and hand-written code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchzygote import diaghessian, hessian

from ._harness import Contender, Row, compare, compare_memory

Peers = dict[str, Contender | None]


def rosenbrock(x: Tensor) -> Tensor:
    """The chained Rosenbrock function."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def hessian_peers(f: Callable[[Tensor], Tensor], x: Tensor) -> Peers:
    """The ways PyTorch itself offers."""
    mixed = torch.func.hessian(f)
    reverse = torch.func.jacrev(torch.func.jacrev(f))
    return {
        "torch.func.hessian": lambda: mixed(x),
        "jacrev(jacrev)": lambda: reverse(x),
        "autograd.functional.hessian": lambda: torch.autograd.functional.hessian(f, x, vectorize=True),
    }


def rosenbrocks() -> Iterator[Row]:
    torch.manual_seed(0)
    for n in (10, 100, 1000):
        x = torch.randn(n)
        yield compare(
            f"hessian, Rosenbrock n = {n}",
            lambda x=x: hessian(rosenbrock, x),
            hessian_peers(rosenbrock, x),
            target=1.0,
            rounds=11,
        )


def logistic(samples: int = 2000, n: int = 500) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The mean loss of a logistic regression, and weights."""
    torch.manual_seed(0)
    X, y = torch.randn(samples, n), (torch.rand(samples) < 0.5).float()
    loss = lambda w: torch.nn.functional.binary_cross_entropy_with_logits(X @ w, y)
    return loss, 0.1 * torch.randn(n)


def logistic_regression() -> Iterator[Row]:
    loss, w = logistic()
    yield compare(
        "hessian, logistic regression n = 500, 2000 samples",
        lambda: hessian(loss, w),
        hessian_peers(loss, w),
        target=0.8,
        rounds=11,
    )


def dense_network(batch: int = 16) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A loss as a function of the 64 × 64 weights of its first tanh layer: 4096 coordinates, no zeros."""
    torch.manual_seed(0)
    X, readout = torch.randn(batch, 64), torch.randn(64)
    loss = lambda w: ((X @ w.view(64, 64)).tanh() @ readout).square().mean()
    return loss, torch.randn(4096) / 8


def build_diagonal(which: str) -> Callable[[], Any]:
    """The diagonal of a dense Hessian, n = 4096, one of several ways."""
    loss, w = dense_network()
    small, v = (lambda x: x.tanh().square().sum()), torch.randn(5)
    diaghessian(small, v)
    for peer in hessian_peers(small, v).values():
        assert callable(peer)
        peer()
    if which == "ours":
        return lambda: diaghessian(loss, w)
    return diagonal_peers(loss, w)[which]


def diagonal_peers(loss: Callable[[Tensor], Tensor], w: Tensor) -> dict[str, Callable[[], Any]]:
    """The diagonal of the whole matrix."""
    mixed = torch.func.hessian(loss)
    reverse = torch.func.jacrev(torch.func.jacrev(loss))
    return {
        "torch.func.hessian": lambda: mixed(w).diagonal(),
        "jacrev(jacrev)": lambda: reverse(w).diagonal(),
        "autograd.functional.hessian": lambda: torch.autograd.functional.hessian(
            loss, w, vectorize=True
        ).diagonal(),
    }


def dense_diagonal() -> Iterator[Row]:
    loss, w = dense_network()
    work = "diaghessian, dense 64-64 tanh network, n = 4096"
    peers: Peers = {f"diagonal of {name}": run for name, run in diagonal_peers(loss, w).items()}
    yield compare(work, lambda: diaghessian(loss, w), peers, target=0.6, rounds=3)
    yield compare_memory(
        f"peak memory of {work}",
        "benchmarks.second_order:build_diagonal",
        {"which": "ours"},
        {f"diagonal of {name}": {"which": name} for name in diagonal_peers(loss, w)},
        target=0.1,
    )


def pinn(points: int = 4096) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small physics-informed network and its collocation points."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net, torch.rand(points), torch.rand(points)


def nested_by_hand(net: nn.Module, x: Tensor, t: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    """u_xx and u_tt at every point, by nested ``torch.autograd.grad``."""

    def run() -> tuple[Tensor, Tensor]:
        a, b = x.detach().requires_grad_(), t.detach().requires_grad_()
        u = net(torch.stack([a, b], 1)).sum()
        u_a, u_b = torch.autograd.grad(u, (a, b), create_graph=True)
        (u_aa,) = torch.autograd.grad(u_a.sum(), a, retain_graph=True)
        (u_bb,) = torch.autograd.grad(u_b.sum(), b)
        return u_aa, u_bb

    return run


def pinns() -> Iterator[Row]:
    net, x, t = pinn()
    by_hand: Peers = {"nested autograd.grad by hand": nested_by_hand(net, x, t)}
    two = lambda x, t: net(torch.stack([x, t], 1)).sum()
    work = "second derivatives of a PINN, 4096 points × 2,"
    yield compare(f"{work} two arguments", lambda: diaghessian(two, x, t), by_hand, target=1.1, rounds=5)
    one = torch.stack([x, t], 1)
    yield compare(
        f"{work} one argument",
        lambda: diaghessian(lambda z: net(z).sum(), one),
        by_hand,
        target=1.1,
        rounds=5,
    )


def rows(full: bool = False) -> Iterator[Row]:
    """The table of the second-order functions."""
    yield from rosenbrocks()
    yield from logistic_regression()
    yield from dense_diagonal()
    yield from pinns()
