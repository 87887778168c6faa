"""forwarddiff: values, derivatives by what it is given, and what it drops."""

from __future__ import annotations

import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import fd_gradient
from torch import Tensor, nn

from torchzygote import (
    DroppedGradientWarning,
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hook,
    isderiving,
    jacobian,
    pushforward,
)

func = torch.func


def body(x: Tensor) -> Tensor:
    return (x.sin() * x.roll(1)).cumsum(0) * x.exp()


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    out=st.integers(0, 4),
    chunk=st.sampled_from([None, 1, 2, 100]),
)
def test_any_shape_in_any_chunks(shape: list[int], out: int, chunk: int | None) -> None:
    n = torch.Size(shape).numel()
    x = torch.linspace(0.5, 1.5, max(1, n), dtype=torch.float64)[:n].reshape(shape)
    A = torch.linspace(-1, 1, out * n, dtype=torch.float64).reshape(out, n)
    J = jacobian(lambda x: forwarddiff(lambda x: A @ x.reshape(-1).sin(), x, chunk_threshold=chunk), x)[0]
    expected = A * x.reshape(-1).cos()
    torch.testing.assert_close(J, expected.reshape(-1) if x.dim() == 0 else expected)


def test_structures_in_and_out(x: Tensor) -> None:
    Out = namedtuple("Out", "total parts note")

    def f(s: Any) -> Out:
        return Out((s["a"] * s["b"][0]).sum(), [s["a"].sin(), s["n"], 2 * s["a"]], "note")

    def through(wrap: Any) -> Any:
        def g(a: Tensor, b: Tensor) -> Tensor:
            out = wrap(f, {"a": a, "b": (b, "text"), "n": 3})
            assert isinstance(out, Out)
            assert out.note == "note"
            assert out.parts[1] == 3
            return out.total + (out.parts[0] * out.parts[2]).sum()

        return gradient(g, x, 2.0)

    torch.testing.assert_close(through(forwarddiff), through(lambda f, s: f(s)))


def test_a_dict_may_have_its_keys_in_another_order_when_f_runs_again(x: Tensor) -> None:
    runs: list[int] = []

    def f(x: Tensor, *, again: Any) -> Any:
        runs.append(0)
        found = {"p": x * 2, "q": (x * 3, "text")}
        return found if len(runs) == 1 else again(found)

    turned = lambda found: dict(reversed(list(found.items())))
    (found,) = gradient(lambda x: forwarddiff(lambda x: f(x, again=turned), x)["p"].sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, 2))
    runs.clear()
    with pytest.raises(ValueError, match=r"what f returned as it ran again: expected the structure"):
        gradient(lambda x: forwarddiff(lambda x: f(x, again=lambda found: [found]), x)["p"].sum(), x)


def test_mixed_dtypes_and_complex_numbers(x: Tensor) -> None:
    z = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128)

    def f(t: Any) -> Any:
        a, z = t
        return z.conj() ** 2 * a.double().sum(), (z.abs() * a[0]).float()

    def through(wrap: Any) -> Any:
        def g(a: Tensor, z: Tensor) -> Tensor:
            u, v = wrap(f, (a, z))
            return (u * (1 + 2j)).real.sum() + u.abs().sum() + v.double().sum()

        return gradient(g, x.float(), z)

    torch.testing.assert_close(through(forwarddiff), through(lambda f, s: f(s)))


def test_expanded_and_transposed_input(x: Tensor) -> None:
    found = gradient(lambda s: forwarddiff(lambda x: (x**2).sum(), s.expand(3, 2).T), x[:1].expand(2))[0]
    torch.testing.assert_close(found, torch.full((2,), 3.0, dtype=torch.float64) * x[0] * 2)


def test_against_finite_differences(x: Tensor) -> None:
    f = lambda x: forwarddiff(body, x * 2).prod()
    torch.testing.assert_close(gradient(f, x)[0], fd_gradient(f, x)[0], rtol=1e-6, atol=1e-6)


def test_third_derivatives(x: Tensor) -> None:
    f = lambda x: (forwarddiff(body, x) ** 2).sum()
    plain = lambda x: (body(x) ** 2).sum()
    third = func.jacrev(func.jacrev(func.grad(plain)))(x).reshape(9, 3)
    torch.testing.assert_close(jacobian(lambda x: hessian(f, x), x)[0], third)
    torch.testing.assert_close(func.jacfwd(func.jacfwd(func.jacfwd(f)))(x).reshape(9, 3), third)
    torch.testing.assert_close(func.jacfwd(func.jacrev(func.jacfwd(f)))(x).reshape(9, 3), third)


def test_plain_autograd_and_plain_forward_mode(x: Tensor) -> None:
    y = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(forwarddiff(body, y).sum(), y, create_graph=True)
    torch.testing.assert_close(first, func.grad(lambda x: body(x).sum())(x))
    (second,) = torch.autograd.grad(first.sum(), y)
    torch.testing.assert_close(second, func.hessian(lambda x: body(x).sum())(x).sum(0))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(forwarddiff(lambda x: x**2, dual)).tangent
    torch.testing.assert_close(tangent, 2 * x)


def test_nested_in_itself_and_with_the_others(x: Tensor) -> None:
    f = lambda x: checkpointed(lambda x: forwarddiff(lambda y: forwarddiff(body, y.sin()) * y, x), x).sum()
    plain = lambda x: (body(x.sin()) * x).sum()
    torch.testing.assert_close(gradient(f, x)[0], func.grad(plain)(x))
    torch.testing.assert_close(hessian(f, x), func.hessian(plain)(x))
    inner = lambda x: forwarddiff(lambda x: diaghessian(lambda y: (y**4).sum(), x)[0], x)
    torch.testing.assert_close(jacobian(inner, x)[0], torch.diag(24 * x))


def test_vmap_over_it_and_vmap_inside(x: Tensor) -> None:
    X = torch.stack([x, x + 1])
    J = torch.stack([func.jacrev(body)(x) for x in X])
    torch.testing.assert_close(func.vmap(lambda x: jacobian(lambda x: forwarddiff(body, x), x)[0])(X), J)
    torch.testing.assert_close(func.vmap(func.jacfwd(lambda x: forwarddiff(body, x)))(X), J)
    found = gradient(lambda X: func.vmap(lambda x: forwarddiff(body, x))(X).sum(), X)[0]
    torch.testing.assert_close(found, J.sum(1))
    found = gradient(lambda X: forwarddiff(lambda X: func.vmap(body)(X), X).sum(), X)[0]
    torch.testing.assert_close(found, J.sum(1))


def test_nothing_of_the_inside_is_kept() -> None:
    kept: list[Any] = []

    def f(x: Tensor) -> Tensor:
        big = x.sum() * torch.ones(1000)
        kept.append(weakref.ref(big))
        return big.sin().sum()

    x = torch.ones(2, requires_grad=True)
    y = forwarddiff(f, x)
    assert all(ref() is None for ref in kept)
    y.backward()
    assert torch.allclose(x.grad, 1000 * torch.tensor(2.0).cos().expand(2))


@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_a_random_function_is_drawn_once(chunk: int | None) -> None:
    def noisy(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) ** 2

    x = torch.ones(8, dtype=torch.float64)
    torch.manual_seed(0)
    expected, after = noisy(x), torch.rand(1)
    torch.manual_seed(0)
    y, g, H = None, None, None

    def f(x: Tensor) -> Tensor:
        nonlocal y
        y = forwarddiff(noisy, x, chunk_threshold=chunk)
        return y.sum()

    (g,) = gradient(f, x)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(y.detach(), expected)
    torch.testing.assert_close(g, 2 * expected)
    torch.manual_seed(0)
    H = hessian(f, x)
    torch.testing.assert_close(H, torch.diag(2 * expected))


def test_outside_of_differentiation_it_is_just_the_call(x: Tensor) -> None:
    calls: list[Any] = []

    def f(v: Any) -> Any:
        calls.append(v)
        return v

    for value in (x, [x], {"k": x}):
        forwarddiff(f, value)
    assert len(calls) == 3
    assert calls[0] is x
    assert calls[1][0] is x


def test_f_always_sees_tensors(x: Tensor) -> None:
    assert forwarddiff(lambda a: a.sin(), 2) == torch.tensor(2.0).sin()
    torch.testing.assert_close(forwarddiff(torch.sin, np.ones(3)), torch.ones(3, dtype=torch.float64).sin())
    seen: list[Any] = []
    given = {"a": [2, np.float64(3), 1j], "b": (np.ones(2), np.array([1, 0]), "text", True, torch.Size([2]))}

    def f(v: Any) -> Tensor:
        seen.append(v)
        return (v[0] * v[1]["a"][0]).sum() + v[1]["b"][0][v[1]["b"][1]].sum()

    want = lambda x: (2 * x).sum() + 2
    forwarddiff(f, (x, given))
    torch.testing.assert_close(gradient(lambda x: forwarddiff(f, (x, given)), x)[0], func.grad(want)(x))
    torch.testing.assert_close(pushforward(lambda x: forwarddiff(f, (x, given)), x)(x), 2 * x.sum())
    torch.testing.assert_close(
        hessian(lambda x: forwarddiff(f, (x, given)) ** 2, x), func.hessian(lambda x: want(x) ** 2)(x)
    )
    for _, v in seen:
        two, three, imaginary = v["a"]
        assert two.dtype == three.dtype == torch.float32
        assert imaginary.dtype == torch.complex64
        ones, index, text, flag, size = v["b"]
        assert (ones.dtype, index.dtype) == (torch.float64, torch.int64)
        assert (text, flag, size) == ("text", True, torch.Size([2]))
    found = gradient(lambda x: forwarddiff(lambda p: p[0] * torch.sin(p[1]), (x, 2)), 3.0)[0]
    torch.testing.assert_close(found, torch.tensor(2.0).sin())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        y = forwarddiff(lambda p: p[0] * p[1].sin(), (dual, 2))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, x * torch.tensor(2.0).sin())
    with pytest.raises(OverflowError, match="forwarddiff: x: "):
        forwarddiff(lambda v: v[0], (x, 10**400))


HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
DTYPES = [(DOUBLE, SINGLE), (SINGLE, DOUBLE), (HALF, DOUBLE), (DOUBLE, HALF), (HALF, torch.float16)]


@pytest.mark.parametrize(("here", "there"), DTYPES)
@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: gradient(lambda x: f(x).sum(), x)[0],
        lambda f, x: func.grad(lambda x: f(x).sum())(x),
        lambda f, x: pushforward(f, x)(x),
        lambda f, x: func.vmap(lambda x: func.jvp(f, (x,), (x,))[1])(x[None]),
        lambda f, x: jacobian(f, x, mode="reverse")[0],
        lambda f, x: jacobian(f, x, mode="forward")[0],
        lambda f, x: hessian(lambda x: f(x).sum(), x),
        lambda f, x: hessian_dual(lambda x: f(x).sum(), x),
        lambda f, x: diaghessian(lambda x: f(x).sum(), x)[0],
    ],
)
def test_another_dtype_comes_out(differentiate: Any, here: torch.dtype, there: torch.dtype) -> None:
    x = torch.tensor([0.5, 1.5, -2.0], dtype=here)
    f = lambda x: (x * x.roll(1) * x).to(there)
    found = differentiate(lambda x: forwarddiff(f, x), x)
    torch.testing.assert_close(found, differentiate(f, x))


def test_integers_and_constants_in_and_out(x: Tensor) -> None:
    assert gradient(lambda x: forwarddiff(lambda x: (x > 0).sum(), x), x) == (None,)
    assert gradient(lambda x: forwarddiff(lambda x: 3, x), x) == (None,)
    index = torch.tensor([2, 0])
    found = gradient(lambda x: forwarddiff(lambda t: t[0][t[1]].sum(), [x, index]), x)[0]
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))


def test_inside_f_is_differentiated_and_hooks_are_the_identity(x: Tensor) -> None:
    seen: list[object] = []

    def f(x: Tensor) -> Tensor:
        seen.append(isderiving())
        return hook(lambda g: seen.append("hooked"), x) ** 2

    torch.testing.assert_close(gradient(lambda x: forwarddiff(f, x).sum(), x)[0], 2 * x)
    assert set(seen) == {True}


# ---- what f closes over ----------------------------------------------------------------------


def test_what_f_closes_over_is_dropped_with_one_warning(x: Tensor) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        def times_b(a: Tensor) -> Tensor:
            return a * b

        return forwarddiff(times_b, a) + forwarddiff(times_b, a * 2)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert gradient(f, 2.0, 3.0) == (torch.tensor(9.0), None)
    assert len(caught) == 1
    assert caught[0].category is DroppedGradientWarning
    assert "times_b" in str(caught[0].message)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, a, b: jacobian(f, a, b),
        lambda f, a, b: func.grad(f, argnums=(0, 1))(a, b),
        lambda f, a, b: hessian(lambda ab: f(ab[0], ab[1]), torch.stack([a, b])),
        lambda f, a, b: f(a, b.clone().requires_grad_()),
    ],
)
def test_dropping_is_named_in_every_reverse_mode(differentiate: Any) -> None:
    a, b = torch.tensor(2.0), torch.tensor(3.0)
    with pytest.warns(DroppedGradientWarning, match="depends on tensors besides its argument"):
        differentiate(lambda a, b: forwarddiff(lambda a: a * b, a), a, b)


def test_the_parameters_of_a_module_are_dropped_unless_they_are_given(x: Tensor) -> None:
    model = nn.Linear(3, 2).double()
    with pytest.warns(DroppedGradientWarning, match="Linear"):
        g, _ = gradient(lambda m, x: forwarddiff(m, x).sum(), model, x)
    assert set(g.values()) == {None}
    given = lambda p, x: forwarddiff(lambda t: func.functional_call(model, t[0], (t[1],)), (p, x)).sum()
    found = gradient(given, dict(model.named_parameters()), x)
    torch.testing.assert_close(found[0]["weight"], x.expand(2, 3))


def test_the_warning_can_be_silenced_by_its_class() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DroppedGradientWarning)
        assert gradient(lambda a, b: forwarddiff(lambda a: a * b, a), 2.0, 3.0) == (torch.tensor(3.0), None)


def test_nothing_is_named_where_nothing_is_dropped(x: Tensor) -> None:
    c = torch.ones(3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(lambda x: forwarddiff(lambda y: (y * c * x.detach()).sum(), x), x)
        func.grad(lambda x: forwarddiff(lambda y: (y * c).sum(), x))(x)
        pushforward(lambda x: forwarddiff(lambda y: y * c, x), x)(x)


# ---- bad input ----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["text", None, True, nn.Linear(1, 1), object()])
def test_what_cannot_be_differentiated_by_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="forwarddiff: x: expected a number, an array or a structure"):
        forwarddiff(lambda v: v, value)


def test_bad_chunks() -> None:
    for bad, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="forwarddiff: chunk_threshold: expected"):
            forwarddiff(lambda v: v, 1.0, chunk_threshold=bad)


def test_an_error_in_f_reaches_the_caller(x: Tensor) -> None:
    with pytest.raises(ZeroDivisionError):
        gradient(lambda x: forwarddiff(lambda x: 1 // 0, x), x)
    assert gradient(lambda x: (x**2).sum(), x)[0].equal(2 * x)


@pytest.mark.filterwarnings("error")
def test_a_derivative_taken_inside_is_no_closed_over_tensor() -> None:
    x = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)

    def f(a: Tensor) -> Tensor:
        return gradient(lambda b: (b**3 * a).sum(), a)[0]  # 3 a³

    found = gradient(lambda x: forwarddiff(f, x).sum(), x)[0]
    torch.testing.assert_close(found, 9 * x**2)
    assert gradient(lambda y: (forwarddiff(f, x) * y).sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("prepare", [lambda x: x, lambda x: x * 1])
def test_a_function_that_writes_into_its_argument_is_refused(prepare: Callable[[Tensor], Tensor]) -> None:
    def f(x: Tensor) -> Tensor:
        return x.mul_(2).sin()

    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="leave its argument as it is"):
        gradient(lambda x: forwarddiff(f, prepare(x)).sum(), x)
    assert torch.equal(x, torch.ones(3))
    (g,) = gradient(lambda x: forwarddiff(lambda x: f(x.clone()), prepare(x)).sum(), x)
    torch.testing.assert_close(g, 2 * torch.cos(2 * x))


IN_PLACE: dict[str, Callable[..., Any]] = {
    "gradient": lambda f, x: gradient(f, x)[0],
    "func.grad": lambda f, x: func.grad(f)(x),
    "hessian": hessian,
    "hessian_dual": hessian_dual,
    "hessian_reverse": hessian_reverse,
    "func.hessian": lambda f, x: func.hessian(f)(x),
}


@pytest.mark.parametrize("way", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_the_result_may_be_written_into(way: Callable[..., Any], x: Tensor) -> None:
    def of(call: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def f(a: Tensor) -> Tensor:
            y, (z, _) = call(lambda a: (a.sin(), (a[0] * a, a.sum())), a)
            y += 1
            z[0] = y[1]
            return (y**2 * z).sum()

        return f

    plain = of(lambda f, a: f(a))
    torch.testing.assert_close(way(of(forwarddiff), x), way(plain, x))
    torch.testing.assert_close(
        way(lambda a: forwarddiff(torch.sin, a).mul_(a).sum(), x), way(lambda a: (a.sin() * a).sum(), x)
    )
