"""Custom functions whose backward leaves autograd, in disguise: refused, whatever way is taken, or right."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from torchzygote import (
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    plan_hessian,
    withhessian,
)

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
REVERSE: dict[str, Callable[..., Any]] = {
    "hessian": hessian,
    "hessian_reverse": hessian_reverse,
    "withhessian": withhessian,
    "diaghessian": diaghessian,
    "sparse": lambda f, x: hessian(f, x, sparse=True),
    "plan": lambda f, x: plan_hessian(f, x)(x),
    "gradient of gradient": lambda f, x: gradient(lambda x: gradient(f, x)[0].sum(), x),
}
ALL = {
    **REVERSE,
    "hessian_dual": hessian_dual,
    "in chunks": lambda f, x: hessian_dual(f, x, chunk_size=1),
    "many": lambda f, x: hessian_dual(f, x.repeat(20)),
}


def apply(function: type[Function], *args: Tensor) -> Any:
    return function.apply(*args)  # type: ignore[no-untyped-call]


def refused(call: Callable[..., Any], f: Callable[[Tensor], Tensor], x: Tensor = X) -> None:
    before = x.clone()
    with pytest.raises(RuntimeError, match="can't be differentiated twice") as found:
        call(f, x)
    assert type(found.value) is RuntimeError
    assert torch.equal(x, before)


class Triple(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.mark_dirty(v.mul_(3))
        return v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


class TripleByNumpy(Triple):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(3 * g.detach().numpy())


class TripleOnce(Triple):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g


def in_view(function: type[Function]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y = x * x
        apply(function, y[:2])
        return (y**2).sum()

    return f


@pytest.mark.parametrize("name", REVERSE)
@pytest.mark.parametrize("function", [TripleByNumpy, TripleOnce])
def test_what_writes_into_a_view_is_seen(name: str, function: type[Function]) -> None:
    refused(REVERSE[name], in_view(function))


def test_what_writes_into_a_view_differentiably_is_right() -> None:
    torch.testing.assert_close(hessian(in_view(Triple), X), (X**2 * torch.tensor([108, 108, 12])).diag())


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y[:2].mul_(3),
        lambda y: y[:2].zero_(),
        lambda y: y[:2].copy_(torch.ones(2)),
        lambda y: y[1:].copy_(y[:2].clone()),
        lambda y: y[:2].relu_(),
        lambda y: y[:2].fill_(float("nan")),
        lambda y: y[1].floor_(),
        lambda y: y[:2].masked_fill_(torch.tensor([True, False]), 2.0),
        lambda y: y[:2].index_put_((torch.tensor([0]),), torch.ones(1).double()),
        lambda y: y[:2].div_(y[2:].clone()),
    ],
)
def test_pytorchs_own_operations_write_into_views_as_before(write: Callable[[Tensor], Any]) -> None:
    def f(x: Tensor) -> Tensor:
        y = x * x
        write(y)
        return (y**2).sum()

    torch.testing.assert_close(hessian(f, X), torch.func.hessian(f)(X), equal_nan=True)


class Cube(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * ctx.saved_tensors[0] ** 2 * t

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (3 * ctx.saved_tensors[0] ** 2 * g).detach()


class CubeOnce(Cube):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.mark.parametrize("name", ALL)
def test_forward_mode_does_not_take_over(name: str) -> None:
    refused(ALL[name], lambda x: apply(Cube, x).sum())


@pytest.mark.parametrize("name", ["hessian", "hessian_dual", "in chunks"])
def test_forward_mode_takes_over_what_it_can_do(name: str) -> None:
    torch.testing.assert_close(ALL[name](lambda x: apply(CubeOnce, x).sum(), X), (6 * X).diag())


class Square(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy() * g.detach().numpy())


@pytest.mark.parametrize("name", REVERSE)
def test_a_zero_gradient_hides_nothing(name: str) -> None:
    refused(REVERSE[name], lambda x: (apply(Square, x) - X**2).square().sum())


class Product(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return g.detach() * b, g.data * a


@pytest.mark.parametrize("name", REVERSE)
def test_a_gradient_that_depends_on_what_was_saved_alone_is_refused(name: str) -> None:
    refused(REVERSE[name], lambda x: apply(Product, x, x).square().sum())


class TwoPowers(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        return a**2, b**3

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return 2 * a * g[0], 3 * b**2 * g[1]


class Sign(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g)


class Clipped(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-1, 1)


class Doubled(Function):
    """Writes into its cotangent, and has attributes that nodes have, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.name, ctx.variable = "mine", 3
        return 2 * x.sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.mul_(2).expand(3)


class CompiledFunction(Square):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        doubled: Tensor = 2 * ctx.saved_tensors[0] * g
        return doubled


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda x: apply(TwoPowers, x, x)[0].square().sum(), 12 * X**2),
        (lambda x: (apply(TwoPowers, x, x)[0] - X**2).square().sum(), 8 * X**2),
        (lambda x: (apply(TwoPowers, x, 2 * x)[1] - 8 * X**3).square().sum(), 2 * (24 * X**2) ** 2),
        (lambda x: (apply(Sign, x) * x**3).sum(), 6 * X),
        (lambda x: apply(Clipped, x).square().sum() / 10, torch.full_like(X, 0.2)),
        (lambda x: apply(Doubled, x**2), torch.full_like(X, 4.0)),
        (lambda x: apply(CompiledFunction, x).sum(), torch.full_like(X, 2.0)),
    ],
    ids=["unused output", "at an optimum", "the other output", "zeros", "not linear", "in place", "a name"],
)
def test_good_ones_are_right(f: Callable[[Tensor], Tensor], expected: Tensor) -> None:
    torch.testing.assert_close(hessian(f, X), expected.diag())
    torch.testing.assert_close(diaghessian(f, X)[0], expected)


def test_a_zero_cotangent_is_found_out_without_drawing_random_numbers() -> None:
    state = torch.get_rng_state()
    hessian(lambda x: (apply(Sign, x) * x).sum(), X)
    assert torch.equal(torch.get_rng_state(), state)


# ---- what is written into a part of complex numbers leaves the other part --------------------------


def real_and_imaginary(x: Tensor) -> Tensor:
    b = torch.zeros(3, dtype=torch.complex128)
    b.real = x.sin()
    b.imag = x**2
    return (b.abs() ** 2).sum()


def a_constant_part(x: Tensor) -> Tensor:
    b = torch.complex(x.exp(), x**3)
    b.real[0] = 0.5
    b.imag[::2].fill_(2.0)
    return (b.real * b.imag + b.abs() ** 2).sum()


def one_of_a_pair(x: Tensor) -> Tensor:
    b = torch.complex(x.cos(), x**3) * x
    torch.view_as_real(b)[..., 0] = x.sin()
    return (b * b).real.sum() + (b.imag**3).sum()


@pytest.mark.parametrize("f", [real_and_imaginary, a_constant_part, one_of_a_pair])
@pytest.mark.parametrize("name", [name for name in ALL if name not in ("many", "in chunks")])
def test_parts_of_complex_numbers_may_be_written(name: str, f: Callable[[Tensor], Tensor]) -> None:
    expected: Tensor = torch.autograd.functional.hessian(f, X)  # type: ignore[no-untyped-call]
    found = ALL[name](f, X)
    if name == "gradient of gradient":
        torch.testing.assert_close(found[0], expected.sum(0))
    elif name == "diaghessian":
        torch.testing.assert_close(found[0], expected.diagonal())
    else:
        found = found.hess if name == "withhessian" else found
        torch.testing.assert_close(found.to_dense(), expected)


class TripleReal(Triple):
    """In place, with a backward that leaves autograd."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (g.detach() * 3).clone()


@pytest.mark.parametrize("name", ["hessian_reverse", "gradient of gradient"])
def test_a_cut_in_a_part_of_complex_numbers_is_refused(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        b = torch.complex(x.exp(), x**3)
        apply(TripleReal, b.real)
        return (b.abs() ** 2).sum()

    refused(ALL[name], f)


@pytest.mark.parametrize("name", REVERSE)
def test_what_another_thread_has_computed_is_looked_at_too(name: str) -> None:
    """Each thread numbers its nodes from the beginning: they look older than the function is."""

    def f(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: apply(TripleByNumpy, 2 * x).sum()).result()

    refused(REVERSE[name], f)
