"""Functions that lose digits in some elements: no alarm for them, and still one for what is wrong."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from doubles import Doubled
from torch import Tensor

from torchzygote import hessian, jacobian, plan_hessian, plan_jacobian

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
