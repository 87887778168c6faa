"""Functions that lose digits in some elements: no alarm for them, and still one for what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from doubles import Doubled
from torch import Tensor

from torchzygote import diaghessian, hessian, jacobian, plan_hessian, plan_jacobian

# Differentiated as written, these lose more digits the smaller x is.
CANCELLING: dict[str, Callable[[Tensor], Tensor]] = {
    "sin(x)/x": lambda x: torch.sin(x) / x,
    "(1-cos x)/x^2": lambda x: (1 - torch.cos(x)) / x**2,
    "expm1(x)/x": lambda x: torch.expm1(x) / x,
    "Bernoulli": lambda x: x / torch.expm1(x),
    "Langevin": lambda x: 1 / torch.tanh(x) - 1 / x,
    "log1p(x)/x": lambda x: torch.log1p(x) / x,
}
POINTS = {
    "float32": torch.logspace(-3, 0, 200),
    "float64": torch.logspace(-5, 0, 200, dtype=torch.float64),
}


def neighbours(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x) + 0.5 * f(x).roll(1)


def close(found: Tensor, expected: Tensor) -> bool:
    """As far as the digits that are left go: by the largest element of all."""
    dense = found.to_dense()
    return bool((dense - expected).abs().max() <= 1e-3 * expected.abs().max())


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("name", CANCELLING)
def test_no_alarm(name: str, points: str) -> None:
    """Warnings are errors here."""
    f, x = neighbours(CANCELLING[name]), POINTS[points]
    expected = torch.func.jacrev(f)(x)
    for mode in ("reverse", "forward"):
        assert close(jacobian(f, x, mode=mode)[0], expected)
        assert close(jacobian(f, x, mode=mode, sparse=True)[0], expected)
        assert close(plan_jacobian(f, x, mode=mode)(x)[0], expected)
    g = lambda x: CANCELLING[name](x).sum()
    H = hessian(g, x, sparse=True).to_dense()
    assert torch.equal(H, H.diagonal().diag())
    assert plan_hessian(g, x)(x).values().numel() == 200


@pytest.mark.parametrize("mode", ["reverse", "forward"])
@pytest.mark.parametrize("points", POINTS)
def test_missing_entries_are_found(points: str, mode: str) -> None:
    """A structure that lacks a band, where the others lose all their digits."""
    x = POINTS[points]
    f = neighbours(CANCELLING["sin(x)/x"])
    g = lambda x: f(x) + 1e-3 * x.roll(3)
    band = torch.eye(200) + torch.eye(200).roll(1, 0)
    plan = plan_jacobian(g, x, sparsity=band, mode=mode)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        J = plan(x)[0]
    assert close(J, torch.func.jacrev(g)(x))
    assert bool((J.to_dense()[torch.arange(3, 200), torch.arange(197)] != 0).all())


def test_what_differs_from_run_to_run_is_no_rounding() -> None:
    """In forward mode, where each product is of another run."""
    runs = itertools.count(1)
    doubled: list[Callable[[Tensor], Tensor]] = [lambda x: 2 * x]
    x = POINTS["float64"]
    plan = plan_jacobian(lambda x: doubled[0](torch.sin(x) / x), x, mode="forward", chunk_size=1)
    doubled[0] = lambda x: Doubled.apply(x) * next(runs)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        plan(x)


def test_compiled_plans_look_again() -> None:
    x = POINTS["float64"]
    plan = plan_jacobian(CANCELLING["sin(x)/x"], x)
    plan.compile(backend="eager")
    assert close(plan(x)[0], torch.func.jacrev(CANCELLING["sin(x)/x"])(x))


def negated_sizes(c: Tensor, x: Tensor) -> Tensor:
    """PyTorch's second derivatives of it are zero up to rounding, each with digits of its own."""
    return (torch.copysign(x, torch.tensor(-1.0, dtype=x.dtype)) * c).sum()


def test_no_alarm_where_a_diagonal_is_rounding_alone() -> None:
    """The values as well as what they are compared with. Warnings are errors here."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, c = torch.randn(2, 12, dtype=torch.float64, generator=generator)
        f = lambda x, c=c: negated_sizes(c, x)
        plan = plan_hessian(f, x)
        assert plan.patterns[0].nnz == 0
        assert bool((plan.diagonal(x).abs() < 1e-14).all())
        assert bool((diaghessian(f, x)[0].abs() < 1e-14).all())


def test_what_a_diagonal_hides_is_found_beside_rounding() -> None:
    x, c = torch.randn(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = lambda x: negated_sizes(c, x) + 1e-9 * (x[1:] * x[:-1]).sum()
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        d = plan_hessian(f, x, sparsity=torch.eye(12)).diagonal(x)
    assert bool((d.abs() < 1e-14).all())


def test_no_alarm_where_all_values_are_rounding() -> None:
    """Second derivatives of what is linear, though not as it is written. Warnings are errors here."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, c = torch.rand(2, 12, dtype=torch.float64, generator=generator) + 0.1
        f = lambda x, c=c: (c * x.sqrt() ** 2).sum()
        plan = plan_hessian(f, x)
        for H in (plan(x).to_dense(), hessian(f, x, sparse=True).to_dense(), plan.diagonal(x)):
            assert bool((H.abs() < 1e-12).all())
