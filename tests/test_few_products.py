"""By few parameters, or of few outputs, nobody looks for structure, however many elements there are."""

from __future__ import annotations

import pytest
import torch
from noted_calls import noted_calls
from torch import Tensor

from torchzygote import _structure, diaghessian, hessian, jacobian

T = torch.linspace(0, 4, 200_000, dtype=torch.float64)
P = torch.tensor([0.5, 0.8, 1.1, 0.7], dtype=torch.float64)


def curve(p: Tensor) -> Tensor:
    return p[0] * torch.exp(-p[1] * T) + p[2] * torch.sin(p[3] * T)


def loss(p: Tensor) -> Tensor:
    return ((curve(p) - 1) ** 2).mean()


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where structure was looked for."""
    return noted_calls(monkeypatch, _structure, "jacobian_patterns", "hessian_patterns")


def test_few_parameters_are_not_looked_at(looked: list[str]) -> None:
    (J,) = jacobian(curve, P)
    decay = torch.exp(-P[1] * T)
    by_hand = [decay, -P[0] * T * decay, torch.sin(P[3] * T), P[2] * T * torch.cos(P[3] * T)]
    torch.testing.assert_close(J, torch.stack(by_hand, 1))
    hessian(loss, P)
    diaghessian(loss, P)
    assert looked == []


def test_nor_are_few_outputs(looked: list[str]) -> None:
    x = torch.rand(200_000, dtype=torch.float64)
    f = lambda x: torch.stack([(x.sin() * (i + 1) * x.roll(1)).sum() for i in range(4)])
    jacobian(f, x)
    assert looked == []


def test_many_of_both_still_are(looked: list[str]) -> None:
    x = torch.rand(2000)
    jacobian(lambda x: x * x.flip(0).sin(), x)
    hessian(lambda x: ((x - x.flip(0) ** 2) ** 2).sum(), x)
    diaghessian(lambda x: ((x - x.flip(0) ** 2) ** 2).sum(), x)
    assert looked == ["jacobian_patterns", "hessian_patterns", "hessian_patterns"]


def test_what_the_recorded_graph_shows_is_not_looked_for(looked: list[str]) -> None:
    x = torch.rand(2000)
    jacobian(lambda x: x[1:] * x[:-1].sin(), x)
    hessian(lambda x: ((x[1:] - x[:-1] ** 2) ** 2).sum(), x)
    diaghessian(lambda x: ((x[1:] - x[:-1] ** 2) ** 2).sum(), x)
    assert looked == []


def test_so_is_what_is_asked_for(looked: list[str]) -> None:
    jacobian(lambda p: p.repeat(500), P, sparse=True)
    jacobian(lambda p: (p * T[:4]).repeat_interleave(2000), P, mode="reverse")  # 8000 pullbacks
    assert looked == ["jacobian_patterns", "jacobian_patterns"]
