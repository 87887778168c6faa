"""Where PyTorch is wrong: forward mode against a pullback, second derivatives by a bias without weight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from doubles import DoubledOrTripled
from torch import Tensor
from torch.nn import functional as F

from torchzygote import (
    Params,
    checkpointed,
    forwarddiff,
    gradient,
    hessian_reverse,
    hook,
    jacobian,
    plan_jacobian,
    pushforward,
)

torch.manual_seed(0)
POINTS = torch.randn(40, 2, dtype=torch.float64)
ROWS = torch.randn(40, 4, dtype=torch.float64)
ONES = torch.ones(40, 1, dtype=torch.float64)


def doubled(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@torch.library.custom_op("torchzygote_tests::sine", mutates_args=())
def sine(x: Tensor) -> Tensor:
    return torch.sin(x)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


sine.register_autograd(lambda ctx, g: g * ctx.saved_tensors[0].cos(), setup_context=_save)
SINES = lambda x: sine(x).repeat(20)


def partly_unrecorded(x: Tensor) -> Tensor:
    with torch.no_grad():
        factor = x * 1
    return (factor * x).repeat(20).sin()


# function, where: its derivative of the backward formula, or a forward formula, is wrong there
WRONG: list[tuple[str, Callable[[Tensor], Tensor], Tensor]] = [
    ("std of equal numbers", lambda c: (ONES * c).std(1), doubled(1, 1, 1)),
    ("sinc at zero", lambda c: torch.sinc(ONES * c), doubled(0, 1)),
    ("3-norm at zero", lambda c: torch.linalg.vector_norm(POINTS - c, ord=3, dim=1), POINTS[3].clone()),
    ("product scattered", lambda c: _scattered(c), doubled(0.5, -1.5)),
    ("custom function", lambda c: DoubledOrTripled.apply(c).repeat(20), doubled(0.5, -1.5)),
]


def _scattered(c: Tensor) -> Tensor:
    index = torch.zeros(2, dtype=torch.int64)
    return torch.ones(30, dtype=c.dtype).scatter_reduce(0, index, c, "prod").cumsum(0)


@pytest.mark.parametrize(("f", "x"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
@pytest.mark.parametrize("mode", ["auto", "forward"])
def test_forward_mode_that_a_pullback_contradicts_is_not_returned(
    f: Callable[[Tensor], Tensor], x: Tensor, mode: str
) -> None:
    expected = jacobian(f, x, mode="reverse")[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="jacobian: (forward mode gave|the sparse derivative)")
        found = jacobian(f, x, mode=mode)[0]
        sparse = jacobian(f, x, mode=mode, sparse=True)[0].to_dense()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sparse, expected)


def test_the_warning_says_what_may_be_wrong() -> None:
    f, x = WRONG[-1][1:]
    said = r"jacobian: forward mode gave another derivative of f than a plain"
    with pytest.warns(UserWarning, match=said) as warned:
        jacobian(f, x, mode="forward")
    assert warned[0].filename == __file__


def test_a_right_derivative_passes_without_a_word() -> None:
    x = doubled(0.5, -1.5, 2.0)
    found = jacobian(lambda x: torch.outer(POINTS[:, 0], x.exp()).sin().reshape(-1), x, mode="forward")[0]
    torch.testing.assert_close(
        found, torch.func.jacrev(lambda x: torch.outer(POINTS[:, 0], x.exp()).sin())(x).reshape(-1, 3)
    )


def test_what_is_not_finite_in_reverse_mode_alone_tells_nothing() -> None:
    x = doubled(0.0, 1.0)
    f = lambda x: torch.where(x > 0, x.sqrt(), 0 * x).repeat(20)  # reverse mode: 0 * inf at zero
    found = jacobian(f, x, mode="forward")[0]
    assert bool(found.isfinite().any())


@pytest.mark.parametrize("sparse", [False, True])
def test_code_without_recording_counts_as_constant_in_either_mode(sparse: bool) -> None:
    x = doubled(3.0, 0.5)
    expected = jacobian(partly_unrecorded, x, mode="reverse")[0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="jacobian: (forward mode gave|the sparse derivative)")
        for mode in ("auto", "forward"):
            found = jacobian(partly_unrecorded, x, mode=mode, sparse=sparse)[0].to_dense()
            torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------------------
# operators made with torch.library


@pytest.mark.parametrize("sparse", [False, True])
def test_auto_takes_reverse_mode_for_library_operators(sparse: bool) -> None:
    x = doubled(0.5, 1.0)
    found = jacobian(SINES, x, sparse=sparse)[0].to_dense()
    torch.testing.assert_close(found, torch.diag(x.cos()).repeat(20, 1))


def test_plans_take_reverse_mode_for_library_operators() -> None:
    x = doubled(0.5, 1.0)
    plan = plan_jacobian(SINES, x)
    assert plan.mode == "reverse"
    torch.testing.assert_close(plan(x)[0].to_dense(), torch.diag(x.cos()).repeat(20, 1))
    with pytest.raises(RuntimeError, match="plan_jacobian: mode 'forward' can't be had"):
        plan_jacobian(SINES, x, mode="forward")


def test_plans_with_a_given_sparsity_refuse_as_they_are_called() -> None:
    x = doubled(0.5, 1.0)
    plan = plan_jacobian(SINES, x, sparsity=torch.eye(2).repeat(20, 1), mode="forward")
    with pytest.raises(RuntimeError, match=r"made with torch\.library"):
        plan(x)


def test_a_plan_in_forward_mode_is_compared_with_a_pullback_as_it_is_made() -> None:
    f, x = WRONG[-1][1:]
    with pytest.warns(UserWarning, match="plan_jacobian: forward mode gave another derivative"):
        plan = plan_jacobian(f, x)
    assert plan.mode == "reverse"
    torch.testing.assert_close(plan(x)[0].to_dense(), torch.func.jacrev(f)(x))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: jacobian(SINES, x, mode="forward"),
        lambda x: pushforward(sine, x)(torch.ones_like(x)),
        lambda x: pushforward(torch.ops.torchzygote_tests.sine, x)(torch.ones_like(x)),
        lambda x: gradient(lambda x: forwarddiff(sine, x).sum(), x),
    ],
)
def test_forward_mode_refuses_library_operators(call: Callable[[Tensor], Any]) -> None:
    with pytest.raises(RuntimeError, match=r"made with torch\.library"):
        call(doubled(0.5, 1.0))


def test_constants_may_go_through_library_operators_in_forward_mode() -> None:
    c = doubled(0.5, 1.0)
    found = pushforward(lambda x: x * sine(c), doubled(2.0, 3.0))(doubled(1.0, 1.0))
    torch.testing.assert_close(found, c.sin())


# ---------------------------------------------------------------------------------------------------------
# forward mode by Params, which is the pullback differentiated by its cotangent


class ByNumPy(torch.autograd.Function):
    """A square; autograd can't follow its backward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy() * g.detach().numpy())


NOT_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "custom": lambda x: ByNumPy.apply(x),
}


@pytest.mark.parametrize("f", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_forward_mode_by_params_refuses_what_it_may_get_wrong(f: Callable[[Tensor], Tensor]) -> None:
    w = doubled(0.5, -1.5, 2.0)
    ps = Params([w])
    plan = plan_jacobian(lambda: f(w), ps, mode="forward", sparsity=torch.ones(3, 3).tril())
    for call in (
        lambda: jacobian(lambda: f(w), ps, mode="forward"),
        lambda: jacobian(lambda: f(w), ps, mode="forward", sparse=True),
        lambda: plan(ps),
    ):
        with pytest.raises(RuntimeError, match="mode 'forward' with Params"):
            call()


@pytest.mark.parametrize("f", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_plans_by_params_take_reverse_mode_then(f: Callable[[Tensor], Tensor]) -> None:
    w = doubled(0.5, -1.5, 2.0)
    ps = Params([w])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rows are computed one at a time")
        plan = plan_jacobian(lambda: f(w), ps)
        assert plan.mode == "reverse"
        found = plan(ps)[w].to_dense()
        torch.testing.assert_close(found, jacobian(lambda: f(w), ps, mode="reverse")[w])


def test_forward_mode_by_params_passes_hooks_by() -> None:
    w = doubled(0.5, -1.5, 2.0)
    ps = Params([w])
    for f in (
        lambda: hook(torch.neg, w) ** 2,
        lambda: checkpointed(lambda a: hook(torch.neg, a) ** 2, w),
    ):
        dense = jacobian(f, ps, mode="forward")[w]
        sparse = jacobian(f, ps, mode="forward", sparse=True)[w].to_dense()
        planned = plan_jacobian(f, ps, mode="forward", sparsity=torch.eye(3))(ps)[w].to_dense()
        for found in (dense, sparse, planned):
            torch.testing.assert_close(found, torch.diag(2 * w))


# ---------------------------------------------------------------------------------------------------------
# hooks


@pytest.mark.parametrize("n", [2, 4, 16, 64])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_hook_acts_whatever_the_sizes(n: int, sparse: bool) -> None:
    f = lambda a: hook(torch.neg, a).sum() * torch.ones(n, dtype=torch.float64)
    found = jacobian(f, doubled(0.3, -0.7, 1.1, 0.2), sparse=sparse)[0].to_dense()
    torch.testing.assert_close(found, -torch.ones(n, 4, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 4, 16])
def test_a_hook_acts_in_plans_too(n: int) -> None:
    f = lambda a: (hook(torch.neg, a) ** 2).repeat(n)
    x = doubled(0.3, -0.7, 1.1)
    expected = -torch.diag(2 * x).repeat(n, 1)
    torch.testing.assert_close(plan_jacobian(f, x)(x)[0].to_dense(), expected)
    ps = Params([x])
    torch.testing.assert_close(plan_jacobian(lambda: f(x), ps)(ps)[x].to_dense(), expected)
    forward = plan_jacobian(f, x, mode="forward")
    assert forward.mode == "forward"
    torch.testing.assert_close(forward(x)[0].to_dense(), -expected)


def test_a_last_row_by_itself_comes_to_a_hook_as_the_others_did() -> None:
    seen = []

    def unit_rows(g: Tensor) -> Tensor:
        seen.append(tuple(g.shape))
        return g / g.norm(dim=1, keepdim=True)

    found = jacobian(lambda a: hook(unit_rows, a) * 2, doubled(1, 2, 3), mode="reverse", chunk_size=2)[0]
    torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64))
    assert seen == [(2, 3), (1, 3)]


# ---------------------------------------------------------------------------------------------------------
# the bias of a normalization that has no weight: PyTorch's pullback isn't linear in its cotangent

NORMALIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda b: F.layer_norm(ROWS, (4,), None, b),
    "batch_norm": lambda b: F.batch_norm(ROWS, None, None, None, b, training=True),
    "instance_norm": lambda b: F.instance_norm(ROWS[None].transpose(1, 2), bias=b),
}


@pytest.mark.parametrize("name", NORMALIZED)
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_jacobians_by_a_bias_without_weight(name: str, mode: str) -> None:
    f = NORMALIZED[name]
    b = doubled(0.1, 0.2, 0.3, 0.4)
    expected = torch.func.jacfwd(f)(b).reshape(-1, 4)
    torch.testing.assert_close(jacobian(f, b, mode=mode)[0], expected)


def test_second_derivatives_by_the_rows_are_not_refused() -> None:
    b = doubled(0.1, 0.2, 0.3, 0.4).requires_grad_()
    loss = lambda x: F.layer_norm(x, (4,), None, b).sin().sum()
    found = hessian_reverse(loss, ROWS[:2])
    expected = torch.func.hessian(loss)(ROWS[:2]).reshape(8, 8)
    torch.testing.assert_close(found, expected.detach())
