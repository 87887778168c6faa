"""What becomes of sparse results: they are differentiated once, and nobody shares a plan's own structure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchzygote import (
    diaghessian,
    gradient,
    hessian,
    hessian_reverse,
    jacobian,
    plan_hessian,
    plan_jacobian,
    pullback,
)
from torchzygote._plans.results import _MOST_SHARING

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
PLAN = plan_jacobian(lambda x: x**3, X)  # diag(3x²)
PLACES = torch.arange(3)


def coo(x: Tensor) -> Tensor:
    made = torch.sparse_coo_tensor(torch.stack([PLACES, PLACES]), 3 * x**2, (3, 3), check_invariants=False)
    return made.coalesce()


# Each is the sum of 9x⁴.
QUARTICS: dict[str, Callable[[Tensor], Tensor]] = {
    "values of a plan": lambda x: (PLAN(x)[0].values() ** 2).sum(),
    "values of a Jacobian": lambda x: (jacobian(lambda x: x**3, x, sparse=True)[0].values() ** 2).sum(),
    "values of a Hessian": lambda x: (
        hessian(lambda x: (x**4).sum() / 4, x, sparse=True).values() ** 2
    ).sum(),
    "to_dense": lambda x: (PLAN(x)[0].to_dense() ** 2).sum(),
    "product": lambda x: ((PLAN(x)[0] @ torch.ones_like(x)) ** 2).sum(),
    "transposed": lambda x: (PLAN(x)[0].t().values() ** 2).sum(),
    "COO": lambda x: (coo(x).values() ** 2).sum(),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", QUARTICS)
def test_sparse_results_are_differentiated_once_and_not_twice(name: str) -> None:
    f = QUARTICS[name]
    torch.testing.assert_close(gradient(f, X)[0], 36 * X**3)
    for call in (
        lambda: hessian(f, X),
        lambda: hessian(f, X, sparse=True),
        lambda: hessian_reverse(f, X),
        lambda: diaghessian(f, X),
        lambda: gradient(lambda x: gradient(f, x)[0].sum(), X),
        lambda: jacobian(lambda x: gradient(f, x)[0], X),
        lambda: gradient(f, X.clone().requires_grad_(), create_graph=True),
    ):
        with pytest.raises(
            RuntimeError, match=r"plan\.values\(\.\.\.\)|by the values of torch.sparse_coo_tensor"
        ):
            call()


def test_rows_that_keep_a_graph_are_refused_too() -> None:
    f = lambda x: PLAN(x)[0].values() ** 2
    torch.testing.assert_close(jacobian(f, X, chunk_size=1)[0], torch.diag(36 * X**3))
    with pytest.raises(RuntimeError, match=r"plan\.values\(\.\.\.\)"):
        jacobian(f, X.clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"plan\.values\(\.\.\.\)"):
        gradient(lambda x: pullback(f, x)[1](torch.ones(3, dtype=X.dtype))[0].sum(), X)


class Squared(torch.autograd.Function):
    """A custom function, whose backward is asked whether it can be differentiated."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, ybar):
        (x,) = ctx.saved_tensors
        return 2 * x * ybar


def test_a_linear_use_beside_a_custom_function_is_differentiated_twice() -> None:
    linear = plan_jacobian(lambda x: 3 * x**2, X)
    f = lambda x: linear(x)[0].values().sum() + Squared.apply(x).sum()
    torch.testing.assert_close(hessian(f, X), 2 * torch.eye(3, dtype=X.dtype))
    (g,) = gradient(f, X.clone().requires_grad_(), create_graph=True)
    torch.testing.assert_close(g, 6 + 2 * X)


def test_a_linear_use_of_sparse_results_is_differentiated_twice() -> None:
    for f in (
        lambda x: PLAN(x)[0].values() @ X,
        lambda x: PLAN(x)[0].to_dense().diagonal() @ X,
        lambda x: (PLAN(x)[0] @ X).sum(),
    ):
        torch.testing.assert_close(hessian_reverse(f, X), torch.diag(6 * X))
        torch.testing.assert_close(diaghessian(f, X)[0], 6 * X)


def test_values_and_dense_matrices_of_plans_are_differentiated_twice() -> None:
    for f in (lambda x: (PLAN.values(x)[0] ** 2).sum(), lambda x: (PLAN(x, dense=True)[0] ** 2).sum()):
        torch.testing.assert_close(hessian_reverse(f, X), torch.diag(108 * X**2))


def test_forward_mode_through_sparse_results_goes_in_reverse_or_is_refused() -> None:
    f = lambda x: PLAN(x)[0].values().repeat(3) ** 2
    expected = torch.diag(36 * X**3).repeat(3, 1)
    torch.testing.assert_close(jacobian(f, X, chunk_size=1)[0], expected)
    torch.testing.assert_close(jacobian(f, X, chunk_size=1, sparse=True)[0].to_dense(), expected)
    for sparse in (False, True):
        with pytest.raises(RuntimeError, match=r"values\(\.\.\.\)"):
            jacobian(f, X, mode="forward", sparse=sparse)


# ---- the structure that results share ----------------------------------------------------------------------

BAND = torch.tensor([[4.0, 4.0, 0.0], [0.0, 9.0, 12.0]], dtype=torch.float64)  # of x[:-1] * x[1:]², at X


def of_band() -> Callable[[Tensor], Tensor]:
    plan = plan_jacobian(lambda x: x[:-1] * x[1:] ** 2, X)
    return lambda x: plan(x)[0]


def of_hessian() -> Callable[[Tensor], Tensor]:
    return plan_hessian(lambda x: (x[:-1] * x[1:] ** 2).sum(), X)


def into_columns(matrix: Tensor) -> None:
    matrix.col_indices().zero_()


def into_rows(matrix: Tensor) -> None:
    matrix.crow_indices().zero_()


def into_a_twin(matrix: Tensor) -> None:
    matrix.detach().col_indices().zero_()


def into_the_transpose(matrix: Tensor) -> None:
    matrix.t().row_indices().zero_()


def another_matrix(matrix: Tensor) -> None:
    other = torch.zeros(matrix.shape, dtype=matrix.dtype)
    other.view(-1)[: matrix.values().numel()] = 1
    matrix.copy_(other.to_sparse_csr())


@pytest.mark.parametrize("made", [of_band, of_hessian])
@pytest.mark.parametrize("write", [into_columns, into_rows, into_a_twin, into_the_transpose, another_matrix])
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_writes_into_a_result_are_in_no_later_one(
    made: Callable[[], Callable[[Tensor], Tensor]], write: Callable[[Tensor], None], inference: bool
) -> None:
    plan = made()
    expected = plan(X).to_dense()
    for _ in range(2):
        with torch.inference_mode(inference and write is not into_the_transpose):  # PyTorch raises there
            write(plan(X))
        torch.testing.assert_close(plan(X).to_dense(), expected)


def test_writes_into_a_result_that_is_kept_while_others_are_made() -> None:
    plan = of_band()
    first = plan(X)
    torch.testing.assert_close(first.to_dense(), BAND)
    plan(X)
    into_columns(first)
    torch.testing.assert_close(plan(X).to_dense(), BAND)


def test_writes_into_the_structure_are_in_no_result() -> None:
    plan = plan_jacobian(lambda x: x[:-1] * x[1:] ** 2, X)
    second = plan_hessian(lambda x: (x[:-1] * x[1:] ** 2).sum(), X)
    before = second(X).to_dense()
    for structure in (plan.sparsity[0], plan.patterns[0].to_csr(), second.sparsity):
        structure.col_indices().zero_()
    torch.testing.assert_close(plan(X)[0].to_dense(), BAND)
    torch.testing.assert_close(second(X).to_dense(), before)


def test_results_share_their_structure_for_a_while() -> None:
    plan = of_band()
    places = [plan(X).col_indices().data_ptr() for _ in range(_MOST_SHARING)]
    assert len(set(places)) == 1
    kept = plan(X)
    assert kept.col_indices().data_ptr() != places[0]
