"""Backward passes that ``torch._dynamo.config.compiled_autograd`` has compiled: this package's own aren't."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hessian_reverse,
    hook,
    jacobian,
    plan_hessian,
    pullback,
)

W = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)
X = torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64)


def energy(x: Tensor) -> Tensor:
    return (torch.tanh(W @ x) ** 2).sum() + (x**4).sum()


PLAN = plan_hessian(energy, X)
CALLS: dict[str, Callable[[], Tensor]] = {
    "gradient": lambda: gradient(energy, X)[0],
    "gradient by Params": lambda: gradient(lambda: energy(X), Params([W]))[W],
    "pullback": lambda: pullback(torch.sin, X)[1](X)[0],
    "jacobian": lambda: jacobian(lambda x: torch.tanh(W @ x), X)[0],
    "hessian": lambda: hessian(energy, X),
    "hessian through checkpointed": lambda: hessian_reverse(lambda x: checkpointed(energy, x), X),
    "hessian through hook": lambda: hessian(lambda x: energy(hook(lambda g: 2 * g, x)), X),
    "diaghessian": lambda: diaghessian(energy, X)[0],
    "gradient of a gradient": lambda: gradient(lambda x: gradient(energy, x)[0].sin().sum(), X)[0],
    "plan": lambda: PLAN(X).to_dense(),
}


@pytest.fixture
def compiled_passes() -> Iterator[None]:
    with compiled_autograd._enable(torch.compile(backend="eager")):
        yield


@pytest.mark.parametrize("name", CALLS)
def test_values_are_those_of_uncompiled_passes(name: str, request: pytest.FixtureRequest) -> None:
    expected = CALLS[name]()
    request.getfixturevalue("compiled_passes")
    torch.testing.assert_close(CALLS[name](), expected)
    assert compiled_autograd.compiled_autograd_enabled
