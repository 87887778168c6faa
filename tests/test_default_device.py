"""A default device that isn't the arguments' own: index arithmetic and results stay where they belong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchzygote as tz
from torchzygote import _structure_heuristics

CPU = torch.device("cpu")


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def neighbors(x: Tensor) -> Tensor:
    return x[1:] * x[:-1] ** 2


def through_buffer(x: Tensor) -> Tensor:
    buf = tz.Buffer(x, 40)
    buf[3:5] = x[:2]
    buf[torch.tensor([1, 2], device=CPU)] = x[5:7]
    return (copy.copy(buf) ** 2).sum()


def per_sample(y: Tensor) -> Tensor:
    return y.sin() * y.sum(1, keepdim=True)


def model_norm(points: Tensor, x: Tensor) -> Tensor:
    model = nn.Linear(3, 2, device=CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    grads = tz.gradient(lambda: model(points).sum(), tz.Params(model))
    return torch.cat([grads.clip_norm(1.0).to_vector(), grads.norm().reshape(1)])


TRIPLES = torch.randint(40, (3, 40), generator=torch.Generator().manual_seed(3))


def scattered(x: Tensor) -> Tensor:
    return x[TRIPLES].prod(0)


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jacobian, sparse": lambda x, y: tz.jacobian(neighbors, x, sparse=True)[0].to_dense(),
    "hessian, sparse": lambda x, y: tz.hessian(rosenbrock, x, sparse=True).to_dense(),
    "jacobian_sparsity": lambda x, y: tz.jacobian_sparsity(neighbors, x)[0].to_dense(),
    "hessian_sparsity": lambda x, y: tz.hessian_sparsity(rosenbrock, x).to_dense(),
    "JacobianPlan": lambda x, y: tz.plan_jacobian(neighbors, x)(x)[0].to_dense(),
    "JacobianPlan, refined": lambda x, y: tz.plan_jacobian(scattered, x)(x)[0].to_dense(),
    "HessianPlan": lambda x, y: tz.plan_hessian(rosenbrock, x)(x).to_dense(),
    "HessianPlan.diagonal": lambda x, y: tz.plan_hessian(rosenbrock, x).diagonal(x),
    "jacobian": lambda x, y: tz.jacobian(neighbors, x)[0],
    "jacobian, forward": lambda x, y: tz.jacobian(neighbors, x, mode="forward")[0],
    "jacobian along a batch": lambda x, y: tz.jacobian(per_sample, y)[0],
    "hessian": lambda x, y: tz.hessian(rosenbrock, x),
    "hessian_dual": lambda x, y: tz.hessian_dual(rosenbrock, x),
    "diaghessian": lambda x, y: tz.diaghessian(rosenbrock, x)[0],
    "diaghessian along a batch": lambda x, y: tz.diaghessian(lambda y: per_sample(y).sum(), y)[0],
    "gradient by Params": lambda x, y: model_norm(y, x),
    "Buffer": lambda x, y: tz.hessian(through_buffer, x),
    "checkpointed": lambda x, y: tz.gradient(lambda x: tz.checkpointed(rosenbrock, x), x)[0],
    "forwarddiff": lambda x, y: tz.gradient(lambda x: tz.forwarddiff(rosenbrock, x), x)[0],
}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Tensors that are made without a word about devices can't be computed with."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def arguments() -> tuple[Tensor, Tensor]:
    x = torch.linspace(0.1, 1, 40, device=CPU)
    return x, torch.linspace(-1, 1, 600, device=CPU).reshape(200, 3)


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_without_it(
    name: str, structured: bool, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if structured:  # the automatic way, however small
        for threshold in ("_WORTH_LOOKING", "_WORTH_LOOKING_LOCAL", "_WORTH_LOOKING_NODE"):
            monkeypatch.setattr(_structure_heuristics, threshold, 0)
    found = CASES[name](*arguments())
    torch.set_default_device(None)
    assert found.device == CPU
    torch.testing.assert_close(found, CASES[name](*arguments()))
