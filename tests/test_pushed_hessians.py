"""Value, gradient and Hessian by forward over reverse, from one run of the function where that can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from doubles import Doubled
from torch import Tensor

from torchzygote import (
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hook,
    jacobian,
    set_memory_budget,
    showgrad,
    withhessian,
)

MODE = "forward_over_reverse"


class Counted:
    """A function, and how often it was called."""

    def __init__(self, f: Callable[[Any], Any]) -> None:
        self.f = f
        self.calls = 0

    def __call__(self, x: Any) -> Any:
        self.calls += 1
        return self.f(x)


def energy(x: Tensor) -> Tensor:
    """Its derivatives are :func:`energy_derivatives`."""
    return (x**3).sum() + x.sum() ** 2


def energy_derivatives(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    flat = x.reshape(-1)
    hess = torch.diag(6 * flat) + 2
    return (x**3).sum() + x.sum() ** 2, 3 * x**2 + 2 * x.sum(), hess


@pytest.mark.parametrize(
    ("shape", "chunk_size", "calls"),
    [
        ((1,), None, 1),
        ((7,), None, 1),
        ((2, 8), None, 1),
        ((6,), 6, 1),
        ((6,), 100, 1),
        ((6,), 4, 2),
        ((6,), 1, 6),
        ((17,), None, 2),
        ((0,), None, 1),
    ],
)
def test_f_runs_once_for_each_chunk(shape: tuple[int, ...], chunk_size: int | None, calls: int) -> None:
    x = torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
    f = Counted(energy)
    found = withhessian(f, x, mode=MODE, chunk_size=chunk_size)
    assert f.calls == calls
    for got, expected in zip(found, energy_derivatives(x), strict=True):
        torch.testing.assert_close(got, expected)
        assert not got.requires_grad
        assert got.is_contiguous()


def test_numbers_and_numpy_arrays_run_once_too() -> None:
    f = Counted(torch.sin)
    val, grad, hess = withhessian(f, 2.0, mode=MODE)
    assert f.calls == 1
    for got, expected in ((val, np.sin(2.0)), (grad, np.cos(2.0)), (hess, -np.sin(2.0))):
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float32))
    f = Counted(energy)
    x = np.array([1.0, -2.0])
    found = withhessian(f, x, mode=MODE)
    assert f.calls == 1
    for got, expected in zip(found, energy_derivatives(torch.tensor(x)), strict=True):
        torch.testing.assert_close(got, expected)


def test_it_runs_again_where_not_all_columns_fit_the_memory_budget() -> None:
    heavy = Counted(lambda x: (torch.linspace(0, 1, 1 << 18).sin() * x.sum().exp()).cos().sum() + energy(x))
    x = torch.linspace(0, 1, 6)
    expected = withhessian(heavy, x, mode=MODE)
    assert heavy.calls == 1
    set_memory_budget(9 << 20)
    try:
        found = withhessian(heavy, x, mode=MODE)
    finally:
        set_memory_budget(None)
    assert heavy.calls > 3  # to be measured, for the value, and for chunks
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_numbers_are_drawn_once(chunk_size: int | None) -> None:
    def f(x: Tensor) -> Tensor:
        return (F.dropout(x) ** 2 * torch.rand(5)).sum() + (x * torch.randn_like(x)).sum() ** 2

    x = torch.linspace(1, 2, 5)
    torch.manual_seed(3)
    value = f(x)
    after = torch.rand(2)
    torch.manual_seed(3)
    grad = torch.func.grad(f)(x)
    torch.manual_seed(3)
    hess = torch.func.vmap(lambda v: torch.func.jvp(torch.func.grad(f), (x,), (v,))[1], randomness="same")(
        torch.eye(5)
    )
    torch.manual_seed(3)
    found = withhessian(f, x, mode=MODE, chunk_size=chunk_size)
    assert torch.equal(torch.rand(2), after)
    for got, expected in zip(found, (value, grad, hess), strict=True):
        torch.testing.assert_close(got, expected)


def test_draws_of_other_generators_are_the_same_in_value_and_matrix() -> None:
    """Only PyTorch's own generators can be set back: one run makes them agree."""
    mine = np.random.default_rng(0)
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    val, grad, hess = withhessian(lambda x: mine.normal() * (x**2).sum(), x, mode=MODE)
    factor = np.random.default_rng(0).normal()
    torch.testing.assert_close(val, torch.tensor(5 * factor, dtype=torch.float64))
    torch.testing.assert_close(grad, 2 * factor * x)
    torch.testing.assert_close(hess, 2 * factor * torch.eye(2, dtype=torch.float64))


def test_hooks_run_once_and_see_plain_gradients(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def f(x: Tensor) -> Tensor:
        hook(lambda g: seen.append(g), x * 2)  # no gradient comes
        showgrad(x + 1, "unused")
        return (showgrad(hook(torch.neg, x), "x") ** 3).sum()

    x = torch.tensor([1.0, 2.0])
    for chunk_size in (None, 1):
        seen.clear()
        val, grad, hess = withhessian(f, x, mode=MODE, chunk_size=chunk_size)
        assert seen == [None]
        printed = capsys.readouterr().out.splitlines()
        assert printed[: len(printed) - 1] == ["∂(x) = tensor([ 3., 12.])"] * (1 if chunk_size is None else 2)
        assert printed[-1] == "∂(unused) = None"
        torch.testing.assert_close(val, torch.tensor(9.0))
        torch.testing.assert_close(grad, -3 * x**2)
        torch.testing.assert_close(hess, torch.diag(-6 * x))


def test_a_run_that_is_repeated_row_by_row_reports_once() -> None:
    class Square(torch.autograd.Function):
        """Has no rule for batches."""

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**2

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            if t.ndim > 0 and torch._C._functorch.is_batchedtensor(t):
                raise RuntimeError("not batched")
            return 2 * t * ctx.saved_tensors[0]

    seen: list[Any] = []

    def f(x: Tensor) -> Tensor:
        hook(lambda g: seen.append(g), x * 2)
        return (Square.apply(x) * x).sum()

    x = torch.tensor([1.0, 2.0, 3.0])
    with pytest.warns(UserWarning, match="one at a time"):
        val, grad, hess = withhessian(f, x, mode=MODE)
    assert seen == [None]
    torch.testing.assert_close(val, (x**3).sum())
    torch.testing.assert_close(grad, 3 * x**2)
    torch.testing.assert_close(hess, torch.diag(6 * x))


@pytest.mark.parametrize("constant", [3, 2.5, True, np.float64(1.5), torch.tensor(2), torch.tensor(4.0)])
def test_constants_are_handed_back(constant: Any) -> None:
    x = torch.tensor([1.0, 2.0])
    val, grad, hess = withhessian(lambda x: constant, x, mode=MODE)
    assert type(val) is type(constant)
    assert val == constant
    assert torch.equal(grad, torch.zeros(2))
    assert torch.equal(hess, torch.zeros(2, 2))
    hess[0, 0] = 1.0  # memory of its own, element by element
    assert hess.sum() == 1
    grad[0] = 1.0
    assert grad.sum() == 1


def test_integers_computed_from_x_are_constant() -> None:
    x = torch.tensor([1.0, -2.0])
    val, grad, hess = withhessian(lambda x: (x > 0).sum(), x, mode=MODE)
    assert torch.equal(val, torch.tensor(1))
    assert torch.equal(grad, torch.zeros(2))
    assert torch.equal(hess, torch.zeros(2, 2))


@pytest.mark.parametrize("without_grad", [False, True])
def test_with_create_graph_all_three_are_differentiable(without_grad: bool) -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    with torch.set_grad_enabled(not without_grad):
        found = withhessian(energy, x, mode=MODE, create_graph=True)
    for got, expected in zip(found, energy_derivatives(x), strict=True):
        torch.testing.assert_close(got, expected)
        (d,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
        (wanted,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
        torch.testing.assert_close(d, wanted)


def test_without_it_nothing_keeps_the_graph_of_what_f_closes_over() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for got in withhessian(lambda x: (w * x**2).sum(), x, mode=MODE):
        assert not got.requires_grad
    assert w.grad is None


def test_nested_in_other_derivatives() -> None:
    x = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def part(which: int) -> Callable[[Tensor], Tensor]:
        return lambda x: withhessian(energy, x, mode=MODE)[which].sin().sum()

    def plain(which: int) -> Callable[[Tensor], Tensor]:
        return lambda x: energy_derivatives(x)[which].sin().sum()

    for which in range(3):
        expected = torch.func.grad(plain(which))(x)
        torch.testing.assert_close(torch.func.grad(part(which))(x), expected)
        torch.testing.assert_close(torch.func.jacfwd(part(which))(x), expected)
        torch.testing.assert_close(gradient(part(which), x)[0], expected)
        torch.testing.assert_close(jacobian(part(which), x, mode="forward")[0][0], expected)
        torch.testing.assert_close(hessian(part(which), x), torch.func.hessian(plain(which))(x))
    rows = torch.tensor([[0.5, 2.0], [1.0, -1.0], [0.0, 3.0]], dtype=torch.float64)
    found = torch.func.vmap(lambda x: tuple(withhessian(energy, x, mode=MODE)))(rows)
    for got, expected in zip(found, torch.func.vmap(energy_derivatives)(rows), strict=True):
        torch.testing.assert_close(got, expected)


def test_compiled_it_is_traced_once() -> None:
    torch._dynamo.reset()
    x = torch.linspace(0, 1, 20, dtype=torch.float64)
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return energy(x)

    def all_three(x: Tensor) -> tuple[Tensor, ...]:
        calls.clear()
        return tuple(withhessian(f, x, mode=MODE))

    found = torch.compile(all_three, backend="eager", fullgraph=True)(x)
    assert len(calls) == 1
    for got, expected in zip(found, energy_derivatives(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("f", "kind", "message"),
    [
        (lambda x: x, ValueError, "real scalar, got an array"),
        (lambda x: x.sum() * 1j, ValueError, "complex"),
        (lambda x: "text", ValueError, "real scalar, got"),
        (lambda x: x.mul_(2).sum(), RuntimeError, "leaf Variable"),
        (lambda x: 1 / 0, ZeroDivisionError, "division"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_is_refused_stays_refused(f: Any, kind: type[Exception], message: str) -> None:
    x = torch.tensor([1.0, 2.0])
    for way in (lambda: withhessian(f, x, mode=MODE), lambda: hessian_dual(f, x)):
        with pytest.raises(kind, match=message):
            way()
    assert torch.equal(x, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "way",
    [
        hessian,
        hessian_dual,
        lambda f, x: hessian_dual(f, x, chunk_size=3),
        lambda f, x: withhessian(f, x).hess,
        lambda f, x: withhessian(f, x, mode=MODE).hess,
    ],
)
def test_a_compiled_function_that_a_gradient_was_taken_of(way: Callable[..., Tensor]) -> None:
    """It has given its buffers away then, and can be pulled back once."""
    torch.compiler.reset()
    W = torch.linspace(-1, 1, 400).view(20, 20).sin()
    f = lambda x: (W @ (W @ x).tanh()).cos().sum()
    compiled = torch.compile(f, backend="aot_eager")
    x = torch.linspace(-1, 1, 20)
    gradient(compiled, x)
    torch.testing.assert_close(way(compiled, x), torch.autograd.functional.hessian(f, x))


def test_an_argument_that_is_negated_by_a_bit() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j]).conj().imag
    assert x.is_neg()
    f = lambda x: x[0] ** 3 * x[1]
    expected = hessian(f, x.clone())
    torch.testing.assert_close(hessian_dual(f, x), expected)
    torch.testing.assert_close(withhessian(f, x, mode=MODE).hess, expected)
    torch.testing.assert_close(gradient(lambda x: forwarddiff(f, x), x)[0], gradient(f, x.clone())[0])


@pytest.mark.parametrize("first", [3, 4, 5, 6])
def test_a_custom_function_in_a_later_run(first: int) -> None:
    """As where something is compiled after some calls: rows that were pushed before are taken again."""
    runs = []

    def f(x: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) == 1:
            raise RuntimeError("no batch")
        y = x**3
        return (Doubled.apply(y) / 2 if len(runs) >= first else y).sum()

    with pytest.warns(UserWarning, match="one at a time"):
        H = hessian_dual(f, torch.ones(4))
    torch.testing.assert_close(H, 6 * torch.eye(4))
