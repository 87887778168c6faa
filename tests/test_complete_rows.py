"""Elements that are rounding, and nothing else: no mismatch is seen in them, and one among them is."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import (
    _complete_rows,
    diaghessian,
    hessian,
    hook,
    jacobian,
    plan_hessian,
    plan_jacobian,
)
from torchzygote._certificate import Comparison

MISMATCH = "differs from plain automatic differentiation in a product with a random vector"
DTYPES = [torch.float32, torch.float64]


def unit(v: Tensor) -> Tensor:
    """Vectors along an axis have derivatives along it that are zero but for rounding."""
    return F.normalize(v, dim=1).sin()


def along_an_axis(n: int, dtype: torch.dtype) -> Tensor:
    v = torch.randn(n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    v[:, 1] = 0
    return v.to(dtype)


def straight(n: int, dtype: torch.dtype) -> Tensor:
    s = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).cumsum(0)
    return torch.stack([s, 0 * s], 1).to(dtype)


def tangents(p: Tensor) -> Tensor:
    return F.normalize(p[1:] - p[:-1], dim=1)


def bending(p: Tensor) -> Tensor:
    """The energy of a rod."""
    t = tangents(p)
    return (1 - (t[1:] * t[:-1]).sum(1)).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("n", [10, 50, 400])
def test_rounding_is_no_mismatch(n: int, mode: str, dtype: torch.dtype) -> None:
    v = along_an_axis(n, dtype)
    (J,) = jacobian(unit, v, sparse=True, mode=mode)
    assert J.values().numel() == 4 * n
    assert torch.equal(J.to_dense(), jacobian(unit, v, sparse=True, mode=mode, verify=False)[0].to_dense())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nor_is_it_in_hessians_and_plans(dtype: torch.dtype) -> None:
    p = straight(300, dtype)
    H = hessian(bending, p, sparse=True)
    assert H.values().numel() < 30 * len(p)
    diaghessian(bending, p)
    plan = plan_jacobian(lambda p: tangents(p).sin(), torch.randn_like(p))
    assert plan(p)[0].values().numel() == 8 * (len(p) - 1)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("missing", [(0, 18), (40, 2), (98, 96)])
def test_an_entry_that_is_missing_among_them(
    missing: tuple[int, int], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the size of what is rounded, which is doubted whether it is seen to vary or not."""
    monkeypatch.setattr(Comparison, "beyond", lambda self, noise: self.faint)
    monkeypatch.setattr(Comparison, "excuse", lambda self, allowed: None)
    asked: list[bool] = []
    whole = _complete_rows._are_zero
    monkeypatch.setattr(_complete_rows, "_are_zero", lambda *args: asked.append(whole(*args)) or asked[-1])
    v = along_an_axis(50, torch.float64)
    row, column = missing
    tiny = torch.zeros(100, 100, dtype=torch.float64)
    tiny[row, column] = 1e-15

    def f(v: Tensor) -> Tensor:
        return unit(v).flatten() + tiny @ v.flatten()

    sparsity = torch.block_diag(*[torch.ones(2, 2)] * 50)
    plan = plan_jacobian(f, v, mode=mode, sparsity=sparsity)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = plan(v)[0].to_dense()
    assert [MISMATCH in str(one.message) for one in caught] == [True]
    assert asked == [False]
    assert found[row, column] == 1e-15


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_all_that_is_rounded_is_doubted(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "beyond", lambda self, noise: self.faint)
    (J,) = jacobian(unit, along_an_axis(100, torch.float64), sparse=True, mode=mode)
    assert J.values().numel() == 400


@pytest.mark.parametrize("mode", ["reverse_over_reverse", "forward_over_reverse"])
def test_a_hessian_that_lacks_an_entry_in_the_row_that_another_one_is_read_from(mode: str) -> None:
    small = 1e-3

    def f(x: Tensor) -> Tensor:
        y = 0.5e13 * x[8] ** 2 + small * x[0] * (x[1] + x[2] + x[3]) + 0.5e6 * (x[1:4] ** 2).sum()
        y = y + 0.5e6 * x[4] ** 2 + small * x[4] * (x[5] + x[6] + x[7]) + (x[5:8] ** 2).sum()
        return y + small * x[1] * x[4]

    x = torch.ones(9, dtype=torch.float64)
    expected = torch.func.hessian(f)(x)
    lacking = (expected != 0).double()
    lacking[1, 4] = lacking[4, 1] = 0
    plan = plan_hessian(f, x, sparsity=lacking, mode=mode)
    with pytest.warns(UserWarning, match=MISMATCH):
        H = plan(x)
    torch.testing.assert_close(H.to_dense(), expected)


def test_products_that_are_not_linear_are_zero_for_other_reasons() -> None:
    def bent(g: Tensor) -> Tensor:
        largest = g.abs().amax(-1, keepdim=True)
        return torch.where(largest > 0, g * (g.norm(dim=-1, keepdim=True) / largest.clamp(min=1e-300)), 0)

    f = lambda x: torch.cat([1e-2 * hook(bent, x[:4]) ** 2, 1e13 * x[4:]])
    x = torch.arange(1.0, 11.0)
    plan = plan_jacobian(f, x, mode="reverse", sparsity=torch.eye(10))
    with pytest.warns(UserWarning, match=MISMATCH):
        (J,) = plan(x)
    torch.testing.assert_close(J.to_dense().diagonal()[:4], 0.02 * x[:4])


def test_more_than_the_dense_way_takes_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comparison, "beyond", lambda self, noise: self.faint)
    asked: list[Tensor] = []
    whole = _complete_rows._are_zero
    monkeypatch.setattr(_complete_rows, "_are_zero", lambda *args: asked.append(args[0]) or whole(*args))
    node = torch.arange(300) % 6
    p = along_an_axis(6, torch.float64)
    scale = torch.linspace(0.5, 2.0, 300, dtype=torch.float64).unsqueeze(1)
    f = lambda p: F.normalize(p[node] * scale, dim=1).sin()
    plan = plan_jacobian(f, torch.randn_like(p), mode="forward")
    with pytest.warns(UserWarning, match=MISMATCH):
        plan(p)
    assert not asked


def test_a_structure_that_has_moved_in_many_rows() -> None:
    f = lambda x: torch.cat([x[:-1].sort().values, 1e17 * x[-1:]])
    x = torch.rand(200, dtype=torch.float64)
    plan = plan_jacobian(f, x.sort().values)
    with pytest.warns(UserWarning, match=MISMATCH):
        (J,) = plan(x)
    torch.testing.assert_close(J.to_dense(), torch.func.jacrev(f)(x))
