"""Plans in surroundings that switch autograd off, and the random numbers that they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import (
    HessianPlan,
    JacobianPlan,
    gradient,
    plan_hessian,
    plan_jacobian,
)

X = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def band(x: Tensor) -> Tensor:
    return x[:-1] * x[1:] ** 2


def energy(x: Tensor) -> Tensor:
    return (x[:-1] * x[1:] ** 2).sum()


def sum_of_band(x: Tensor) -> Tensor:
    """What the entries of the Jacobian of ``band`` sum up to."""
    return (x[1:] ** 2 + 2 * x[:-1] * x[1:]).sum()


# ---- inference mode ----------------------------------------------------------------------------------------


def made_in_inference_mode(mode: str, tmp_path: Path) -> JacobianPlan:
    with torch.inference_mode():
        return plan_jacobian(band, X, mode=mode)


def loaded_in_inference_mode(mode: str, tmp_path: Path) -> JacobianPlan:
    plan_jacobian(band, X, mode=mode).save(tmp_path / "band")
    with torch.inference_mode():
        return JacobianPlan.load(tmp_path / "band", band)


def shown_in_inference_mode(mode: str, tmp_path: Path) -> JacobianPlan:
    plan = plan_jacobian(band, X, mode=mode, sparsity=torch.ones(3, 4))
    with torch.inference_mode():
        assert str(plan)
        plan.sparsity, plan(X), plan(X.float())
    return plan


@pytest.mark.parametrize("made", [made_in_inference_mode, loaded_in_inference_mode, shown_in_inference_mode])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_jacobian_plans_of_inference_mode_are_differentiable_outside(
    made: Callable[[str, Path], JacobianPlan], mode: str, tmp_path: Path
) -> None:
    plan = made(mode, tmp_path)
    expected = gradient(sum_of_band, X)[0]
    for f in (
        lambda x: plan(x)[0].values().sum(),
        lambda x: plan(x, dense=True)[0].sum(),
        lambda x: plan.values(x)[0].sum(),
    ):
        torch.testing.assert_close(gradient(f, X)[0], expected)


def test_hessian_plans_of_inference_mode_are_differentiable_outside(tmp_path: Path) -> None:
    with torch.inference_mode():
        plan = plan_hessian(energy, X)
        plan.save(tmp_path / "energy")
        loaded = HessianPlan.load(tmp_path / "energy", energy)
        plan.diagonal(X)
    for one in (plan, loaded):
        # The Hessian has 2 x[i - 1] on its diagonal and 2 x[i] beside it, twice.
        twos = torch.tensor([2.0, 6.0, 6.0, 4.0], dtype=X.dtype)
        torch.testing.assert_close(gradient(lambda x: one.values(x).sum(), X)[0], twos)
        torch.testing.assert_close(gradient(lambda x: one(x).values().sum(), X)[0], twos)
        diagonal = torch.tensor([2.0, 2.0, 2.0, 0.0], dtype=X.dtype)
        torch.testing.assert_close(gradient(lambda x: one.diagonal(x).sum(), X)[0], diagonal)


# ---- create_graph where autograd is off --------------------------------------------------------------------


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("dense", [False, True])
def test_jacobians_keep_a_graph_if_asked(off: Callable[[], Any], mode: str, dense: bool) -> None:
    plan = plan_jacobian(band, X, mode=mode)
    z = X.clone().requires_grad_()
    with off():
        J = plan(z, dense=dense, create_graph=True)[0]
    (found,) = torch.autograd.grad((J if dense else J.values()).sum(), z)
    torch.testing.assert_close(found, gradient(sum_of_band, X)[0])


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_hessians_keep_a_graph_if_asked(off: Callable[[], Any]) -> None:
    plan = plan_hessian(lambda x: energy(x.reshape(-1)), X.reshape(2, 2))
    z = X.reshape(2, 2).requires_grad_()
    with off():
        H, D = plan(z, create_graph=True), plan(z, dense=True, create_graph=True)
        diagonal = plan.diagonal(z, create_graph=True)
    assert H.requires_grad
    assert diagonal.shape == (2, 2)
    expected = torch.tensor([[2.0, 6.0], [6.0, 4.0]], dtype=X.dtype)
    torch.testing.assert_close(torch.autograd.grad(D.sum(), z)[0], expected)
    expected = torch.tensor([[2.0, 2.0], [2.0, 0.0]], dtype=X.dtype)
    torch.testing.assert_close(torch.autograd.grad(diagonal.sum(), z)[0], expected)


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:.*differs from plain")
def test_dense_answers_in_sparse_form_keep_a_graph_if_asked(off: Callable[[], Any]) -> None:
    z = X.clone().requires_grad_()
    wrong = plan_jacobian(band, X, sparsity=torch.eye(3, 4))
    too = plan_hessian(energy, X, sparsity=torch.eye(4))
    number = plan_hessian(lambda x: x**3, torch.tensor(2.0, dtype=X.dtype))
    two = torch.tensor(2.0, dtype=X.dtype, requires_grad=True)
    with off():
        J, H = wrong(z, create_graph=True)[0], too(z, create_graph=True)
        h = number(two, create_graph=True)
    assert J.layout == H.layout == torch.sparse_csr
    torch.testing.assert_close(torch.autograd.grad(J.values().sum(), z)[0], gradient(sum_of_band, X)[0])
    assert H.requires_grad
    torch.testing.assert_close(torch.autograd.grad(h, two)[0], torch.tensor(6.0, dtype=X.dtype))


# ---- random numbers ----------------------------------------------------------------------------------------


def shuffled(x: Tensor) -> Tensor:
    found: Tensor = x[torch.randperm(len(x))] ** 2
    return found


def chosen(x: Tensor) -> Tensor:
    found: Tensor = x[torch.randperm(len(x))][:2].prod() ** 2
    return found


@pytest.mark.filterwarnings("ignore:.*differs from plain")
@pytest.mark.parametrize("seed", range(3))
def test_the_dense_way_draws_what_the_plan_drew(seed: int) -> None:
    torch.manual_seed(0)
    plan, second = plan_jacobian(shuffled, X), plan_hessian(chosen, X)
    for f, call in (
        (shuffled, lambda x: plan(x)[0]),
        (chosen, second),
        (chosen, second.diagonal),
    ):
        torch.manual_seed(seed)
        f(X)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        found = call(X).to_dense()
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(seed)
        expected = torch.autograd.functional
        wanted = expected.hessian(f, X) if f is chosen else expected.jacobian(f, X)
        torch.testing.assert_close(found, wanted if found.dim() == 2 else wanted.diagonal())


class Cube(torch.autograd.Function):
    """x³, whose second derivative exists in forward mode only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Slope.apply(ctx.saved_tensors[0]) * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 3 * x**2 * tangent


class Slope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 3 * x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise RuntimeError("no second derivative backward")

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 6 * x * tangent


def test_the_second_way_of_a_hessian_draws_what_the_first_one_drew() -> None:
    f = lambda x: Cube.apply(F.dropout(x, 0.5)).sum()
    plan = plan_hessian(f, X, sparsity=torch.eye(4))
    for call in (plan.values, plan.diagonal):
        torch.manual_seed(5)
        kept = F.dropout(torch.ones_like(X), 0.5)
        after = torch.get_rng_state()
        torch.manual_seed(5)
        torch.testing.assert_close(call(X), 6 * kept**3 * X)
        assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("kind", ["jacobian", "hessian"])
def test_a_compiled_plan_that_looks_again_draws_once(kind: str) -> None:
    """Rounding of small rows beside a large one is told from a wrong structure by uncompiled products."""
    large = torch.tensor([1e7] + [1.0] * 7)
    lost = torch.tensor([0.0] + [3e5] * 7)
    f = lambda x: (x * lost + x * large - x * lost) * torch.rand(8)
    x, eye = torch.linspace(0.1, 0.9, 8), torch.eye(8, dtype=torch.bool)
    if kind == "jacobian":
        plan: Any = plan_jacobian(f, x, sparsity=(eye,), mode="reverse")
    else:
        plan = plan_hessian(lambda x: (f(x) * x).sum(), x, sparsity=eye, mode="reverse_over_reverse")
    plan.compile(backend="eager")
    plan(x)
    torch.manual_seed(4)
    f(x)
    wanted = torch.rand(1)
    torch.manual_seed(4)
    plan(x)
    assert torch.equal(torch.rand(1), wanted)


@pytest.mark.parametrize("mode", ["auto", "forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_compiled_plan_of_a_hessian_draws_once(mode: str, diagonal: bool) -> None:
    torch._dynamo.reset()
    x = torch.linspace(0.5, 1.5, 5)

    def f(x: Tensor) -> Tensor:
        return (x**3 * torch.rand(5)).sum() + (x[1:] * x[:-1]).sum()

    plan = plan_hessian(f, x, mode=mode)
    evaluate = plan.diagonal if diagonal else lambda x: plan(x, dense=True)
    torch.manual_seed(0)
    expected, wanted = evaluate(x), torch.rand(1)
    plan.compile(backend="eager")
    torch.manual_seed(0)
    torch.testing.assert_close(evaluate(x), expected)
    assert torch.equal(torch.rand(1), wanted)
