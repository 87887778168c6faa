"""Hessians and their diagonals against torch.func, torch.autograd.functional and hand-written code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchzygote import Params, diaghessian, gradient, hessian, pullback

from ._harness import Contender, Row, compare, compare_memory, missing
from ._networks import mlp
from .peers import torch_peer

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
    yield lengths()


def lengths() -> Row:
    """Nothing that is kept of a graph serves for another length."""
    points = [torch.randn(n) for n in range(68, 132)]
    mine, theirs = itertools.cycle(points), itertools.cycle(points)
    peers: Peers = {
        "autograd.functional.hessian": lambda: torch.autograd.functional.hessian(
            rosenbrock, next(theirs), vectorize=True
        )
    }
    work = "hessian, Rosenbrock n = 68 to 131, another length in each call"
    return compare(work, lambda: hessian(rosenbrock, next(mine)), peers, rounds=11)


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
    yield compare(f"{work} two arguments", lambda: diaghessian(two, x, t), by_hand, target=1.1, rounds=15)
    one = torch.stack([x, t], 1)
    yield compare(
        f"{work} one argument",
        lambda: diaghessian(lambda z: net(z).sum(), one),
        by_hand,
        target=1.1,
        rounds=15,
    )
    yield from pinn_training()


def pinn_training(points: int = 4096) -> Iterator[Row]:
    """The gradient of a residual by the network's weights: one derivative more."""
    net, x, t = pinn(points)
    net.requires_grad_()
    params = Params(net)

    def residual() -> Tensor:
        u_xx, u_tt = diaghessian(lambda x, t: net(torch.stack([x, t], 1)).sum(), x, t)
        return (u_xx + u_tt + 1).square().mean()

    def by_hand() -> tuple[Tensor, ...]:
        a, b = x.detach().requires_grad_(), t.detach().requires_grad_()
        u = net(torch.stack([a, b], 1)).sum()
        u_a, u_b = torch.autograd.grad(u, (a, b), create_graph=True)
        (u_aa,) = torch.autograd.grad(u_a.sum(), a, create_graph=True)
        (u_bb,) = torch.autograd.grad(u_b.sum(), b, create_graph=True)
        loss = (u_aa + u_bb + 1).square().mean()
        return torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)

    for mine, other in zip(gradient(residual, params).values(), by_hand(), strict=True):
        torch.testing.assert_close(mine, other)
    yield compare(
        "gradient of a PINN's residual by its weights, 4096 points × 2",
        lambda: gradient(residual, params),
        {"nested autograd.grad by hand": by_hand},
        rounds=7,
    )


def classifier(sizes: Sequence[int], samples: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A feed-forward network with data."""
    return mlp(*sizes), torch.randn(samples, sizes[0]), torch.randint(0, sizes[-1], (samples,))


def backpack_diagonal(sizes: Sequence[int], samples: int) -> Iterator[Row]:
    """Exact diagonal by all parameters; BackPACK propagates it layer by layer, with rules for each layer."""
    work = f"diaghessian by Params, network {'-'.join(map(str, sizes))}, {samples} samples"
    backpack = torch_peer("backpack")
    if backpack is None:
        yield missing(work, "BackPACK DiagHessian")
        return
    from backpack.extensions import DiagHessian

    net, X, y = classifier(sizes, samples)
    theirs, criterion = backpack.extend(mlp(*sizes)), backpack.extend(nn.CrossEntropyLoss())
    theirs.load_state_dict(net.state_dict())
    params = Params(net)
    loss = lambda: nn.functional.cross_entropy(net(X), y)

    def peer() -> list[Tensor]:
        theirs.zero_grad()
        with backpack.backpack(DiagHessian()):
            criterion(theirs(X), y).backward()
        return [p.diag_h for p in theirs.parameters()]

    ours = diaghessian(loss, params)
    for mine, other in zip(ours.values(), peer(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
    yield compare(
        work,
        lambda: diaghessian(loss, params),
        {"BackPACK DiagHessian": peer},
        note="BackPACK takes sequences of layers that it knows",
    )


def hessian_vector_products() -> Iterator[Row]:
    work = "10 Hessian-vector products, MLP 64-256-256-10, batch 64"
    curvlinops = torch_peer("curvlinops")
    if curvlinops is None:
        yield missing(work, "curvlinops")
        return
    net = mlp(64, 256, 256, 10)
    X, y = torch.randn(64, 64), torch.randint(0, 10, (64,))
    weights = dict(net.named_parameters())
    names = list(weights)
    vectors = torch.randn(10, sum(p.numel() for p in weights.values()))
    sizes = [p.numel() for p in weights.values()]

    def loss(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(net, named, (X,)), y)

    def ours() -> list[tuple[Tensor, ...]]:
        _, back = pullback(lambda *ws: gradient(loss, *ws), *weights.values())
        found = []
        for v in vectors:
            parts = [part.view_as(p) for part, p in zip(v.split(sizes), weights.values(), strict=True)]
            found.append(back(tuple(parts)))
        return found

    operator = curvlinops.HessianLinearOperator(
        net, nn.CrossEntropyLoss(), list(net.parameters()), [(X, y)], check_deterministic=False
    )
    columns = vectors.T.contiguous()
    mine = torch.cat([g.reshape(-1) for g in ours()[0]])
    torch.testing.assert_close(mine, (operator @ columns)[:, 0], atol=1e-5, rtol=1e-3)
    yield compare(work, ours, {"curvlinops, matrix of 10": lambda: operator @ columns}, rounds=7)


def rows(full: bool = False) -> Iterator[Row]:
    """The table of the second-order functions."""
    yield from rosenbrocks()
    yield from logistic_regression()
    yield from dense_diagonal()
    yield from pinns()
    yield from backpack_diagonal((20, 16, 10, 10), 64)
    yield from backpack_diagonal((784, 100, 10), 128)
    yield from hessian_vector_products()
