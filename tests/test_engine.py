"""Nesting: every way to differentiate inside every other one, against ``torch.func`` alone."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchzygote.gradients import gradient, pullback, pushforward
from torchzygote.hessians import hessian, hessian_dual
from torchzygote.jacobians import jacobian


def f(x: Tensor) -> Tensor:
    return (x.sin() * x.roll(1)).sum() + x[0] * x[2] * x[3]


Scalar = Callable[[Tensor], Tensor]

# each gives the gradient of a scalar function
INNER: dict[str, Callable[[Scalar, Tensor], Tensor]] = {
    "gradient": lambda g, x: gradient(g, x)[0],
    "pullback": lambda g, x: pullback(g, x)[1](1.0)[0],
    "pushforward": lambda g, x: torch.stack([pushforward(g, x)(e) for e in torch.eye(len(x), dtype=x.dtype)]),
    "jacobian reverse": lambda g, x: jacobian(g, x, mode="reverse")[0].reshape(-1),
    "jacobian forward": lambda g, x: jacobian(g, x, mode="forward")[0].reshape(-1),
    "torch.func.grad": lambda g, x: torch.func.grad(g)(x),
    "torch.func.jacfwd": lambda g, x: torch.func.jacfwd(g)(x),
}

# each gives the Jacobian of a vector function
OUTER: dict[str, Callable[[Scalar, Tensor], Tensor]] = {
    "rows of gradient": lambda g, x: torch.stack(
        [gradient(lambda x, i=i: g(x)[i], x)[0] for i in range(len(x))]
    ),
    "pullback": lambda g, x: torch.stack([pullback(g, x)[1](e)[0] for e in torch.eye(len(x), dtype=x.dtype)]),
    "jacobian reverse": lambda g, x: jacobian(g, x, mode="reverse")[0],
    "jacobian forward": lambda g, x: jacobian(g, x, mode="forward")[0],
    "jacobian by chunks": lambda g, x: jacobian(g, x, chunk_size=2)[0],
    "torch.func.jacrev": lambda g, x: torch.func.jacrev(g)(x),
    "torch.func.jacfwd": lambda g, x: torch.func.jacfwd(g)(x),
    "vmap of jacobian": lambda g, x: torch.func.vmap(lambda x: jacobian(g, x)[0])(x[None])[0],
}


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -1.2, 0.7, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", INNER)
def test_second_order_by_any_two(inner: str, outer: str, x: Tensor) -> None:
    found = OUTER[outer](lambda x: INNER[inner](f, x), x)
    torch.testing.assert_close(found, torch.func.hessian(f)(x))


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", [hessian, hessian_dual])
def test_third_order(inner: Callable[..., Tensor], outer: str, x: Tensor) -> None:
    found = OUTER[outer](lambda x: inner(f, x).sum(0), x)
    torch.testing.assert_close(found, torch.func.jacrev(lambda x: torch.func.hessian(f)(x).sum(0))(x))


def test_inner_gradient_does_not_confuse_levels(x: Tensor) -> None:
    """d/dx of x * d/dy (x + y) at y = x is 1: the inner derivative knows its own variable only."""
    found = gradient(lambda x: (x * gradient(lambda y: (x + y).sum(), x)[0]).sum(), x)[0]
    torch.testing.assert_close(found, torch.ones_like(x))


def test_plain_autograd_outside_counts_only_when_asked(x: Tensor) -> None:
    w = x.clone().requires_grad_()
    assert not gradient(f, w * 2)[0].requires_grad
    inside = gradient(f, w * 2, create_graph=True)[0]
    (found,) = torch.autograd.grad(inside.sum(), w)
    torch.testing.assert_close(found, 2 * torch.func.hessian(f)(2 * x).sum(0))


def test_create_graph_is_kept_under_vmap(x: Tensor) -> None:
    w = x.clone().requires_grad_()
    inside = torch.func.vmap(lambda s: gradient(lambda y: (s * y**3).sum(), w, create_graph=True)[0])(x)
    (found,) = torch.autograd.grad(inside.sum(), w)
    torch.testing.assert_close(found, 6 * x * x.sum())


def test_pullback_is_differentiable_by_its_cotangent(x: Tensor) -> None:
    _, back = pullback(torch.sin, x)
    found = gradient(lambda v: (back(v)[0] ** 2).sum(), x)[0]
    torch.testing.assert_close(found, 2 * x * x.cos() ** 2)
    torch.testing.assert_close(torch.func.grad(lambda v: (back(v)[0] ** 2).sum())(x), found)


def test_inside_no_grad_and_inference_mode(x: Tensor) -> None:
    expected = torch.func.grad(f)(x), torch.func.hessian(f)(x)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = x.clone()
            found = gradient(f, y)[0], hessian(f, y)
            torch.testing.assert_close(pushforward(f, y)(y), expected[0] @ x)
            assert not torch.is_grad_enabled()
        torch.testing.assert_close(found, expected)


def test_threads_in_forward_mode_do_not_disturb_each_other(x: Tensor) -> None:
    expected = torch.func.hessian(f)(x)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(20):
            try:
                found = hessian_dual(f, x)
                pushed = pushforward(f, x)(x)
            except Exception as error:
                wrong.append(error)
                return
            if not torch.allclose(found, expected) or not torch.allclose(pushed, torch.func.grad(f)(x) @ x):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Cube(torch.autograd.Function):
    """Its backward leaves autograd: right once, zero twice, unless somebody looks."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(3 * g.detach().numpy() * x.detach().numpy() ** 2)


class CubeOnce(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


@pytest.mark.parametrize("function", [Cube, CubeOnce])
def test_a_backward_that_cannot_be_differentiated_is_refused(function: type[Cube], x: Tensor) -> None:
    torch.testing.assert_close(gradient(lambda x: function.apply(x).sum(), x)[0], 3 * x**2)
    with pytest.raises(RuntimeError, match=f"differentiated twice.*{function.__name__}"):
        hessian(lambda x: function.apply(x).sum(), x)
    with pytest.raises(RuntimeError, match=f"differentiated twice.*{function.__name__}"):
        jacobian(lambda x: gradient(lambda x: function.apply(x).sum(), x)[0], x)


class CubeBatched(torch.autograd.Function):
    """As ``CubeOnce``, and its rows can be batched, where nobody asks the tape."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 3 * g * x**2


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_batched_rows_are_refused_too(chunk_size: int | None, x: Tensor) -> None:
    rows = lambda x: jacobian(CubeBatched.apply, x, mode="reverse", chunk_size=chunk_size)[0]
    torch.testing.assert_close(rows(x), torch.diag(3 * x**2))
    with pytest.raises(RuntimeError, match="differentiated twice.*CubeBatched"):
        gradient(lambda x: rows(x).sum(), x)
    with pytest.raises(RuntimeError, match="differentiated twice.*CubeBatched"):
        jacobian(CubeBatched.apply, x, mode="reverse", chunk_size=chunk_size, create_graph=True)


@pytest.mark.parametrize("nested", [False, True])
def test_writing_into_an_argument_is_refused_and_changes_nothing(nested: bool, x: Tensor) -> None:
    before = x.clone()

    def writes(x: Tensor) -> Tensor:
        return x.mul_(2).sum()

    with pytest.raises(RuntimeError, match=r"in-place|inplace") as info:
        if nested:
            gradient(lambda x: gradient(writes, x)[0].sum(), x)
        else:
            gradient(writes, x)
    assert any("clone()" in note for note in getattr(info.value, "__notes__", ["clone()"]))
    assert torch.equal(x, before)
    assert not x.requires_grad


def writes_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[0] = x[1] * x[2]
    y[1:] *= x[0]
    return y.mul_(x)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda x: jacobian(writes_in_place, x, mode="reverse")[0],
        lambda x: jacobian(writes_in_place, x, mode="forward")[0],
        lambda x: pullback(writes_in_place, x)[1](torch.ones_like(x[0]).expand(4))[0],
        lambda x: pullback(writes_in_place, x)[1](torch.ones(4, dtype=torch.float64))[0],
        lambda x: pushforward(writes_in_place, x)(torch.ones(4, dtype=torch.float64)),
        lambda x: hessian_dual(lambda x: writes_in_place(x).sum(), x),
    ],
)
def test_a_function_that_writes_in_place_under_vmap(derivative: Callable[[Tensor], Tensor]) -> None:
    X = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 4)
    torch.testing.assert_close(torch.func.vmap(derivative)(X), torch.stack([derivative(x) for x in X]))
