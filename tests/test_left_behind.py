"""What a call leaves behind: memory without the garbage collector's help, and ways that were tried first."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sines import OnceSine
from torch import Tensor

from torchzygote import (
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hook,
    jacobian,
    plan_hessian,
    plan_jacobian,
)

X = torch.linspace(0.5, 1.5, 20)


def once(x: Tensor) -> Tensor:
    y: Tensor = OnceSine.apply(2 * x)  # type: ignore[no-untyped-call]
    return y.sum()


def neighbours(x: Tensor) -> Tensor:
    mask = torch.arange(20.0) % 2
    return (x * mask)[1:]


PLAN = plan_hessian(once, X, sparsity=torch.eye(20))
CALLS: dict[str, Callable[[], Any]] = {
    "gradient": lambda: gradient(once, X),
    "the other way of a Hessian": lambda: hessian(once, X),
    "of a sparse one": lambda: hessian(once, X, sparse=True),
    "of a plan": lambda: PLAN(X, dense=True),
    "hessian_dual": lambda: hessian_dual(once, X),
    "diaghessian": lambda: diaghessian(lambda x: (x**3).sum(), X),
    "detection": lambda: jacobian(neighbours, X, sparse=True),
    "making a plan": lambda: plan_jacobian(neighbours, X),
}


@pytest.fixture
def collector_is_off() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tensors() -> int:
    return sum(1 for found in gc.get_objects() if type(found) is Tensor)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore:.*could not batch")
def test_no_tensor_is_left(name: str, collector_is_off: None) -> None:
    CALLS[name]()
    CALLS[name]()  # what is kept for later calls is there now
    gc.collect()
    before = tensors()
    for _ in range(3):
        CALLS[name]()
    assert tensors() == before


def test_an_error_keeps_nothing_either(collector_is_off: None) -> None:
    def fail() -> None:
        with pytest.raises(RuntimeError, match="no second backward"):
            hessian(once, X, mode="reverse_over_reverse")

    fail()
    gc.collect()
    before = tensors()
    fail()
    assert tensors() == before


def test_a_plan_that_goes_over_to_the_other_way_tells_hooks_no_lie() -> None:
    got: list[Tensor | None] = []
    plan = plan_hessian(lambda x: once(hook(got.append, x)), X, sparsity=torch.eye(20))
    got.clear()
    torch.testing.assert_close(plan(X, dense=True), (-4 * (2 * X).sin()).diag())
    assert got
    assert all(g is not None for g in got)
