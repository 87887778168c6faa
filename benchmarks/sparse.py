"""Sparse Jacobians, Hessians and diagonals: detection, coloring and evaluation, against asdex and by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchzygote import diaghessian, hessian, jacobian, jacobian_sparsity, plan_hessian, plan_jacobian
from torchzygote.plans import HessianPlan, JacobianPlan

from ._harness import Contender, Row, compare, growth, make_row, peak_memory
from .first_order import by_hand
from .peers import jax_contender
from .second_order import nested_by_hand, pinn, rosenbrock

Peers = dict[str, Contender | None]


def normal(*shape: int) -> Tensor:
    """The values that :mod:`benchmarks.jax_server` takes."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).float()


def brusselator(side: int) -> Callable[[Tensor], Tensor]:
    """The 2-D Brusselator on a periodic grid, both species in one flat vector."""
    scale = 0.1 * (side - 1) ** 2

    def laplacian(w: Tensor) -> Tensor:
        return w.roll(1, 0) + w.roll(-1, 0) + w.roll(1, 1) + w.roll(-1, 1) - 4 * w

    def f(u: Tensor) -> Tensor:
        a, b = u.view(2, side, side)
        da = 1.0 + a**2 * b - 4.4 * a + scale * laplacian(a)
        db = 3.4 * a - a**2 * b + scale * laplacian(b)
        return torch.stack([da, db]).view(-1)

    return f


def compiled(plan: JacobianPlan | HessianPlan, x: Tensor, expected: Tensor) -> Contender:
    """A compiled plan, warm; what it gives is compared with what the eager one gave."""
    plan.compile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about itself
        found = plan(x)
    torch.testing.assert_close(csr(found), expected, atol=1e-4, rtol=1e-4)
    return lambda: plan(x)


def csr(found: Any) -> Tensor:
    """The only matrix among results."""
    matrix: Tensor = found[0] if isinstance(found, tuple) else found
    return matrix


# ---------------------------------------------------------------------------------------------------------
# the diagonal of a Hessian in a million dimensions


def diagonals(n: int = 1_000_000) -> Iterator[Row]:
    """Counted in gradients."""
    x = normal(n)
    gradient: Peers = {"one gradient, autograd.grad": by_hand(rosenbrock, x)}
    work = f"diaghessian, Rosenbrock n = {n}, everything included"
    yield compare(work, lambda: diaghessian(rosenbrock, x), gradient, target=120, rounds=3)
    plan = plan_hessian(rosenbrock, x)
    torch.testing.assert_close(plan.diagonal(x), diaghessian(rosenbrock, x)[0])
    work = f"diagonal of a Hessian by a plan, Rosenbrock n = {n}"
    yield compare(work, lambda: plan.diagonal(x), gradient, target=12, rounds=9)


# ---------------------------------------------------------------------------------------------------------
# the Jacobian of a stiff partial differential equation


def seeds_by_hand(f: Callable[[Tensor], Tensor], x: Tensor, seeds: Tensor) -> Callable[[], Tensor]:
    """Compressed columns: what one writes where the coloring is known."""
    push = lambda seed: torch.func.jvp(f, (x,), (seed,))[1]
    return lambda: torch.func.vmap(push)(seeds)


def jacobian_rows(side: int = 128) -> Iterator[Row]:
    """The Brusselator."""
    f, u = brusselator(side), normal(2 * side * side)
    work = f"Brusselator {side}×{side}: "
    plan = plan_jacobian(f, u)
    expected = csr(plan(u))
    columns = plan_jacobian(f, u, mode="forward")
    seeds = (columns.colors == torch.arange(columns.ncolors).unsqueeze(1)).float()
    by_seeds: Peers = {"vmap(jvp) over the color seeds by hand": seeds_by_hand(f, u, seeds)}
    yield compare(work + "Jacobian, plan reused", lambda: plan(u), by_seeds, target=1.1, rounds=15)
    evaluation: Peers = {"asdex, jit": jax_contender("sparse_brusselator", side=side)}
    once: Peers = {"asdex": jax_contender("sparse_brusselator_coloring", side=side)}
    mine = compiled(plan, u, expected)
    yield compare(work + "Jacobian, plan reused, compiled", mine, evaluation, target=1.3, rounds=15)
    work += "detection and coloring"
    yield compare(work, lambda: plan_jacobian(brusselator(side), u), once, target=0.3, seconds=0, rounds=3)


def hessian_rows(n: int = 100_000) -> Iterator[Row]:
    """The chained Rosenbrock function."""
    x = normal(n)
    work = f"Rosenbrock n = {n}: "
    plan = plan_hessian(rosenbrock, x)
    expected = csr(plan(x))
    evaluation: Peers = {"asdex, jit": jax_contender("sparse_rosenbrock", n=n)}
    once: Peers = {"asdex": jax_contender("sparse_rosenbrock_coloring", n=n)}
    yield compare(work + "Hessian, plan reused", lambda: plan(x), evaluation)
    mine = compiled(plan_hessian(rosenbrock, x), x, expected)
    yield compare(
        work + "Hessian, plan reused, compiled",
        mine,
        evaluation,
        target=1.3,
        rounds=15,
        note="four products, one of them for the check, where asdex takes three and checks nothing; between "
        "runs of the same code, asdex's time has varied by half",
    )
    work += "detection and coloring"
    yield compare(
        work, lambda: plan_hessian(lambda x: rosenbrock(x), x), once, target=0.1, seconds=0, rounds=2
    )


def pinn_rows(points: int = 4096) -> Iterator[Row]:
    """No hint is given that one point's value doesn't depend on the others."""
    net, x, t = pinn(points)
    hand: Peers = {"nested autograd.grad by hand": nested_by_hand(net, x, t)}
    f = lambda x, t: net(torch.stack([x, t], 1)).sum()
    work = f"second derivatives of a PINN, {points} points × 2, no hint given"
    yield compare(work, lambda: diaghessian(f, x, t), hand, target=1.2, rounds=9)


# ---------------------------------------------------------------------------------------------------------
# growth


def growth_rows(sides: Sequence[int], rounds: int) -> Iterator[Row]:
    """From ten thousand to a million unknowns."""
    points = {side: (brusselator(side), normal(2 * side * side)) for side in sides}

    def by_size(make: Callable[[Callable[[Tensor], Tensor], Tensor], Contender]) -> dict[int, Contender]:
        return {u.numel(): make(f, u) for f, u in points.values()}

    def evaluation(f: Callable[[Tensor], Tensor], u: Tensor) -> Contender:
        plan = plan_jacobian(f, u)
        return lambda: plan(u)

    detection = by_size(lambda f, u: lambda: jacobian_sparsity(f, u))
    everything = by_size(lambda f, u: lambda: jacobian(f, u, sparse=True))
    vectors = {n: normal(n) for n in (10_000, 100_000, 1_000_000)}
    matrices = {n: (lambda x=x: hessian(rosenbrock, x, sparse=True)) for n, x in vectors.items()}
    for work, contenders in (
        ("Brusselator: detection", detection),
        ("Brusselator: Jacobian by a plan", by_size(evaluation)),
        ("Brusselator: sparse Jacobian, everything", everything),
        ("Rosenbrock: sparse Hessian, everything", matrices),
    ):
        yield growth(work, contenders, target=1.1, seconds=0, rounds=rounds)


# ---------------------------------------------------------------------------------------------------------
# memory


def build_jacobian(side: int, by: str) -> Callable[[], Any]:
    """A sparse Jacobian of the Brusselator, by a plan made before or with everything."""
    small, v = brusselator(8), normal(128)
    jacobian(small, v, sparse=True)
    f, u = brusselator(side), normal(2 * side * side)
    if by == "everything":
        return lambda: jacobian(f, u, sparse=True)
    plan = plan_jacobian(f, u)
    plan_jacobian(small, v)(v)
    return lambda: plan(u)


def memory_rows(side: int = 181) -> Iterator[Row]:
    """Peak memory beyond the chunk of products, against values and indices."""
    f, u = brusselator(side), normal(2 * side * side)
    plan = plan_jacobian(f, u)
    matrix = csr(plan(u))
    nbytes = sum(
        part.numel() * part.element_size()
        for part in (matrix.values(), matrix.col_indices(), matrix.crow_indices())
    )
    chunk = plan.ncolors * u.numel() * u.element_size() / 2**20
    for by in ("everything", "plan"):
        peak = peak_memory("benchmarks.sparse:build_jacobian", {"side": side, "by": by})
        yield make_row(
            f"peak memory of a sparse Jacobian, Brusselator {side}×{side}, {by}",
            peak,
            "values and indices",
            nbytes / 2**20,
            ratio=max(0.0, peak - chunk) * 2**20 / nbytes,
            target=10,
            unit="MB",
            note=f"the ratio leaves out the chunk of products, {chunk:.3g} MB",
        )


def rows(full: bool = False) -> Iterator[Row]:
    """The table of the sparse derivatives."""
    torch.compiler.reset()
    yield from diagonals()
    yield from jacobian_rows()
    yield from hessian_rows()
    yield from pinn_rows()
    yield from growth_rows((71, 128, 224, 400, 707) if full else (71, 224, 707), rounds=5 if full else 1)
    yield from memory_rows()
