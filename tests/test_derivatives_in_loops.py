"""Loops of derivatives that are differentiated themselves: a step doesn't pay for those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import _engine, checkpointed, diaghessian, gradient, hessian, jacobian, pullback
from torchzygote._torch_private import walked

X = torch.linspace(0.5, 1.5, 5, dtype=torch.float64)


def energy(x: Tensor) -> Tensor:
    return (x**2).cos().sum() + x.prod()


INNER: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient": lambda x: gradient(energy, x)[0],
    "pullback": lambda x: pullback(energy, x)[1](1.0)[0],
    "of a structure": lambda x: gradient(lambda s: energy(s["x"]), {"x": x})[0]["x"],
    "jacobian": lambda x: jacobian(lambda x: x.prod() * x.sin(), x)[0].sum(0),
    "hessian": lambda x: hessian(energy, x) @ x,
    "diaghessian": lambda x: diaghessian(energy, x)[0],
    "checkpointed gradient": lambda x: checkpointed(lambda x: gradient(energy, x)[0], x),
}


def descent(inner: Callable[[Tensor], Tensor], steps: int) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        for _ in range(steps):
            x = x - 0.01 * inner(x)
        return x.sum()

    return f


@pytest.fixture
def nodes_walked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Operations seen by each walk along a recorded graph, and those that are noted on the way."""
    found: list[int] = []
    survey = _engine.survey
    noted = walked._noted

    def counted(*args: Any) -> Any:
        seen = survey(*args)
        found.append(seen.nodes)
        return seen

    def counted_one(*args: Any) -> Any:
        found.append(1)
        return noted(*args)

    monkeypatch.setattr(_engine, "survey", counted)
    monkeypatch.setattr(walked, "_noted", counted_one)
    return found


@pytest.mark.parametrize("name", INNER)
def test_the_walks_grow_with_the_steps_not_with_their_square(name: str, nodes_walked: list[int]) -> None:
    def walked(steps: int) -> int:
        nodes_walked.clear()
        gradient(descent(INNER[name], steps), X)
        return sum(nodes_walked)

    two, four, eight = walked(2), walked(4), walked(8)
    assert 0 < eight - four <= 2.2 * (four - two)


@pytest.mark.parametrize("name", INNER)
def test_the_derivative_of_the_loop_is_what_differences_give(name: str) -> None:
    f = descent(INNER[name], 3)
    (found,) = gradient(f, X)
    step = 1e-6
    for i in range(len(X)):
        e = torch.zeros_like(X)
        e[i] = step
        torch.testing.assert_close(found[i], (f(X + e) - f(X - e)) / (2 * step), rtol=1e-6, atol=1e-8)
