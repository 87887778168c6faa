"""Plans of functions whose derivatives are full: the dense answer, and no list of their entries."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torchzygote
from torchzygote import HessianPlan, JacobianPlan, plan_hessian, plan_jacobian
from torchzygote.sparsity._picture import picture
from torchzygote.sparsity.pattern import Pattern

N = 6


def softmax(x: Tensor) -> Tensor:
    return x.softmax(0)


def penalty(x: Tensor) -> Tensor:
    return (x.softmax(0) ** 3).sum()


def point(n: int = N, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(-1, 2, n, dtype=dtype) ** 2


def jacobian_of(f: object, *xs: Tensor) -> tuple[Tensor, ...]:
    found = torch.autograd.functional.jacobian(f, xs)
    return tuple(J.reshape(-1, x.numel()) for J, x in zip(found, xs, strict=True))


@pytest.fixture(autouse=True)
def _no_list_of_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a sparse result may list what is full."""

    def rows(_: Pattern) -> Tensor:
        raise AssertionError("the rows of all entries were listed")

    plain = Pattern.rows
    monkeypatch.setattr(Pattern, "rows", lambda self: rows(self) if self.lists_all else plain(self))


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_jacobians(mode: str, dtype: torch.dtype) -> None:
    x = point(dtype=dtype)
    (expected,) = jacobian_of(softmax, x)
    plan = plan_jacobian(softmax, x, mode=mode)
    assert plan.ncolors == N
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (sparse,), (dense,) = plan(x), plan(x, dense=True)
    assert not dense._is_view()
    for J in (dense, sparse.to_dense()):
        torch.testing.assert_close(J, expected)
    assert sparse.values().numel() == N * N


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_several_arguments_some_of_them_full(mode: str) -> None:
    f = lambda x, y, b: torch.outer(x, y).softmax(0).sum(1) + b.sin()
    xs = point(4), point(3) - 1, point(4)
    plan = plan_jacobian(f, *xs, mode=mode)
    assert [pattern.lists_all for pattern in plan.patterns] == [True, True, False]
    for J, expected in zip(plan(*xs, dense=True), jacobian_of(f, *xs), strict=True):
        torch.testing.assert_close(J, expected)


@pytest.mark.parametrize("mode", ["auto", "forward_over_reverse", "reverse_over_reverse"])
def test_hessians_and_their_diagonals(mode: str) -> None:
    x = point()
    expected = torch.autograd.functional.hessian(penalty, x)
    plan = plan_hessian(penalty, x, mode=mode)
    torch.testing.assert_close(plan(x, dense=True), expected)
    torch.testing.assert_close(plan(x).to_dense(), expected)
    torch.testing.assert_close(plan.diagonal(x), expected.diagonal())
    torch.testing.assert_close(torchzygote.hessian(penalty, x, sparse=True).to_dense(), expected)


def test_results_are_nobody_elses_memory() -> None:
    """A pullback by what f returns as it is gives the seed itself; that of a sum one number everywhere."""
    one, x = torch.ones(1, dtype=torch.float64), point()
    for f, at in ((lambda x: x * 1, one), (lambda x: x.view(1), one), (lambda x: x.sum()[None], x)):
        for mode in ("forward", "reverse"):
            plan = plan_jacobian(f, at, mode=mode)
            for _ in range(2):
                (J,) = plan(at, dense=True)
                assert torch.equal(J, torch.ones_like(J))
                J.zero_()
                (values,) = plan.values(at)
                assert torch.equal(values, torch.ones_like(values))
                values.zero_()


def test_derivatives_of_the_values_and_transforms() -> None:
    x = point()
    plan = plan_jacobian(softmax, x)
    flat = lambda x: torch.func.jacrev(softmax)(x).reshape(-1)
    expected = torch.func.jacrev(flat)(x)
    torch.testing.assert_close(torch.func.jacrev(lambda x: plan.values(x)[0])(x), expected)
    xs = torch.stack([x, x + torch.arange(N)])
    torch.testing.assert_close(torch.func.vmap(lambda x: plan.values(x)[0])(xs), torch.func.vmap(flat)(xs))
    leaf = x.clone().requires_grad_()
    (J,) = plan(leaf, dense=True, create_graph=True)
    weights = torch.arange(N * N, dtype=torch.float64)
    (g,) = torch.autograd.grad((J.reshape(-1) * weights).sum(), leaf)
    torch.testing.assert_close(g, weights @ expected)


def test_what_is_not_finite_is_given_as_it_is() -> None:
    """It tells nothing of structure, which can't be wrong where it is full."""
    f = lambda x: x.sqrt().sum() * torch.arange(1.0, N + 1, dtype=x.dtype)
    x = torch.arange(float(N), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (J,) = plan_jacobian(f, point() + 1, mode="reverse")(x, dense=True)
    torch.testing.assert_close(J, jacobian_of(f, x)[0])


class _Sizes(torch.autograd.Function):
    """Its backward isn't linear."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sum() * torch.ones_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.abs().sum().expand_as(gradient)


def test_products_that_contradict_each_other_are_noticed() -> None:
    plan = plan_jacobian(_Sizes.apply, point(), mode="reverse", sparsity=torch.ones(N, N))
    with pytest.warns(UserWarning, match="differs from plain"):
        plan(point())


def test_complex_arguments() -> None:
    x = torch.randn(3, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    f = lambda z: (z.abs() ** 2).sum() * torch.arange(1.0, 5, dtype=torch.float64)
    (found,) = plan_jacobian(f, x)(x, dense=True)
    torch.testing.assert_close(found, torchzygote.jacobian(f, x)[0])


def test_files(tmp_path: Path) -> None:
    x, big = point(), torch.rand(1500, dtype=torch.float64)
    for kind, plan, f in (
        (JacobianPlan, plan_jacobian(softmax, big), softmax),
        (HessianPlan, plan_hessian(penalty, x), penalty),
    ):
        path = tmp_path / f"{kind.__name__}.npz"
        plan.save(path)
        assert path.stat().st_size < 30_000  # two million entries
        again = kind.load(path, f)
        assert again.patterns == plan.patterns
        assert again.patterns[0].operators == plan.patterns[0].operators
        assert again.patterns[0].dense == plan.patterns[0].dense
        at = big if kind is JacobianPlan else x
        for a, b in zip(again(at, dense=True), plan(at, dense=True), strict=True):
            torch.testing.assert_close(a, b)


def test_files_with_the_entries_of_a_full_pattern_are_read(tmp_path: Path) -> None:
    """As they were written before."""
    path, x = tmp_path / "plan.npz", point()
    plan_jacobian(softmax, x).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    assert arrays.pop("full_0") == "found"
    arrays["version"] = np.array(1)
    arrays["indptr_0"], arrays["indices_0"] = np.arange(0, N * N + 1, N), np.tile(np.arange(N), N)
    np.savez(path, **arrays)
    plan = JacobianPlan.load(path, softmax)
    torch.testing.assert_close(plan(x, dense=True)[0], jacobian_of(softmax, x)[0])


def test_damaged_files_of_full_patterns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.npz"
    plan_jacobian(softmax, point()).save(path)
    with np.load(path) as file:
        arrays = dict(file)
    for change, message in (
        ({"full_0": np.array("perhaps")}, "pattern 0 is full, 'perhaps'"),
        ({"colors": np.zeros(N, dtype=np.int64)}, "doesn't separate the entries"),
        ({"version": np.array(3)}, "its version is 3, and this torchzygote reads 1 and 2"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(ValueError, match=message):
            JacobianPlan.load(path, softmax)


def test_a_plan_beyond_what_detection_may_store_is_made_at_once() -> None:
    """A list of the entries would take a gigabyte."""
    x = torch.rand(12_000)
    for f in (softmax, lambda x: x.cumsum(0)):
        plan = plan_jacobian(f, x, mode="reverse", verify=False)
        assert plan.ncolors == 12_000
        assert plan.patterns[0]._indices is None


@pytest.mark.parametrize("shape", [(4, 4), (1, 9), (100, 3), (50, 700), (333, 335), (1025, 64)])
def test_pictures_are_dark_all_over(shape: tuple[int, int]) -> None:
    full = Pattern.full(shape, given_up=False)
    listed = torch.ones(shape).nonzero()
    assert full.picture() == picture(listed[:, 0], listed[:, 1], shape, 32, 8)
