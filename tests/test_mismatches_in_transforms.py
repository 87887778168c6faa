"""Where a program can't branch, a contradicted plan gives NaN: in each entry, and in any derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import gradient, plan_hessian, plan_jacobian
from torchzygote._plans.evaluation import or_nan

X = torch.tensor([4.0, 3.0, 2.0, 1.0])
Z = torch.tensor([2.0, 0.0, 3.0, 1.0])


def squares(x: Tensor) -> Tensor:
    return x.sort().values ** 2


def cubes(x: Tensor) -> Tensor:
    return (x.sort().values.diff() ** 3).sum()


FIRST = plan_jacobian(squares, X.flip(0))
SECOND = plan_hessian(cubes, torch.arange(4.0))
SECOND.diagonal(Z.sort().values)


def entries(x: Tensor) -> Tensor:
    return FIRST.values(x)[0]


def branching(x: Tensor) -> Tensor:
    """The entries that are listed at a positive point don't depend on x, those that lack elsewhere do."""
    return 3 * x if bool(x.sum() > 0) else 3 * x + x.flip(0) ** 2


# ---- derivatives of what became NaN ------------------------------------------------------------------------

WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda S, x: torch.func.grad(S)(x),
    "grad of grad": lambda S, x: torch.func.jacrev(torch.func.grad(S))(x),
    "hessian": lambda S, x: torch.func.hessian(S)(x),
    "jvp": lambda S, x: torch.func.jvp(S, (x,), (torch.ones(4),))[1],
    "vmap of grad": lambda S, x: torch.func.vmap(torch.func.grad(S))(x.unsqueeze(0)),
    "compiled": lambda S, x: torch.compile(lambda x: gradient(S, x)[0], fullgraph=True, backend="eager")(x),
}
SUMS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "Jacobian": (lambda x: (entries(x) ** 2).sum(), X),
    "Hessian": (lambda x: (SECOND.values(x) ** 2).sum(), Z),
    "diagonal": (lambda x: (SECOND.diagonal(x) ** 2).sum(), Z),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", SUMS)
def test_derivatives_of_contradicted_values_are_nan(what: str, way: str) -> None:
    S, x = SUMS[what]
    assert WAYS[way](S, x).isnan().all()


@pytest.mark.parametrize("way", ["grad", "grad of grad", "hessian"])
def test_also_where_the_entries_do_not_depend_on_the_arguments(way: str) -> None:
    plan = plan_jacobian(branching, X)
    S = lambda x: (plan.values(x)[0] * torch.arange(4.0)).sum()
    assert torch.equal(WAYS["grad"](S, X), torch.zeros(4))
    assert WAYS[way](S, -X).isnan().all()


def test_a_jacobian_of_contradicted_values_is_nan() -> None:
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert transform(entries)(X).isnan().all()


def test_right_examples_of_a_batch_keep_their_derivatives() -> None:
    S, _ = SUMS["Jacobian"]
    wrong, right = torch.func.vmap(torch.func.grad(S))(torch.stack([X, X.flip(0)]))
    assert wrong.isnan().all()
    torch.testing.assert_close(right, 8 * X.flip(0))


# ---- values that are right ---------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_right_values_stay_as_they_are_to_the_bit(dtype: torch.dtype) -> None:
    v = torch.tensor([0.0, -0.0, 1.5, -INF, INF, NAN, 1e-7], dtype=dtype)
    (x,) = torch.tensor([[INF, -3.0, NAN]], dtype=torch.float64)
    (got,) = or_nan([v], torch.tensor(True), [x])
    assert got.dtype == dtype
    assert torch.equal(got, v) or torch.equal(got.isnan(), v.isnan())
    assert torch.equal(got[:-2], v[:-2])
    assert torch.equal(got.signbit()[:5], v.signbit()[:5])


def test_complex_values_too() -> None:
    parts = torch.tensor([[0.0, -0.0], [INF, 1.0], [2.0, -INF], [-0.0, 3.0]])
    v = torch.view_as_complex(parts)
    for given, expected in ((v, parts), (v.conj(), parts * torch.tensor([1.0, -1.0]))):
        (got,) = or_nan([given], torch.tensor(True), [v])
        assert torch.equal(torch.view_as_real(got), expected)
        assert torch.equal(torch.view_as_real(got).signbit(), expected.signbit())
        assert torch.view_as_real(or_nan([given], torch.tensor(False), [v])[0]).isnan().all()
    f = lambda z: (z * z.conj()).real.sort().values
    plan = plan_jacobian(f, torch.tensor([1.0 + 1j, 2.0, 3.0]))
    z = torch.tensor([[3.0 + 1j, 2.0, 1.0], [1.0, 2.0, 3.0 - 1j]])
    wrong, right = torch.func.vmap(lambda z: plan.values(z)[0])(z)
    assert wrong.isnan().all()
    assert torch.equal(right, plan.values(z[1])[0])


def test_derivatives_of_right_values_stay_as_they_are() -> None:
    x = torch.tensor([0.25, 1.0, 4.0])
    plan = plan_jacobian(torch.sqrt, x + 1)
    values = lambda x: plan.values(x)[0]
    expected = torch.func.grad(lambda x: (0.5 / x.sqrt()).sum())(x)
    torch.testing.assert_close(torch.func.grad(lambda x: values(x).sum())(x), expected)
    torch.testing.assert_close(torch.func.jvp(values, (x,), (torch.ones(3),))[1], expected)
    x[0] = 0
    assert torch.func.jvp(values, (x,), (torch.ones(3),))[1][0] == -INF
    curved = torch.func.hessian(lambda x: values(x).sum())(x[1:].repeat(2)[:3])
    torch.testing.assert_close(curved.diagonal(), 0.375 * torch.tensor([1.0, 4.0, 1.0]) ** -2.5)


# ---- dense matrices ----------------------------------------------------------------------------------------


def test_a_dense_matrix_is_nan_as_a_whole() -> None:
    x = torch.stack([X, X.flip(0)])
    wrong, right = torch.func.vmap(lambda x: FIRST(x, dense=True)[0])(x)
    assert wrong.isnan().all()
    torch.testing.assert_close(right, torch.func.jacrev(squares)(X.flip(0)))
    wrong, right = torch.func.vmap(lambda x: SECOND(x, dense=True))(torch.stack([Z, Z.sort().values]))
    assert wrong.isnan().all()
    torch.testing.assert_close(right, torch.func.hessian(cubes)(Z.sort().values))
    compiled = torch.compile(lambda x: FIRST(x, dense=True)[0], fullgraph=True, backend="eager")
    assert compiled(X).isnan().all()
    assert torch.func.jacrev(lambda x: FIRST(x, dense=True)[0])(X).isnan().all()


def test_so_is_one_of_which_nothing_is_listed() -> None:
    f = lambda x, k: x.new_zeros(4) if k == 0 else x**2
    plan = plan_jacobian(f, X, 0, argnums=0)
    assert plan.patterns[0].nnz == 0
    dense = lambda x: plan(x, 1, dense=True)[0]
    assert torch.func.vmap(dense)(X.unsqueeze(0)).isnan().all()
    assert torch.func.grad(lambda x: dense(x).sum())(X).isnan().all()
    assert torch.equal(torch.func.jacrev(lambda x: plan(x, 0, dense=True)[0])(X), torch.zeros(4, 4, 4))


def test_a_dense_row_by_a_number_too() -> None:
    f = lambda t: torch.stack([t * 0 + 1, t]) if bool(t > 0) else torch.stack([t * t, t])
    plan = plan_jacobian(f, torch.tensor(1.0), sparsity=torch.tensor([[0], [1]]))
    got = torch.func.jacrev(lambda t: plan(t, dense=True)[0])(torch.tensor(-2.0))
    assert got.shape == (2,)
    assert got.isnan().all()
