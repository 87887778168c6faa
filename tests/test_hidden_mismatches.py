"""Mismatches beside what is far larger, or infinite: they are noticed, and rounding isn't taken for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import func_hessian, func_jacobian
from torch import Tensor

from torchzygote import (
    HessianPlan,
    JacobianPlan,
    diaghessian,
    hessian,
    jacobian,
    plan_hessian,
    plan_jacobian,
)

MISMATCH = "differs from plain automatic differentiation in a product with a random vector"
UNCHECKED = "couldn't be checked"
INF, NAN = float("inf"), float("nan")


# ---- beside what is far larger -----------------------------------------------------------------------------

SORTED = torch.tensor([1.0, 2.0, 3.0, 4.0])
OTHER = torch.tensor([3.0, 1.0, 2.0, 4.0])
SCALES = [(torch.float32, 1e6), (torch.float32, 1e20), (torch.float64, 1e16)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_small_rows_of_a_jacobian_are_checked(
    mode: str, compiled: bool, dtype: torch.dtype, scale: float
) -> None:
    f = lambda x: torch.cat([x[:3].sort().values, scale * x[3:]])
    plan = plan_jacobian(f, SORTED.to(dtype), mode=mode)
    if compiled:
        plan.compile(backend="eager")
    x = OTHER.to(dtype)
    with pytest.warns(UserWarning, match=MISMATCH):
        (J,) = plan(x)
    assert torch.equal(J.to_dense(), func_jacobian(f, x)[0])
    with pytest.raises(RuntimeError, match="contradicts the values"):
        plan.values(x)


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
@pytest.mark.parametrize("mode", ["forward_over_reverse", "reverse_over_reverse"])
def test_small_rows_of_a_hessian_are_checked(mode: str, dtype: torch.dtype, scale: float) -> None:
    g = lambda x: x[:3].sort().values[:2].prod() + (scale * x[3] ** 2 if x.numel() > 3 else 0)
    plan = plan_hessian(g, SORTED.to(dtype), mode=mode)
    x = OTHER.to(dtype)
    for create_graph in (False, True):
        with pytest.warns(UserWarning, match=MISMATCH):
            H = plan(x, create_graph=create_graph)
        torch.testing.assert_close(H.to_dense(), func_hessian(g, x))


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_small_entries_of_a_diagonal_are_checked(dtype: torch.dtype, scale: float) -> None:
    g = lambda x: (x[:3].sort().values[:2].sum() ** 2) + scale * x[3] ** 2
    x = OTHER.to(dtype)
    plan = plan_hessian(g, x, sparsity=torch.eye(4))
    with pytest.warns(UserWarning, match=MISMATCH):
        d = plan.diagonal(x)
    torch.testing.assert_close(d, func_hessian(g, x).diagonal())


@pytest.mark.parametrize("scale", [1e6, 1e12])
def test_scattering_notices_it_too(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchzygote._plans.evaluation.check_tables", lambda *args: None)
    test_small_rows_of_a_jacobian_are_checked("forward", False, torch.float32, scale)
    test_small_rows_of_a_jacobian_are_checked("reverse", False, torch.float32, scale)
    test_small_rows_of_a_hessian_are_checked("reverse_over_reverse", torch.float32, scale)


def test_a_missing_entry_in_a_row_of_another_column() -> None:
    """Reverse mode compares columns: one that lacks an entry in a row whose others are large."""
    A = torch.tensor([[1e6, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    f = lambda x: A @ x
    for mode in ("forward", "reverse"):
        plan_jacobian(f, torch.ones(3), mode=mode, sparsity=A)(torch.ones(3))
    with pytest.warns(UserWarning, match=MISMATCH):
        plan_jacobian(f, torch.ones(3), mode="reverse", sparsity=A * (A != 1) + torch.eye(3))(torch.ones(3))


# ---- rounding ----------------------------------------------------------------------------------------------


def large(u: Tensor) -> float:
    """Beside it, anything may be rounding."""
    return 1e8 if u.dtype == torch.float32 else 1e17


def left_over(u: Tensor) -> Tensor:
    """(big + small) - big, of many sizes."""
    big = torch.logspace(0, 12, u.numel() - 1).to(u)
    return torch.cat([(big * u[1:] + u[:-1].sin()) - big * u[1:], large(u) * u[:5]])


def swamped(u: Tensor) -> Tensor:
    """Entries that are lost beside what cancels, unless it is multiplied with zero."""
    big = 1e4 if u.dtype == torch.float32 else 1e12
    return torch.cat(
        [(big * u[1:] + 1e-3 * u[:-1] * u[1:]) - big * u[1:] + 0.1 * u[:-1], large(u) * u[:5].sin()]
    )


def stiff(u: Tensor) -> Tensor:
    """Diffusion on a fine grid and slow reactions, with rates from 1e-8 to 1e8."""
    rates = torch.logspace(-8, 8, u.numel()).to(u)
    pad = torch.nn.functional.pad(u, (1, 1))
    return 1e8 * (pad[2:] - 2 * u + pad[:-2]) + rates * u - u**3


def rates_only(u: Tensor) -> Tensor:
    rates = torch.logspace(-12, 12, u.numel()).to(u)
    return rates * (u - u.roll(1)) * u + 1e7 * (u + 1e-3 * u.roll(-1)) - 1e7 * u


def saturated(u: Tensor) -> Tensor:
    return torch.cat([(40 * u.view(-1, 4)).softmax(1).reshape(-1), large(u) * u[:4].sigmoid()])


def one_cancels(u: Tensor) -> Tensor:
    """A single row of rounding beside a large one."""
    return torch.stack([(1e4 * u[0] + 1e-3 * u[1] * u[0]) - 1e4 * u[0], large(u) * u[2].sin(), u[3] * u[1]])


ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    f.__name__: f for f in (left_over, swamped, stiff, rates_only, saturated, one_cancels)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_is_no_mismatch(name: str, dtype: torch.dtype) -> None:
    f = ROUNDING[name]
    point = lambda seed: torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    plans = [plan_jacobian(f, point(0), mode=mode) for mode in ("forward", "reverse")]
    second = plan_hessian(lambda x: (f(x) * x.repeat(2)[: f(x).numel()].sin()).sum(), point(0))
    for seed in range(1, 30):
        for plan in plans:
            plan(point(seed))
        second(point(seed))
        second.diagonal(point(seed))


def test_sums_of_a_million_terms() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(1))
    f = lambda x: torch.stack([x.square().sum(), 1e8 * x[:10].sum(), x[::2].sin().sum(), x[0] * 1e-6])
    plan_jacobian(f, x)(x)
    windows = lambda x: x[:1000].cumsum(0)
    plan_jacobian(windows, x[:1000])(x[:1000])


def test_no_product_is_added_where_all_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        raise AssertionError("products are repeated")

    monkeypatch.setattr("torchzygote._repetition.Repetition._repeated", fail)
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(5000, generator=torch.Generator().manual_seed(2), dtype=dtype)
        f = lambda x: x[1:].sin() * x[:-1] * torch.logspace(-12, 12, 4999, dtype=dtype)
        for mode in ("forward", "reverse"):
            plan_jacobian(f, x, mode=mode)(x)
        plan_hessian(lambda x: (x[1:] - x[:-1] ** 2).square().sum(), x)(x)


# ---- beside what is infinite -------------------------------------------------------------------------------


def roots(x: Tensor) -> Tensor:
    return x[:3].sort().values + x[3].sqrt()


AT_ZERO = torch.tensor([3.0, 1.0, 2.0, 0.0])
GIVEN = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("sparsity", [None, GIVEN], ids=["local", "given"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_row_that_is_not_finite_is_computed_the_dense_way(
    mode: str, sparsity: Tensor | None, compiled: bool
) -> None:
    plan = plan_jacobian(roots, SORTED, mode=mode, sparsity=sparsity)
    if compiled:
        plan.compile(backend="eager")
    with pytest.warns(UserWarning, match=UNCHECKED if mode == "forward" else MISMATCH):
        (J,) = plan(AT_ZERO)
    assert torch.equal(J.to_dense(), func_jacobian(roots, AT_ZERO)[0])
    with pytest.raises(RuntimeError, match="aren't finite" if mode == "forward" else "contradicts"):
        plan.values(AT_ZERO)


def test_a_column_that_is_not_finite_too() -> None:
    f = lambda x: torch.cat([x[:3].sort().values * x[3], x[3:].sqrt()])
    plan = plan_jacobian(f, SORTED, mode="reverse", sparsity=torch.eye(4))
    x = torch.tensor([1.0, 2.0, 3.0, 0.0])
    with pytest.warns(UserWarning, match=UNCHECKED):
        (J,) = plan(x)
    torch.testing.assert_close(J.to_dense(), func_jacobian(f, x)[0], equal_nan=True)


def test_a_hessian_too() -> None:
    g = lambda x: x[:3].sort().values[:2].prod() + x[:3].sum() * x[3].sqrt()
    plan = plan_hessian(g, SORTED)
    with pytest.warns(UserWarning, match=UNCHECKED):
        H = plan(AT_ZERO)
    torch.testing.assert_close(H.to_dense(), hessian(g, AT_ZERO), equal_nan=True)


def test_a_plan_from_a_file_too(tmp_path: Path) -> None:
    f = lambda x: x[:3] * 2 + x[3].sqrt()
    g = lambda x: f(x).square().sum()
    plan_jacobian(f, SORTED, mode="forward").save(tmp_path / "J.npz")
    plan_hessian(g, SORTED).save(tmp_path / "H.npz")
    with pytest.warns(UserWarning, match=UNCHECKED):
        JacobianPlan.load(tmp_path / "J.npz", f)(AT_ZERO)
    with pytest.warns(UserWarning, match=UNCHECKED):
        HessianPlan.load(tmp_path / "H.npz", g)(AT_ZERO)


@pytest.mark.parametrize("value", [0.0, INF, NAN])
def test_structure_that_holds_everywhere_is_trusted(value: float) -> None:
    f = lambda x: x[:3] * 2 + x[3].sqrt()
    x = torch.tensor([3.0, 1.0, 2.0, value])
    for mode in ("forward", "reverse"):
        plan_jacobian(f, SORTED, mode=mode)(x)
    jacobian(f, x, sparse=True, mode="reverse")
    jacobian(roots, x, sparse=True, mode="reverse")  # found at this very point
    plan_hessian(lambda x: f(x).square().sum(), SORTED)(x)
    hessian(lambda x: roots(x).square().sum(), x, sparse=True)


def test_without_the_check_nothing_is_asked() -> None:
    plan_jacobian(roots, SORTED, mode="forward", verify=False)(AT_ZERO)


def test_in_a_transform_it_is_nan() -> None:
    plan = plan_jacobian(roots, SORTED, mode="forward")
    assert torch.func.vmap(lambda x: plan(x, dense=True)[0])(AT_ZERO.unsqueeze(0)).isnan().all()


def test_a_diagonal_has_no_entries_beside() -> None:
    g = lambda x: x[:3].sort().values[0] ** 2 + x[3] ** 1.5
    plan = plan_hessian(g, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    d = plan.diagonal(torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert torch.equal(d, diaghessian(g, torch.tensor([1.0, 2.0, 3.0, 0.0]))[0])


def test_rounding_of_a_whole_row_is_no_excuse_for_an_entry_that_lacks() -> None:
    """Each of its terms loses digits, which may add up to less than what is missing only."""
    n, per_row, size = 400, 20, 1e4
    i = torch.arange(n)
    columns = (i[:, None] + torch.arange(per_row)) % n
    listed = torch.zeros(n, n, dtype=torch.bool)
    listed[i[:, None], columns] = True

    def f(x: Tensor) -> Tensor:
        y = (x * size - x * (size - 1))[columns].sum(1)
        return torch.cat([y[:1] + x[n // 2], y[1:]])

    x = torch.rand(n)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        J = plan_jacobian(f, x, sparsity=listed)(x)[0]
    assert J.to_dense()[0, n // 2] == 1
