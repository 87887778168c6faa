"""ignore_derivatives and isderiving, in every mode and nested."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import (
    Buffer,
    GradDict,
    Params,
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    ignore_derivatives,
    isderiving,
    jacobian,
    pullback,
    pushforward,
)

func = torch.func


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "gradient": gradient,
    "pullback": pullback,
    "pushforward": lambda f, x: pushforward(f, x)(x),
    "jacobian reverse": lambda f, x: jacobian(f, x, mode="reverse"),
    "jacobian forward": lambda f, x: jacobian(f, x, mode="forward"),
    "hessian": hessian,
    "hessian_dual": hessian_dual,
    "diaghessian": diaghessian,
    "torch.func.grad": lambda f, x: func.grad(f)(x),
    "torch.func.vjp": lambda f, x: func.vjp(f, x),
    "torch.func.jvp": lambda f, x: func.jvp(f, (x,), (x,)),
    "torch.func.jacfwd": lambda f, x: func.jacfwd(f)(x),
    "torch.func.jacrev": lambda f, x: func.jacrev(f)(x),
    "torch.func.hessian": lambda f, x: func.hessian(f)(x),
    "vmap of grad": lambda f, x: func.vmap(func.grad(f))(x[None]),
    "grad of vmap": lambda f, x: func.grad(lambda x: func.vmap(f)(x[None]).sum())(x),
    "checkpointed": lambda f, x: gradient(lambda x: checkpointed(f, x), x),
}


@pytest.mark.parametrize("way", WAYS)
def test_isderiving_knows_every_way_to_differentiate(way: str, x: Tensor) -> None:
    seen: list[tuple[bool, bool]] = []

    def f(x: Tensor) -> Tensor:
        seen.append((isderiving(), ignore_derivatives(isderiving)))
        return (x**2 * x.sin()).sum()

    WAYS[way](f, x)
    assert set(seen) == {(True, False)}
    assert not isderiving()


def test_isderiving_is_false_where_nothing_is_known(x: Tensor) -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(isderiving())
        return x.sum()

    f(x)
    f(x.clone().requires_grad_()).backward()
    func.vmap(f)(x[None])
    thread = threading.Thread(target=f, args=(x,))
    gradient(lambda x: (thread.start(), thread.join(), x.sum())[2], x)
    assert seen == [False] * 4


def test_isderiving_sees_what_is_differentiated_inside_of_what_is_ignored(x: Tensor) -> None:
    seen: list[bool] = []

    def f(x: Tensor) -> Tensor:
        seen.append(isderiving())
        return (x**2).sum()

    def outer(x: Tensor) -> Tensor:
        ignore_derivatives(lambda: gradient(f, x))
        ignore_derivatives(lambda: func.grad(f)(x))
        ignore_derivatives(lambda: (f(x), ignore_derivatives(lambda: f(x)), f(x)))
        f(x)
        return x.sum()

    for differentiate in (gradient, lambda f, x: func.grad(f)(x), lambda f, x: func.jacfwd(f)(x)):
        seen.clear()
        differentiate(outer, x)
        assert seen == [True, True, False, False, False, True]


def test_isderiving_comes_back_after_an_error(x: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        with pytest.raises(ZeroDivisionError):
            ignore_derivatives(lambda: 1 // 0)
        assert isderiving()
        return x.sum()

    gradient(f, x)
    func.grad(f)(x)


# Each gives derivatives of a scalar function; the ignored factor must count as a constant in all of them.
DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "gradient": lambda f, x: gradient(f, x)[0],
    "pushforward": lambda f, x: pushforward(f, x)(torch.ones_like(x)),
    "jacobian forward": lambda f, x: jacobian(f, x, mode="forward")[0],
    "hessian": hessian,
    "hessian_dual": hessian_dual,
    "grad of gradient": lambda f, x: gradient(lambda x: gradient(f, x)[0].sum(), x)[0],
    "torch.func.hessian": lambda f, x: func.hessian(f)(x),
    "jacfwd of jacfwd": lambda f, x: func.jacfwd(func.jacfwd(f))(x),
    "jacrev of jacfwd": lambda f, x: func.jacrev(func.jacfwd(f))(x),
    "grad of jvp": lambda f, x: func.grad(lambda x: func.jvp(f, (x,), (x.detach(),))[1])(x),
    "vmap of hessian": lambda f, x: func.vmap(func.hessian(f))(x[None]),
}


@pytest.mark.parametrize("way", DERIVATIVES)
@pytest.mark.parametrize(
    "ignored",
    [
        lambda x: ignore_derivatives(x**2),
        lambda x: ignore_derivatives(lambda: x**2),
        lambda x: ignore_derivatives(lambda: {"a": [x**2, "text"]})["a"][0],
        lambda x: ignore_derivatives({"a": (x**2, None, 3)})["a"][0],
        lambda x: ignore_derivatives(lambda: gradient(lambda y: (y**3 / 3).sum(), x)[0]),
    ],
)
def test_an_ignored_value_is_a_constant(way: str, ignored: Any, x: Tensor) -> None:
    constant = x**2

    def f(x: Tensor) -> Tensor:
        return (ignored(x) * x.sin() * x).sum()

    found = DERIVATIVES[way](f, x)
    expected = DERIVATIVES[way](lambda x: (constant * x.sin() * x).sum(), x)
    torch.testing.assert_close(found, expected)
    assert expected.abs().max() > 0.1


def test_a_variable_of_an_outer_level_is_ignored_inside_of_an_inner_one(x: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        return gradient(lambda y: (ignore_derivatives(x * y) * y).sum(), x)[0].sum()

    torch.testing.assert_close(func.grad(f)(x), torch.zeros_like(x))
    assert gradient(f, x) == (None,)


def test_the_values_of_a_mapping_by_identity_are_detached() -> None:
    p, q = torch.ones(2), torch.ones(3)
    ps = Params([p, q])

    def f(x: Tensor) -> Tensor:
        grads = gradient(lambda: (p**2 * x).sum(), ps)
        for mapping in (grads, GradDict(grads)):
            ignored = ignore_derivatives(mapping)
            assert type(ignored) is type(mapping)
            assert [key is param for key, param in zip(ignored, ps, strict=True)] == [True, True]
            assert ignored[q] is None
            assert ignored[p].data_ptr() == mapping[p].data_ptr()
        in_structure = ignore_derivatives(lambda: {"g": [grads]})["g"][0]
        assert grads[p].requires_grad
        return x * (ignored[p] + in_structure[p]).sum()

    assert gradient(f, 3.0) == (torch.tensor(24.0),)
    assert gradient(lambda x: f(x) / ignore_derivatives(x), 3.0) == (torch.tensor(8.0),)
    assert ignore_derivatives(gradient(lambda: (p**2).sum(), ps)).params == ps


def test_values_pass_as_they_are() -> None:
    for value in ("text", None, True, 3, 2.5, torch.float32, [1, "a"], {"k": None}):
        assert ignore_derivatives(value) == value
    y = torch.ones(2)
    assert ignore_derivatives(y).data_ptr() == y.data_ptr()
    assert ignore_derivatives(lambda: 7) == 7
    assert torch.equal(ignore_derivatives(torch.arange(3)), torch.arange(3))


def test_plain_autograd_ignores_it_too(x: Tensor) -> None:
    x.requires_grad_()
    (x * ignore_derivatives(x)).sum().backward()
    torch.testing.assert_close(x.grad, x.detach())


def test_a_buffer_is_refused_because_its_elements_would_keep_their_derivatives(x: Tensor) -> None:
    buf = Buffer(x, 3)
    with pytest.raises(TypeError, match=r"Buffer.*copy\(\)"):
        ignore_derivatives([buf])


def test_compiled(x: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        told = 1.0 if isderiving() else 0.0
        hidden = 10.0 if ignore_derivatives(lambda: isderiving()) else 0.0
        inner = ignore_derivatives(lambda: func.grad(lambda y: y.sum() * (1.0 if isderiving() else 0.0))(x))
        return (told + hidden + ignore_derivatives(x) + 100 * inner) * x

    def all_of_them(x: Tensor) -> Any:
        return [
            f(x),
            jacobian(f, x)[0],
            func.jacrev(f)(x),
            func.jacfwd(f)(x),
            func.vmap(f)(x[None]),
            gradient(lambda x: gradient(lambda x: f(x).sum(), x)[0].sum(), x)[0],
        ]

    torch._dynamo.reset()
    found = torch.compile(all_of_them, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found[0], (x + 100) * x)
    torch.testing.assert_close(found[1], torch.diag(x + 101))
    torch.testing.assert_close(found[:5], all_of_them(x)[:5])
    torch.testing.assert_close(found[5], torch.zeros_like(x))  # compiled: zeros where eager gives None


@pytest.mark.parametrize("wrap", [lambda x: {"a": x}, lambda x: [x, (None, x)], lambda x: lambda: x * 1])
def test_structures_and_functions_under_compile(wrap: Any) -> None:
    def f(x: Tensor) -> Tensor:
        ignored = ignore_derivatives(wrap(x))
        part = (
            ignored["a"]
            if isinstance(ignored, dict)
            else ignored[0]
            if isinstance(ignored, list)
            else ignored
        )
        return (part * x).sum()

    x = torch.tensor([1.0, 2.0])
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(f), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x)


NETWORK = torch.nn.Linear(2, 1)


@pytest.mark.parametrize("held", [NETWORK, Params(NETWORK)])
def test_what_holds_parameters_by_identity_is_refused(held: Any) -> None:
    for value in (held, [held], {"m": held}):
        with pytest.raises(TypeError, match=rf"got a {type(held).__name__}.*lambda: m\(x\)"):
            ignore_derivatives(value)


def test_a_module_without_parameters_passes() -> None:
    relu = torch.nn.ReLU()
    assert ignore_derivatives({"f": relu})["f"] is relu
    assert ignore_derivatives(lambda: NETWORK(torch.ones(2))).requires_grad is False
