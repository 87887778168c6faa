"""Euclidean distances of many points, which PyTorch takes by matrix products: equal points among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dispatched import LargestResult
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
    withhessian,
)

D = torch.float64
BY_DIFFERENCES = "donot_use_mm_for_euclid_dist"
V = torch.tensor([0.7, 1.3], dtype=D)
Function = Callable[..., Any]


def grid(*shape: int) -> Tensor:
    """Points by whose coordinates products are exact, so that equal ones are at distance zero."""
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0)).to(D)


X = grid(40, 2)  # with repeated points


def kernel(x1: Tensor, x2: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Something differentiated multiplies distances that depend on it, too."""
    distances = torch.cdist(x1 * v[0], x2 * v[0], **options)
    return (v[1] * (distances**2 / 50 + (-v[1] * distances).exp())).sum()


PAIRS: dict[str, tuple[Tensor, Tensor]] = {
    "to itself": (X, X),
    "fewer rows": (X, X[:7]),
    "more rows": (X[:3], X),
    "batches": (grid(3, 30, 2), grid(3, 30, 2)[:, 5:]),
    "batches that broadcast": (grid(3, 30, 2), grid(3, 30, 2)[0]),
}
WAYS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "hessian": hessian,
    "hessian_dual": hessian_dual,
    "hessian_reverse": hessian_reverse,
    "withhessian": lambda f, v: withhessian(f, v).hess,
    "a plan": lambda f, v: plan_hessian(f, v)(v).to_dense(),
    "jacobian of gradient": lambda f, v: jacobian(lambda z: gradient(f, z)[0], v)[0],
    "gradient of gradient": lambda f, v: torch.stack(
        [gradient(lambda z, i=i: gradient(f, z)[0][i], v)[0] for i in range(v.numel())]
    ),
    "create_graph": lambda f, v: jacobian(lambda z: gradient(f, z, create_graph=True)[0], v)[0],
    "vmap": lambda f, v: torch.func.vmap(lambda z: hessian(f, z))(v.unsqueeze(0))[0],
    "jacrev of gradient": lambda f, v: torch.func.jacrev(lambda z: gradient(f, z)[0])(v),
    "jacfwd of gradient": lambda f, v: torch.func.jacfwd(lambda z: gradient(f, z)[0])(v),
    "checkpointed": lambda f, v: hessian(lambda z: checkpointed(f, z), v),
    "checkpoint": lambda f, v: hessian(lambda z: checkpoint(f, z, use_reentrant=False), v),
}


def differences(f: Function, v: Tensor) -> Tensor:
    """Of gradients by plain autograd."""

    def slope(v: Tensor) -> Tensor:
        leaf = v.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    return torch.stack([(slope(v + h) - slope(v - h)) / 2e-5 for h in 1e-5 * torch.eye(v.numel(), dtype=D)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pair", PAIRS)
def test_second_derivatives(pair: str, way: str) -> None:
    x1, x2 = PAIRS[pair]
    expected = differences(lambda v: kernel(x1, x2, v, compute_mode=BY_DIFFERENCES), V)
    found = WAYS[way](lambda v: kernel(x1, x2, v), V)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("way", ["hessian", "create_graph", "checkpointed", "checkpoint"])
def test_by_the_points(way: str) -> None:
    """Some are equal; each of them moves alone."""
    x2 = grid(40, 2)[::2] + 1.0
    f = lambda x, **options: torch.cdist(x.view(40, 2), x2, **options).add(1).log().square().sum()
    found = WAYS[way](f, X.reshape(-1))
    assert bool(torch.cdist(X, x2).eq(0).any())
    by_differences = hessian(lambda x: f(x, compute_mode=BY_DIFFERENCES), X.reshape(-1))
    torch.testing.assert_close(found, by_differences)


def test_diagonals_and_third_derivatives() -> None:
    f = lambda v, **options: kernel(X, X, v, **options)
    by_differences = lambda v: f(v, compute_mode=BY_DIFFERENCES)
    torch.testing.assert_close(diaghessian(f, V)[0], hessian(by_differences, V).diag())
    third = jacobian(lambda v: hessian(f, v), V)[0]
    torch.testing.assert_close(third, jacobian(lambda v: hessian(by_differences, v), V)[0])


def test_a_gradient_by_plain_autograd_inside() -> None:
    def f(v: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(kernel(X, X, v), v, create_graph=True)
        return slope.square().sum()

    assert bool(hessian(f, V).isfinite().all())


@pytest.mark.parametrize("mode", ["use_mm_for_euclid_dist", "use_mm_for_euclid_dist_if_necessary"])
@pytest.mark.parametrize("rows", [4, 25, 26])
def test_every_way_that_pytorch_computes_them(mode: str, rows: int) -> None:
    f = lambda v: kernel(X[:rows], X[:rows], v, compute_mode=mode)
    by_differences = lambda v: kernel(X[:rows], X[:rows], v, compute_mode=BY_DIFFERENCES)
    torch.testing.assert_close(hessian(f, V), hessian(by_differences, V))


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_values_and_gradients_are_those_of_pytorch(dtype: torch.dtype) -> None:
    x, y = torch.linspace(0, 9, 160).sin().view(2, 40, 2).to(dtype)
    y = torch.cat([y, x[:5]])
    weights = torch.linspace(-1, 1, 40 * 45, dtype=dtype).view(40, 45)
    for sides in ((True, True), (True, False), (False, True)):
        leaves = [side.clone().requires_grad_(needed) for side, needed in zip((x, y), sides, strict=True)]
        plain = torch.cdist(*leaves)
        by = [leaf for leaf in leaves if leaf.requires_grad]
        expected = torch.autograd.grad((plain * weights).sum(), by)
        seen = []

        def f(*moved: Tensor, sides: tuple[bool, bool] = sides, seen: list[Tensor] = seen) -> Tensor:
            given = iter(moved)
            seen.append(torch.cdist(*(next(given) if s else z for s, z in zip(sides, (x, y), strict=True))))
            return (seen[-1] * weights).sum()

        found = gradient(f, *(leaf.detach() for leaf in by), create_graph=True)
        assert torch.equal(seen[0], plain)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["hessian", "create_graph", "jacrev of gradient"])
@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
def test_no_points(way: str) -> None:
    f = lambda v: kernel(X, X[:0], v) + v[0] ** 2
    torch.testing.assert_close(WAYS[way](f, V), torch.diag(torch.tensor([2.0, 0.0], dtype=D)))


def test_refusals_are_those_of_pytorch() -> None:
    half = X.half()
    with pytest.raises(RuntimeError) as plain:
        torch.cdist(half, half.float())
    with pytest.raises(RuntimeError) as ours:
        hessian(lambda x: torch.cdist(x, half.float()).sum(), half.reshape(-1).view(40, 2))
    assert str(plain.value).split("\n")[0] in str(ours.value)


def test_nan_stays_nan() -> None:
    x = X.clone()
    x[3, 1] = float("nan")
    assert bool(hessian(lambda v: kernel(x, x, v), V).isnan().any())


def test_memory_and_runs() -> None:
    """No tensor of all differences, and no second run."""
    x = torch.linspace(0, 1, 300 * 8, dtype=D).sin().view(300, 8)
    runs = []

    def f(v: Tensor) -> Tensor:
        runs.append(None)
        return kernel(x, x, v)

    with LargestResult() as seen:
        found = hessian(f, V, chunk_size=1)
    assert len(runs) == 1
    assert seen.numel <= 300 * 300
    assert bool(found.isfinite().all())


def test_a_checkpoint_that_runs_again_without_us() -> None:
    """It may have saved as much as PyTorch's operator does, no more."""
    leaf, twin = V.clone().requires_grad_(), V.clone().requires_grad_()
    f = lambda v: kernel(X, X, v)
    gradient(lambda v: checkpoint(f, v, use_reentrant=False), leaf, create_graph=True)
    value = withhessian(lambda v: checkpoint(f, v, use_reentrant=False), leaf, create_graph=True).val
    value.backward()
    f(twin).backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("way", ["hessian", "hessian_dual"])
def test_compiled(way: str) -> None:
    torch.compiler.reset()
    f = lambda v: kernel(X, X, v)
    compiled = torch.compile(lambda v: WAYS[way](f, v), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(V), hessian(f, V))
