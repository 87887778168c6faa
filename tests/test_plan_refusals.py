"""Plans and arguments that don't fit them; structure that the caller gives."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from oracles import func_hessian, func_jacobian
from sparse_cases import rosenbrock
from torch import Tensor

from torchzygote import Params, hessian, hessian_sparsity, plan_hessian, plan_jacobian


def product(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


# ---- arguments that don't fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "difference"),
    [
        (torch.rand(7), r"input 0, shape: expected \(6,\), got \(7,\)$"),
        (torch.rand(2, 3), r"input 0, shape: expected \(6,\), got \(2, 3\)$"),
        (
            torch.rand(6, dtype=torch.complex64),
            "input 0, kind of dtype: expected floating point, got complex$",
        ),
        (torch.rand(6, device="meta"), "input 0, device: expected cpu, got meta$"),
        (
            torch.rand(7, device="meta"),
            r"input 0, shape: .*\n +input 0, device: expected cpu, got meta$",
        ),
    ],
)
def test_another_shape_dtype_or_device_is_refused_field_by_field(x: Tensor, difference: str) -> None:
    plan = plan_jacobian(product, torch.rand(6))
    for call in (plan, plan.values):
        with pytest.raises(ValueError, match=rf"(?s)JacobianPlan: .*make a new plan.*{difference}"):
            call(x)
    second = plan_hessian(rosenbrock, torch.rand(6))
    if x.is_complex():
        return  # refused before, as for hessian
    for call in (second, second.values, second.diagonal):
        with pytest.raises(ValueError, match=rf"(?s)HessianPlan: .*{difference}"):
            call(x)


def test_a_list_is_no_array() -> None:
    plan = plan_jacobian(product, torch.rand(3))
    with pytest.raises(
        ValueError, match=r"argument 0 is a list, a structure, .*pass torch\.tensor"
    ) as caught:
        plan([1.0, 2.0, 3.0])
    assert "expected 1 differentiated arguments" in str(caught.value)
    beside = plan_jacobian(lambda x, scales: x * scales[0], torch.rand(3), [2.0], argnums=0)
    with pytest.raises(ValueError, match="argument 0 is a tuple") as caught:
        beside((1.0, 2.0, 3.0), [2.0])
    assert "argument 1" not in str(caught.value)


def test_an_argument_that_is_forgotten() -> None:
    x = torch.rand(3)
    plan = plan_jacobian(lambda x, t: x * t, x, 2.0, argnums=0)
    for call in (plan, plan.values):
        with pytest.raises(
            TypeError, match=r"expected 2 arguments, as it was made for, got 1, .*'t'"
        ) as caught:
            call(x)
        assert "Params" not in str([caught.value, *getattr(caught.value, "__notes__", ())])
    by_default = plan_jacobian(lambda x, t=2.0: x * t, x, 2.0, argnums=0)
    assert torch.equal(by_default(x)[0].to_dense(), 2 * torch.eye(3))
    with pytest.raises(TypeError):
        plan_jacobian(torch.mul, x, 2.0, argnums=0)(x)


def test_only_the_input_that_differs_is_listed() -> None:
    a, b = torch.rand(3), torch.rand(3)
    plan = plan_jacobian(torch.mul, a, b)
    with pytest.raises(ValueError, match=r"input 1, shape: expected \(3,\), got \(4,\)") as caught:
        plan(a, torch.rand(4))
    assert "input 0" not in str(caught.value)


@pytest.mark.parametrize("args", [(), ("word",), (1.0, 2.0)])
def test_another_number_of_arguments_is_refused(args: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="expected 1 differentiated arguments"):
        plan_jacobian(torch.sin, 1.0)(*args)


def test_another_precision_is_welcome() -> None:
    plan, second = plan_jacobian(product, torch.rand(6)), plan_hessian(rosenbrock, torch.rand(6))
    x = torch.rand(6, dtype=torch.float64)
    (J,) = plan(x)
    assert J.dtype == torch.float64
    torch.testing.assert_close(J.to_dense(), func_jacobian(product, x)[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(second(x).to_dense(), func_hessian(rosenbrock, x), rtol=1e-12, atol=0)
    assert plan(torch.arange(6))[0].dtype == torch.float32  # promoted, as everywhere


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: plan_jacobian(lambda x: "word", x), ValueError, "to return an array or a number, got str"),
        (
            lambda x: plan_jacobian(lambda x: (x, x), x),
            ValueError,
            "to return an array or a number, got tuple",
        ),
        (lambda x: plan_jacobian(lambda x: x * 1j, x), ValueError, "to return real values"),
        (lambda x: plan_jacobian(torch.sin, "word"), ValueError, "by, got none"),
        (lambda x: plan_jacobian(torch.sin, x, mode="sideways"), ValueError, "mode: expected one of"),
        (lambda x: plan_jacobian(torch.sin, x, chunk_size=0), ValueError, "chunk_size: expected at least 1"),
        (lambda x: plan_jacobian(torch.sin, x, argnums=1), ValueError, "argnums"),
        (lambda x: plan_hessian(torch.sin, x), ValueError, "a real scalar.*perhaps you wanted jacobian"),
        (lambda x: plan_hessian(lambda x: None, x), ValueError, "a real scalar, got NoneType"),
        (lambda x: plan_hessian(lambda x: (x.sum(), x), x), ValueError, "a real scalar, got tuple"),
        (lambda x: plan_hessian(torch.sum, [x]), TypeError, "a number or an array, got list; for several"),
        (lambda x: plan_hessian(torch.sum, "word"), TypeError, "a number or an array, got str; for several"),
        (lambda x: plan_hessian(torch.sum, x, mode="forward"), ValueError, "mode: expected one of"),
        (lambda x: plan_hessian(torch.sum, x, chunk_size=True), TypeError, "chunk_size"),
        (lambda x: torch.func.vmap(lambda x: plan_jacobian(torch.sin, x))(x), RuntimeError, "plain call"),
        (lambda x: torch.func.vmap(lambda x: plan_hessian(torch.sin, x))(x), RuntimeError, "plain call"),
    ],
)
def test_what_no_plan_can_be_made_of(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.rand(6))


# ---- structure that was given ------------------------------------------------------------------------------

BAND = torch.eye(5, 6) + torch.eye(6)[1:]


@pytest.mark.parametrize(
    "sparsity",
    [
        BAND,
        BAND.bool(),
        BAND.numpy(),
        BAND.to_sparse(),
        pytest.param(scipy.sparse.csr_matrix(BAND.numpy()), id="scipy csr"),
        pytest.param(scipy.sparse.coo_array(BAND.numpy()), id="scipy coo"),
        pytest.param(plan_jacobian(product, torch.rand(6)).sparsity, id="that of a plan"),
        pytest.param(plan_jacobian(product, torch.rand(6)).patterns[0], id="pattern"),
    ],
)
def test_structure_may_be_given(sparsity: Any) -> None:
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return product(x)

    x = torch.rand(6)
    plan = plan_jacobian(f, x, sparsity=sparsity)
    assert not calls
    assert plan.ncolors == 2
    torch.testing.assert_close(plan(x)[0].to_dense(), func_jacobian(product, x)[0])


def test_half_of_a_symmetric_structure_is_completed() -> None:
    x = torch.rand(6, dtype=torch.float64)
    plan = plan_hessian(rosenbrock, x, sparsity=torch.eye(6) + torch.eye(6).roll(1, 1).tril(1).triu(1))
    torch.testing.assert_close(plan(x).to_dense(), func_hessian(rosenbrock, x))


@pytest.mark.parametrize(
    ("sparsity", "error", "message"),
    [
        (torch.eye(5), ValueError, "of argument 0: expected 5 rows and 6 columns, got the shape (5, 5)"),
        (torch.ones(6), ValueError, "expected two dimensions"),
        ([BAND, BAND], ValueError, "a pattern for each of the 1 differentiated arguments, got 2"),
        ("band", TypeError, "expected a two-dimensional tensor"),
    ],
)
def test_structure_of_another_shape_is_refused(sparsity: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        plan_jacobian(product, torch.rand(6), sparsity=sparsity)


def test_structure_with_other_rows_is_refused_as_soon_as_f_runs() -> None:
    x = torch.rand(6)
    with pytest.raises(ValueError, match=r"expected f to return 6 elements .* got 5 \(shape \(5,\)\)"):
        plan_jacobian(product, x, sparsity=torch.eye(6))(x)
    with pytest.raises(ValueError, match=r"expected the shape \(6, 6\), got \(5, 6\)"):
        plan_hessian(rosenbrock, x, sparsity=BAND)
    with pytest.raises(ValueError, match=r"sparsity: expected the shape \(6, 6\), got \(5, 5\)"):
        plan_hessian(lambda x: (x**2).sum(), torch.ones(6), sparsity=torch.eye(5))
    with pytest.raises(TypeError, match=r"plan_hessian: sparsity: pattern: expected .* got list"):
        plan_hessian(rosenbrock, x, sparsity=[torch.eye(6)])


def test_what_has_no_second_derivative_is_named() -> None:
    """The error of the way that was tried first, not that of its substitute."""

    class ByNumPy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return torch.from_numpy(2 * x.detach().numpy() * g.detach().numpy())

    x = torch.rand(4)
    plan = plan_hessian(lambda x: ByNumPy.apply(x).sum(), x)
    with pytest.raises(RuntimeError, match="can't be differentiated twice.*ByNumPy"):
        plan(x)


@pytest.mark.parametrize("value", [True, torch.tensor(True), np.bool_(False), 3, 2.5])
def test_constants_have_no_second_derivatives(value: Any) -> None:
    x = torch.rand(3)
    assert not hessian_sparsity(lambda x: value, x).to_dense().any()
    assert not plan_hessian(lambda x: value, x)(x).to_dense().any()
    assert not hessian(lambda x: value, x).any()


def test_params_and_arguments_are_not_mixed_up() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match="JacobianPlan: expected 1 argument, as it was made for, got Params"):
        plan_jacobian(lambda x: x * 2, x)(Params([x]))
    with pytest.raises(
        TypeError, match="JacobianPlan: expected Params, as it was made for, got 1, with which"
    ):
        plan_jacobian(lambda: x * 2, Params([x]))(x)
    either = plan_jacobian(lambda y=x: y * 2, x)
    assert torch.equal(either(x, dense=True)[0], 2 * torch.eye(3))
    assert torch.equal(either(Params([x]), dense=True)[x], 2 * torch.eye(3))


@pytest.mark.parametrize("make", [plan_jacobian, plan_hessian])
def test_dense_is_true_or_false(make: Any) -> None:
    x = torch.ones(3)
    plan = make(lambda x: (x**2).sum(), x)
    with pytest.raises(TypeError, match="dense: expected True or False, got 1"):
        plan(x, dense=1)
    plan(x, dense=np.bool_(True))
