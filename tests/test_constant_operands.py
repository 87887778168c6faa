"""Operators of one pushed operand and constants: the tangents of PyTorch, without zeros for the constants."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchzygote import forwarddiff, gradient, hessian_dual, jacobian, pushforward

Function = Callable[[Tensor], Tensor]

torch.manual_seed(0)
X = torch.rand(4, 4, dtype=torch.float64) + 0.5
C = torch.rand(4, 4, dtype=torch.float64) + 0.5
V = C[0]
IMAGES = torch.randn(2, 3, 4, 4, dtype=torch.float64)
KERNEL = torch.randn(2, 3, 2, 2, dtype=torch.float64)
BIAS = torch.randn(2, dtype=torch.float64)


def in_place(write: Callable[[Tensor], Any]) -> Function:
    def f(x: Tensor) -> Tensor:
        y = x * x
        write(y)
        return y.sin()

    return f


# Functions of a 4 by 4 matrix.
CASES: dict[str, Function] = {
    "number times": lambda x: (2 * x) * 3.5,
    "complex number": lambda x: (x * 2j + (1 + 1j)).imag,
    "real plus a complex number": lambda x: (x + 1j).mul_(2j).abs() + (1j + x).add_(x * 1j).abs(),
    "its parts": lambda x: (x - 2j).imag * x + (x - 1j).conj().real + torch.view_as_real(x + 1j).sum(-1),
    "spectrum": lambda x: torch.fft.fft(x + 0j).abs() + ((x + 1j) @ torch.exp(1j - C)).real,
    "sums with numbers": lambda x: (1 + x + 2.5).sin() - 3,
    "differences from numbers": lambda x: torch.rsub(1.5 - x, 2).cos(),
    "quotients by numbers": lambda x: x / 3 + 2 / x + torch.div(x, 7.0),
    "times": lambda x: (x * C).sin() * V,
    "constant times": lambda x: torch.mul(C, x).sin(),
    "squares": lambda x: x * x * C,
    "sum": lambda x: (x + C).sin() + torch.add(V, x),
    "sum, broadcast": lambda x: (x[0] + C).sin() * (C + x[:, :1]).cos(),
    "difference": lambda x: (x - C).sin() * torch.sub(V, x).cos(),
    "difference, broadcast": lambda x: (C - x[0]).sin(),
    "with alpha": lambda x: torch.add(x, C, alpha=2) * torch.sub(C, x, alpha=3),
    "quotient": lambda x: (x / C).sin() + torch.true_divide(V, x),
    "quotient, broadcast": lambda x: C / x[0] + x[:1] / C,
    "rounded quotient": lambda x: torch.div(x, C, rounding_mode="floor") * x,
    "narrow constant": lambda x: x * C.float() + C.half(),
    "whole constant": lambda x: x * torch.arange(4) + torch.arange(4) / x,
    "wide constant": lambda x: x.float() * C + x.float() * V,
    "complex constant": lambda x: (x * torch.complex(C, V) - torch.complex(C, V)).imag,
    "complex": lambda x: (torch.complex(x, C) * C / torch.complex(V, C)).real,
    "matrices": lambda x: torch.mm(C @ (x @ C), C),
    "matrix and vector": lambda x: torch.mv(x, V) @ C + C.mv(x[0]),
    "vectors": lambda x: torch.outer(x[0], V) + torch.dot(V, x[1]) + torch.inner(x, C) + V.dot(x[0]),
    "batches": lambda x: torch.bmm(x.expand(3, 4, 4), C.expand(3, 4, 4)).sum(0) + (C[None] @ x[None])[0],
    "kron": lambda x: torch.kron(x[:2, :2], C[:2, :2]),
    "einsum": lambda x: torch.einsum("ij,jk,k->ik", C, x.sin(), V) + torch.einsum("ij,jk", [x, C]),
    "einsum of one": lambda x: torch.einsum("ii->i", x).sin(),
    "linear": lambda x: (
        F.linear(x, C, V).sin() @ F.linear(C, x) + F.linear(C, C, x[0]) + F.linear(x, C, x[0])
    ),
    "conv": lambda x: torch.conv2d(IMAGES * x, KERNEL, BIAS, 1, 1)[0, 0],
    "conv by its kernel": lambda x: torch.conv2d(IMAGES, x[:2, None, :2, None].expand(2, 3, 2, 2), BIAS)[0],
    "conv by its bias": lambda x: torch.conv2d(IMAGES, KERNEL, x[0, :2])[0],
    "conv by name": lambda x: F.conv2d(input=IMAGES * x, weight=KERNEL, bias=BIAS)[0],
    "conv, transposed": lambda x: F.conv_transpose2d(x.expand(1, 2, 4, 4), KERNEL, None, 2)[0],
    "in place, numbers": in_place(lambda y: y.mul_(2).add_(1.5).sub_(0.5).div_(3)),
    "in place, by signs": in_place(lambda y: operator.itruediv(operator.isub(operator.imul(y, 2), 0.5), 4)),
    "in place, constants": in_place(lambda y: y.mul_(C).add_(V).sub_(C).div_(V)),
    "into a result": lambda x: (x * C).mul_(x) + (C + x).add_(x[0]),
    "into a view of a result": lambda x: _filled(x * C) + _filled(C - x),
    "detached": lambda x: x.detach() * C * x,
    "of constants made inside": lambda x: x * torch.ones(4, dtype=x.dtype).cumsum(0) + C.sin() / x,
    "sum of a list": lambda x: sum([x[0], x[1] * 2], V),
}


def _filled(y: Tensor) -> Tensor:
    y[0] = 1.0
    y[1] *= 2
    y[2:] += y[:2]
    return y


@pytest.mark.parametrize("case", CASES)
def test_pushes_are_those_of_pytorch(case: str) -> None:
    f = CASES[case]
    xdot = torch.randn(4, 4, dtype=torch.float64)
    expected, along = torch.func.jvp(f, (X,), (xdot,))
    value, push = _pushed(f)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(push(xdot), along, rtol=1e-14, atol=1e-14)
    rows = torch.randn(3, 4, 4, dtype=torch.float64)
    batched = torch.func.vmap(push)(rows)
    torch.testing.assert_close(batched, torch.stack([push(row) for row in rows]))


def _pushed(f: Function) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    value = f(X.clone())
    return value, lambda xdot: pushforward(f, X)(xdot)


@pytest.mark.parametrize("case", CASES)
def test_they_are_differentiable(case: str) -> None:
    """By the argument and by the tangent, in reverse and in forward mode."""
    f = CASES[case]
    xdot = torch.randn(4, 4, dtype=torch.float64)
    ours = lambda x, v: pushforward(f, x)(v)
    plain = lambda x, v: torch.tensordot(torch.func.jacrev(f)(x), v, dims=2)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        for at in (0, 1):
            found = transform(ours, argnums=at)(X, xdot)
            torch.testing.assert_close(found, transform(plain, argnums=at)(X, xdot))
    weights = torch.randn_like(plain(X, xdot))
    found = gradient(lambda x: (ours(x, xdot) * weights).sum(), X)[0]
    expected = torch.func.grad(lambda x: (plain(x, xdot) * weights).sum())(X)
    torch.testing.assert_close(torch.zeros_like(X) if found is None else found, expected)


@pytest.mark.parametrize("case", CASES)
def test_forward_derivatives_of_all_kinds(case: str) -> None:
    f = CASES[case]
    expected = torch.autograd.functional.jacobian(lambda x: f(x.clone()), X)
    found = forwarddiff_rows(f)
    torch.testing.assert_close(found, expected.reshape(found.shape))
    loss = lambda x: f(x).square().sum()
    torch.testing.assert_close(
        hessian_dual(loss, X),
        torch.autograd.functional.hessian(lambda x: loss(x.clone()), X).reshape(16, 16),
    )


def forwarddiff_rows(f: Function) -> Tensor:
    return jacobian(lambda x: forwarddiff(f, x), X)[0]


def test_what_is_closed_over_has_its_derivative() -> None:
    """Tangents go on by constants of this level, which another one differentiates by."""
    v = torch.randn(4, 4, dtype=torch.float64)
    f = lambda x, w: (x * w + w / x - x) @ w + F.linear(x, w, w[0])
    ours = lambda w: pushforward(lambda x: f(x, w), X)(v)
    plain = lambda w: torch.func.jvp(lambda x: f(x, w), (X,), (v,))[1]
    torch.testing.assert_close(jacobian(ours, C)[0], torch.func.jacrev(plain)(C).reshape(16, 16))
    torch.testing.assert_close(torch.func.jacfwd(ours)(C), torch.func.jacfwd(plain)(C))


def test_infinite_constants_spoil_no_tangent() -> None:
    """PyTorch fills the tangents of matrices' operands with zeros: times infinity, these are NaN."""
    x = torch.tensor([torch.inf, 1.0])
    found = pushforward(lambda x: F.linear(x, torch.eye(2)), x)(torch.ones(2))
    assert found.tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_no_tangents_of_zeros_are_made() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    f = lambda x: (2 * net(x * C) / 3 - 1 + V[:3]) @ C[:3] - 4 / x
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        pushforward(f, X)(X)
    called = {event.key for event in profile.key_averages()}
    assert "aten::_efficientzerotensor" not in called
    assert "aten::addmm" in called or "aten::linear" in called


def test_under_autocast() -> None:
    net = nn.Linear(4, 4)
    f = lambda x: net(x * 2) + V.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pushforward(f, X.float())(C.float())
        expected = torch.func.jvp(f, (X.float(),), (C.float(),))[1]
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected)


class Bent(TorchFunctionMode):
    """Somebody's own linear layers and products."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        return y.tanh() if func in (F.linear, Tensor.mul) else y


def test_modes_of_others_see_what_is_called() -> None:
    v = torch.randn(4, 4, dtype=torch.float64)
    f = lambda x: F.linear(x, C) * 2.0
    with Bent():
        expected = torch.func.jvp(f, (X,), (v,))[1]
        torch.testing.assert_close(pushforward(f, X)(v), expected)
        torch.testing.assert_close(
            gradient(lambda x: forwarddiff(lambda x: f(x).sum(), x), X)[0],
            torch.func.grad(lambda x: f(x).sum())(X),
        )

    def bent_inside(x: Tensor) -> Tensor:
        with Bent():
            return f(x)

    torch.testing.assert_close(pushforward(bent_inside, X)(v), expected)


def test_inference_mode_inside() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.inference_mode():
            is_large = bool((x * C + C).sum() > 0)
        return x * C if is_large else x

    assert torch.equal(pushforward(f, X)(X), X * C)


def test_many_pairs_that_are_pushed_hide_no_constant() -> None:
    """Some pairs are passed over, which are PyTorch's then."""

    def f(x: Tensor) -> Tensor:
        for i in range(60):
            x = (x * x.cos() + x) / (1 + x * x)
            if i % 7 == 0:
                x = x * C.sin() + C[:1] / x
        return x

    torch.testing.assert_close(pushforward(f, X)(C), torch.func.jvp(f, (X,), (C,))[1])


SHAPES = st.sampled_from([(), (1,), (3,), (2, 3), (2, 1), (1, 3), (0, 3), (4, 2, 3)])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64])


@given(
    SHAPES,
    SHAPES,
    DTYPES.filter(lambda dtype: dtype is not torch.int64),
    DTYPES,
    st.sampled_from([operator.add, operator.sub, operator.mul, operator.truediv]),
    st.booleans(),
)
def test_shapes_and_dtypes(
    shape: Any, other: Any, dtype: Any, other_dtype: Any, combine: Any, is_left: bool
) -> None:
    """0-dim tensors count less for the dtype of the result."""
    x = torch.full(shape, 1.5).to(dtype)
    xdot = torch.full(shape, 0.5).to(dtype)
    c = torch.full(other, 3.0).to(other_dtype)
    f = lambda x: combine(x, c) if is_left else combine(c, x)
    try:
        expected = torch.func.jvp(f, (x,), (xdot,))
    except RuntimeError:  # shapes that don't broadcast
        with pytest.raises(RuntimeError):
            pushforward(f, x)(xdot)
        return
    found = pushforward(f, x)(xdot)
    torch.testing.assert_close(found, expected[1], rtol=1e-6, atol=1e-6)
