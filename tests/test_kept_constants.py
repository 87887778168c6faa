"""What is made once and kept for later calls: plain tensors, wherever the first call was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torchzygote import JacobianPlan, jacobian, plan_hessian, plan_jacobian
from torchzygote._certificate import random_vector
from torchzygote._torch_private import plain_tensors

N = 13


def plan_of_other_dtype() -> JacobianPlan:
    """Called with float32, it makes constants, and draws for its check: nobody has kept a draw of N."""
    plan = plan_jacobian(torch.sin, torch.rand(N, dtype=torch.float64))
    for length in range(40, 50):
        random_vector(length)
    return plan


def energy(x: Tensor) -> Tensor:
    return (x[1:] * x[:-1] ** 2).sum()


def call_with_fake_tensors() -> None:
    """Plans refuse them, as docs/limitations.md says."""
    plan = plan_of_other_dtype()
    with FakeTensorMode(), pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        plan.values(torch.empty(N))


def trace_with_fake_tensors() -> None:
    with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
        make_fx(plan_of_other_dtype().values, tracing_mode="fake")(torch.rand(N))


@pytest.mark.parametrize("first", [call_with_fake_tensors, trace_with_fake_tensors])
def test_a_draw_for_fake_tensors_is_not_kept_for_others(first: Callable[[], None]) -> None:
    first()
    x = torch.rand(N)
    torch.testing.assert_close(jacobian(torch.sin, x, sparse=True)[0].to_dense(), x.cos().diag())


def test_a_plan_called_with_fake_tensors_goes_on_with_others() -> None:
    plan, x = plan_of_other_dtype(), torch.rand(N)
    second = plan_hessian(energy, x)
    with FakeTensorMode():
        for call in (plan.values, second.diagonal):
            with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
                call(torch.empty(N))
    torch.testing.assert_close(plan.values(x)[0], x.cos())
    torch.testing.assert_close(second.diagonal(x), torch.func.hessian(energy)(x).diagonal())


def test_a_first_call_may_be_under_vmap() -> None:
    """Which refuses random operations."""
    plan, x = plan_of_other_dtype(), torch.rand(4, N)
    torch.testing.assert_close(torch.vmap(lambda x: plan.values(x)[0])(x), x.cos())


def test_a_first_call_that_is_recorded_draws_nothing_in_the_program() -> None:
    plan, x = plan_of_other_dtype(), torch.rand(N)
    program = make_fx(lambda x: plan.values(x)[0])(torch.rand(N))
    assert "rand" not in program.code
    torch.testing.assert_close(program(x), x.cos())


def in_jacrev(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.func.jacrev(f)(x)
    return f(x)


def in_jvp(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jvp(f, (x,), (x,))[0]


def in_vmap(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.vmap(f)(x.unsqueeze(0))[0]


def in_inference_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return f(x).clone()


SURROUNDINGS = [in_jacrev, in_jvp, in_vmap, in_inference_mode]


@pytest.mark.parametrize("around", SURROUNDINGS)
def test_plans_are_copied_whatever_was_around_their_first_call(around: Any) -> None:
    x = torch.rand(N)
    first, second = plan_of_other_dtype(), plan_hessian(energy, torch.rand(N))
    torch.testing.assert_close(around(lambda x: first.values(x)[0], x), x.cos())
    expected = torch.func.hessian(energy)(x).diagonal()
    torch.testing.assert_close(around(second.diagonal, x), expected)
    torch.testing.assert_close(copy.deepcopy(first).values(x)[0], x.cos())
    torch.testing.assert_close(copy.deepcopy(second).diagonal(x), expected)
    z = x.clone().requires_grad_()  # recorded
    (found,) = torch.autograd.grad(first.values(z, create_graph=True)[0].sum(), z)
    torch.testing.assert_close(found, -x.sin())


class Pulled(torch.autograd.Function):
    """x², in reverse mode alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * grad


def test_a_plan_that_goes_over_to_reverse_mode_in_a_transform_is_copied() -> None:
    square: Callable[[Tensor], Tensor] = lambda x: x**2
    plan = plan_jacobian(lambda x: torch.cat([square(x), x[:1] * x[1:2], x, x.flip(0)]), torch.rand(6))
    assert plan.mode == "forward"
    square = lambda x: Pulled.apply(x)  # type: ignore[no-any-return]
    torch.func.jacrev(lambda x: plan.values(x)[0])(torch.rand(6))
    assert copy.deepcopy(plan).mode == "reverse"


def test_plain_tensors_are_plain() -> None:
    def made() -> Tensor:
        with plain_tensors():
            return torch.rand(3, generator=torch.Generator())

    found: list[Tensor] = []
    torch.vmap(lambda x: (found.append(made()), x)[1])(torch.ones(2))  # type: ignore[func-returns-value]
    torch.func.grad(lambda x: (found.append(made()), x)[1])(torch.ones(()))  # type: ignore[func-returns-value]
    with torch.inference_mode():
        found.append(made())
        assert torch.is_inference_mode_enabled()
    with FakeTensorMode():
        found.append(made())
        assert isinstance(torch.empty(1), torch._subclasses.FakeTensor)
    for x in found:
        assert type(x) is Tensor
        assert not x.is_inference()
        assert not torch._C._functorch.is_gradtrackingtensor(x)
        assert not torch._C._functorch.is_batchedtensor(x)
