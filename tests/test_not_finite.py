"""Derivatives of which some entries aren't finite: the others are kept, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import _compressed, jacobian

T = torch.linspace(0, 3, 40, dtype=torch.float64)
DATA = torch.linspace(1, 2, 40, dtype=torch.float64)
DATA[7] = float("nan")
P = torch.tensor([1.5, 0.5], dtype=torch.float64)

# the model, its derivative by hand, and the row where there is none
MODELS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, int]] = {
    "root at zero": (
        lambda p: p[0] * torch.sqrt(p[1] * T),
        torch.stack([torch.sqrt(P[1] * T), P[0] * T / (2 * torch.sqrt(P[1] * T))], 1),
        0,
    ),
    "a measurement that lacks": (
        lambda p: p[0] * DATA + p[1] ** 2,
        torch.stack([DATA, (2 * P[1]).expand(40)], 1),
        7,
    ),
    "logarithm at zero": (
        lambda p: p[0] * T.log() + p[1] ** 3,
        torch.stack([T.log(), (3 * P[1] ** 2).expand(40)], 1),
        0,
    ),
    "one over zero": (lambda p: p[0] / T + p[1], torch.stack([1 / T, torch.ones_like(T)], 1), 0),
}


@pytest.fixture
def silent() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"mode": "forward"}, {"mode": "forward", "sparse": True}])
def test_a_row_that_is_not_finite_leaves_the_others_as_they_are(name: str, options: dict[str, Any]) -> None:
    f, expected, row = MODELS[name]
    found = jacobian(f, P, **options)[0].to_dense()
    others = torch.arange(40) != row
    torch.testing.assert_close(found[others], expected[others])
    assert not bool(found[row].isfinite().all())


@pytest.mark.usefixtures("silent")
def test_nor_does_it_in_a_diagonal_pushed_forward() -> None:
    x = torch.rand(30, dtype=torch.float64) + 0.5
    x[5] = 0
    found = jacobian(lambda x: x.sqrt() + x.roll(1) ** 2, x, sparse=True, mode="forward")[0].to_dense()
    expected = torch.diag(0.5 / x.sqrt()) + torch.diag(2 * x.roll(1)).roll(-1, 1)
    others = torch.arange(30) != 5
    torch.testing.assert_close(found[others], expected[others])


class TwiceTooLarge(torch.autograd.Function):
    """A square, whose forward derivative is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Any:
        return 4 * ctx.saved_tensors[0] * t


@pytest.mark.parametrize("options", [{}, {"mode": "forward"}])
def test_finite_rows_beside_it_are_checked(options: dict[str, Any]) -> None:
    f = lambda p: p[0] / T + TwiceTooLarge.apply(p[1] * torch.ones_like(T))
    with pytest.warns(UserWarning, match="jacobian: forward mode gave another derivative"):
        found = jacobian(f, P, **options)[0]
    torch.testing.assert_close(found[:, 1], torch.full_like(T, 2 * float(P[1])))


def test_so_are_those_of_compressed_values(monkeypatch: pytest.MonkeyPatch) -> None:
    f = lambda p: torch.cat([p[0] / T + p[2] * T, p[1] * T])
    p = torch.cat([P, P[:1]])
    original = _compressed.collect

    def spoiled(*args: Any) -> Any:
        found = original(*args)
        found.values[0][-1] *= 1.01
        return found

    monkeypatch.setattr(_compressed, "collect", spoiled)
    with pytest.warns(UserWarning, match="jacobian: the sparse derivative"):
        found = jacobian(f, p, mode="forward", sparse=True)[0].to_dense()
    torch.testing.assert_close(found[40:, 1], T)


@pytest.mark.parametrize("sparse", [False, True])
def test_reverse_mode_is_preferred_where_it_is_finite(sparse: bool) -> None:
    points = torch.linspace(-1, 1, 80, dtype=torch.float64).view(40, 2)
    c = points[3].clone()
    f = lambda c: torch.linalg.vector_norm(points - c, ord=3, dim=1)
    with pytest.warns(UserWarning, match="forward mode gave another|the sparse derivative"):
        found = jacobian(f, c, mode="forward", sparse=sparse)[0].to_dense()
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, jacobian(f, c, mode="reverse")[0])
