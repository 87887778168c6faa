"""Tall Jacobians of long graphs of few numbers: one batched pullback is cheaper than columns."""

from __future__ import annotations

import pytest
import torch
from noted_calls import noted_calls
from torch import Tensor

from torchzygote import Params, gradient, jacobian, jacobians

P = torch.tensor([0.6, 0.4, 0.7, 0.5], dtype=torch.float64)


def hunters(p: Tensor) -> Tensor:
    """The two populations of Lotka and Volterra, by 60 steps of Euler's method."""
    x, y = torch.ones((), dtype=p.dtype), torch.full((), 2.0, dtype=p.dtype)
    found = []
    for _ in range(60):
        x, y = x + 0.1 * (p[0] * x - p[1] * x * y), y + 0.1 * (p[3] * x * y - p[2] * y)
        found += [x, y]
    return torch.stack(found)


def gapped(p: Tensor) -> Tensor:
    """Likewise, with a measurement that lacks."""
    factor = torch.ones(120, dtype=p.dtype)
    factor[30] = float("nan")
    return hunters(p) * p[0] * factor + p[1] * factor


def differences(p: Tensor) -> Tensor:
    h = 1e-6
    steps = h * torch.eye(4, dtype=p.dtype)
    return torch.stack([(hunters(p + e) - hunters(p - e)) / (2 * h) for e in steps], 1)


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noted_calls(monkeypatch, jacobians, "by_rows", "forward")


def test_a_long_graph_of_few_numbers_is_pulled_back(ways: list[str]) -> None:
    (J,) = jacobian(hunters, P)
    assert ways == ["by_rows"]
    torch.testing.assert_close(J, differences(P), rtol=1e-6, atol=1e-7)
    ps = Params([P])
    torch.testing.assert_close(jacobian(lambda: hunters(P), ps)[P], J)
    assert ways == ["by_rows"] * 2


def test_it_is_pushed_where_that_was_asked_for(ways: list[str]) -> None:
    torch.testing.assert_close(jacobian(hunters, P, mode="forward")[0], differences(P), rtol=1e-6, atol=1e-7)
    assert ways == ["forward"]


def test_it_is_pushed_where_rows_come_in_chunks(ways: list[str]) -> None:
    jacobian(hunters, P, chunk_size=8)
    assert ways == ["forward"]


def test_so_is_what_moves_few_bytes(ways: list[str]) -> None:
    t = torch.linspace(0, 1, 100)
    (J,) = jacobian(lambda p: p[0] * t + p[1], P[:2].float())
    assert torch.equal(J, torch.stack([t, torch.ones(100)], 1))
    assert ways == ["by_rows"]


def test_long_vectors_are_pushed(ways: list[str]) -> None:
    t = torch.linspace(0, 1, 10_000)
    jacobian(lambda p: p[0] * torch.exp(-p[1] * t) + p[2], P[:3].float())

    def long(p: Tensor) -> Tensor:
        y = p[0] * t
        for _ in range(300):
            y = y * p[1]
        return y

    jacobian(long, P[:2].float())
    assert ways == ["forward"] * 2


def test_rows_that_are_not_finite_leave_the_others_as_they_are(ways: list[str]) -> None:
    (J,) = jacobian(gapped, P)
    assert ways == ["by_rows", "forward"]
    others = torch.arange(120) != 30
    expected = P[0] * differences(P)
    expected[:, 0] += hunters(P)
    expected[:, 1] += 1
    torch.testing.assert_close(J[others], expected[others], rtol=1e-6, atol=1e-7)
    assert bool(J[30].isnan().any())


def test_it_is_differentiable() -> None:
    (got,) = gradient(lambda p: jacobian(hunters, p)[0].sum(), P)
    e = torch.eye(4, dtype=P.dtype)[0] * 1e-6
    slope = (jacobian(hunters, P + e)[0].sum() - jacobian(hunters, P - e)[0].sum()) / 2e-6
    torch.testing.assert_close(got[0], slope, rtol=1e-6, atol=1e-6)
