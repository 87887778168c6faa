"""Derivatives of which some entries aren't finite: the others are kept, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import HessianPlan, _certificate, _compressed, hessian, jacobian, plan_hessian

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
def test_dual_numbers_are_asked_where_the_tape_is_not_finite(sparse: bool) -> None:
    points = torch.linspace(-1, 1, 80, dtype=torch.float64).view(40, 2)
    c = points[3].clone()
    f = lambda c: torch.linalg.vector_norm(points - c, ord=3, dim=1)
    found = jacobian(f, c, mode="forward", sparse=sparse)[0].to_dense()
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found, jacobian(f, c, mode="reverse")[0])


# ---- Hessians of which entries are read from mirror images -------------------------------------------------


def chained(x: Tensor) -> Tensor:
    return (x.sqrt() * x.roll(1)).sum()


def chained_by_hand(x: Tensor) -> Tensor:
    before = x.roll(1)
    beside = 0.5 / x.sqrt()
    H = torch.diag(-0.25 * before / x**1.5) + torch.diag(beside).roll(-1, 1)
    return H + torch.diag(beside).roll(-1, 0)


@pytest.fixture
def at_zero() -> Tensor:
    x = torch.rand(30, dtype=torch.float64) + 0.5
    x[5] = 0
    return x


def right_away_from(row: int, found: Tensor, x: Tensor) -> bool:
    """Whether all is right but in the rows that this one is coupled with."""
    expected, far = chained_by_hand(x), torch.ones(30, dtype=torch.bool)
    far[row - 1 : row + 2] = False
    return torch.allclose(found[far][:, far], expected[far][:, far])


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_sparse_hessian_whose_structure_is_trusted(at_zero: Tensor, value: float) -> None:
    at_zero[5] = value
    ordinary = torch.rand(30, dtype=torch.float64) + 0.5
    plan, here = plan_hessian(chained, ordinary), plan_hessian(chained, at_zero)
    for found in (hessian(chained, at_zero, sparse=True), plan(at_zero), here(at_zero)):
        H = found.to_dense()
        assert not bool(H[5, 5].isfinite())
        assert int((~H.isfinite()).sum()) <= 11  # entries that share a row with one of that column
        assert right_away_from(5, H, at_zero)
    assert torch.equal(plan.values(at_zero).isfinite(), plan(at_zero).values().isfinite())
    inside = torch.func.vmap(plan.values)(torch.stack([at_zero, ordinary]))
    torch.testing.assert_close(inside[1], plan.values(ordinary))


def test_one_from_a_file_is_not(at_zero: Tensor, tmp_path: Path) -> None:
    plan_hessian(chained, at_zero + 1).save(tmp_path / "H.npz")
    plan = HessianPlan.load(tmp_path / "H.npz", chained)
    with pytest.warns(UserWarning, match="where derivatives aren't finite, a row or column couldn't be"):
        plan(at_zero)


def test_finite_rows_of_a_hessian_are_checked(at_zero: Tensor) -> None:
    """A structure that lacks entries far from the row that isn't finite."""
    given = chained_by_hand(at_zero + 1) != 0
    given[20, 21] = given[21, 20] = False
    plan = plan_hessian(chained, at_zero + 1, sparsity=given)
    with pytest.warns(UserWarning, match="HessianPlan: the sparse derivative differs"):
        plan(at_zero)


ODD = [float("nan"), float("inf"), -float("inf"), 3e38, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.float64])
@pytest.mark.parametrize("value", [*ODD, None])
def test_whether_all_is_finite(value: float | None, dtype: torch.dtype) -> None:
    x = torch.linspace(-1, 1, 12).to(dtype).view(3, 4)
    if value is not None:
        x[1:, 2] = value
    assert _certificate.all_finite(x) == bool(x.isfinite().all())
    assert _certificate.all_finite(x[:, :0])


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("at", ["terms", "product", "both", "none"])
def test_comparing_with_a_look_at_the_values_is_comparing(at: str, mirrored: bool) -> None:
    torch.manual_seed(0)
    for value in ODD:
        terms = torch.randn(3, 50)
        wanted = terms.sum(0)
        wanted[::7] += 10.0 ** torch.arange(-7.0, 1)
        if at in ("terms", "both"):
            terms[1, 5] = value
        if at in ("product", "both"):
            wanted[5] = value
        given = terms.sum(0), terms.abs().sum(0), wanted, torch.finfo(torch.float32).eps
        plain = _certificate.Comparison(*given, mirrored=mirrored)
        looking = _certificate.Comparison(*given, mirrored=mirrored, branches=True)
        for name in ("fine", "faint", "unknown"):
            assert torch.equal(getattr(plain, name), getattr(looking, name)), (value, name)
