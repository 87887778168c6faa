"""What ``ignore_derivatives`` gives is a constant to the structure, and one that may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detection import detect_hessian, detect_jacobian
from oracles import func_hessian, func_jacobian, true_hessian, true_jacobian
from torch import Tensor

import torchzygote as tz
from torchzygote import hessian, ignore_derivatives, jacobian, plan_hessian, plan_jacobian

N = 6
BAND = torch.eye(N, dtype=torch.float64) + torch.diag(torch.ones(N - 1, dtype=torch.float64), 1)


def by_column(x: Tensor) -> Tensor:
    """Ignored under a transform, one column at a time."""
    return torch.func.vmap(lambda column: column.sin() * ignore_derivatives(column).sum())(
        x.view(2, 3)
    ).reshape(-1)


def derived_inside(x: Tensor) -> Tensor:
    """The gradient of a function that ignores a part of itself."""
    return tz.gradient(lambda z: (z**3 * ignore_derivatives(z.sum())).sum(), x)[0]


def derived_by_func(x: Tensor) -> Tensor:
    return torch.func.grad(lambda z: (z**3 * ignore_derivatives(z.sum())).sum())(x)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "a mean": lambda x: x.sin() - ignore_derivatives(x.mean()),
    "a function": lambda x: x**2 * ignore_derivatives(lambda: x.exp().sum()),
    "a structure": lambda x: x**2 * ignore_derivatives({"a": [x.sum()]})["a"][0],
    "a view of a view": lambda x: x**2 + ignore_derivatives(x.flip(0))[1:].sum() * x[:1],
    "all of it": lambda x: ignore_derivatives(x.cumsum(0)),
    "an intermediate": lambda x: x**3 * ignore_derivatives((x * 2).sin().sum()).cos(),
    "a matrix": lambda x: ignore_derivatives(torch.diag(x)) @ x**2,
    "a mask": lambda x: x**2 * ignore_derivatives((x > 0.5).double()),
    "what is written to": lambda x: ignore_derivatives(x.cumsum(0)).mul_(2) * x**2,
    "under vmap": by_column,
    "within a gradient": derived_inside,
    "within torch.func.grad": derived_by_func,
    "forwarddiff": lambda x: tz.forwarddiff(lambda z: z**2 * ignore_derivatives(z.sum()), x),
    "checkpointed": lambda x: tz.checkpointed(lambda z: z**2 * ignore_derivatives(z.sum()), x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_structures_are_those_of_the_derivative(name: str) -> None:
    f = FUNCTIONS[name]
    x = torch.rand(N, dtype=torch.float64) + 0.2
    (found,) = detect_jacobian(f, [x])
    expected = func_jacobian(f, x)[0]
    assert not ((expected != 0) & ~found.to_dense()).any(), "a nonzero is missing"
    for plan in (plan_jacobian(f, x), plan_jacobian(f, x, mode="reverse")):
        for point in (x, torch.rand(N, dtype=torch.float64) - 0.5):
            torch.testing.assert_close(plan(point)[0].to_dense(), func_jacobian(f, point)[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_structures_to_second_order(name: str) -> None:
    f = lambda x: FUNCTIONS[name](x).sum()
    x = torch.rand(N, dtype=torch.float64) + 0.2
    (found,) = detect_hessian(f, [x])
    assert not ((func_hessian(f, x) != 0) & ~found.to_dense()).any(), "a nonzero is missing"
    plan = plan_hessian(f, x)
    for point in (x, torch.rand(N, dtype=torch.float64) - 0.5):
        expected = func_hessian(f, point)
        torch.testing.assert_close(plan(point).to_dense(), expected)
        torch.testing.assert_close(hessian(f, point, sparse=True).to_dense(), expected)


@pytest.mark.parametrize(
    "name", ["a mean", "a function", "a structure", "an intermediate", "a mask", "all of it", "under vmap"]
)
def test_nothing_is_listed_because_of_what_is_ignored(name: str) -> None:
    x = torch.rand(N, dtype=torch.float64) + 0.6
    f = FUNCTIONS[name]
    assert torch.equal(detect_jacobian(f, [x])[0].to_dense(), true_jacobian(f, x))
    total = lambda x: f(x).sum()
    assert torch.equal(detect_hessian(total, [x])[0].to_dense(), true_hessian(total, x))


def test_values_that_were_ignored_are_not_taken_for_structure() -> None:
    x = torch.zeros(N, dtype=torch.float64)
    for f in (
        lambda x: ignore_derivatives(x) * x,
        lambda x: ignore_derivatives(torch.diag(x)) @ x,
        lambda x: x ** ignore_derivatives(x),
        lambda x: ignore_derivatives(lambda: torch.diag(x) * 2) @ x,
    ):
        plan = plan_jacobian(f, x)
        point = torch.rand(N, dtype=torch.float64)
        torch.testing.assert_close(plan(point)[0].to_dense(), func_jacobian(f, point)[0])


def test_what_does_not_come_from_the_input_is_looked_at_as_before() -> None:
    f = lambda x: ignore_derivatives(BAND) @ x
    assert torch.equal(detect_jacobian(f, [torch.rand(N).double()])[0].to_dense(), BAND > 0)


def test_choices_by_what_is_ignored_are_local() -> None:
    x = torch.rand(N, dtype=torch.float64)
    choices: list[Callable[[Tensor], Any]] = [
        lambda x: x[ignore_derivatives(x).argsort()],
        lambda x: x * 2 if ignore_derivatives(x.sum()) > 0 else x.sum(),
        lambda x: x[: len(ignore_derivatives(x * 2).tolist())],
    ]
    for f in choices:
        assert detect_jacobian(f, [x])[0].is_local


def test_what_is_detached_is_listed_as_if_it_were_not() -> None:
    """As in a custom function whose derivative is that of its forward, where everything is detached."""
    x = torch.rand(N, dtype=torch.float64)
    f = lambda x: x.sin() - x.mean().detach()
    assert detect_jacobian(f, [x])[0].nnz == N * N
    torch.testing.assert_close(jacobian(f, x, sparse=True)[0].to_dense(), func_jacobian(f, x)[0])


def test_outside_of_detection_memory_is_shared() -> None:
    x = torch.rand(N)
    plan_jacobian(lambda x: x * ignore_derivatives(x), x)
    assert ignore_derivatives(x).data_ptr() == x.data_ptr()


def written_through(x: Tensor) -> Tensor:
    buffer = torch.zeros(N, dtype=x.dtype)
    ignore_derivatives(buffer).copy_(x.detach())
    return buffer * x


def written_behind(x: Tensor) -> Tensor:
    given = torch.zeros(N, dtype=x.dtype)
    constant = ignore_derivatives(given)
    given[2:] = 1.0
    return constant * x


def written_by_data(x: Tensor) -> Tensor:
    buffer = torch.zeros(N, dtype=x.dtype)
    ignore_derivatives(buffer).data.copy_(x)
    return buffer * x


def written_by_numpy(x: Tensor) -> Tensor:
    buffer = torch.zeros(N, dtype=x.dtype)
    ignore_derivatives(buffer).numpy()[:] = 1.5
    return buffer * x


@pytest.mark.parametrize("f", [written_through, written_behind, written_by_data, written_by_numpy])
def test_memory_that_is_shared_may_be_written_to(f: Callable[[Tensor], Tensor]) -> None:
    """The result shares it with what was ignored, but in the run that finds a structure."""
    x = torch.rand(N, dtype=torch.float64) + 0.2
    expected = torch.autograd.functional.jacobian(f, x)
    (found,) = detect_jacobian(f, [x])
    assert bool((found.to_dense() | (expected == 0)).all())
    torch.testing.assert_close(jacobian(f, x, sparse=True, verify=False)[0].to_dense(), expected)
    torch.testing.assert_close(plan_jacobian(f, x, verify=False)(x)[0].to_dense(), expected)
