"""Functions given to hook that write into the gradient: nobody else sees it, what they return counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs_torch import hooks_compiled, hooks_compiled_twice
from torch import Tensor

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian_dual,
    hessian_reverse,
    hook,
    jacobian,
    pullback,
    withgradient,
)

func = torch.func

X = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


def damp_(g: Tensor) -> Tensor:
    g /= 1 + g.square().sum(-1, keepdim=True)
    return g


def dropped(g: Tensor) -> None:
    g.mul_(2)


# The same in place and not.
PAIRS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any]]] = {
    "clamp_": (lambda g: g.clamp_(-1, 1), lambda g: g.clamp(-1, 1)),
    "mul_": (lambda g: g.mul_(2), lambda g: g * 2),
    "damp_": (damp_, lambda g: g / (1 + g.square().sum(-1, keepdim=True))),
    "nothing returned": (dropped, lambda g: None),
    "written, another returned": (lambda g: (g.zero_(), torch.ones_like(g))[1], torch.ones_like),
}


def beside(fn: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    """One sum of two arguments, whose gradients are one tensor."""
    return lambda a, b: (hook(fn, a) + b) ** 2


def structured(fn: Callable[[Tensor], Any]) -> Callable[..., Tensor]:
    def of_dict(gs: dict[str, Any]) -> Any:
        new = {"a": fn(gs["a"]), "n": None}
        return None if new["a"] is None else new

    return lambda a, b: (hook(of_dict, {"a": a, "n": 3})["a"] + b) ** 2


def total(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *xs: f(*xs).sum()


def by_params(f: Callable[..., Tensor]) -> Any:
    a, b = X.clone(), X.clone()
    return list(gradient(lambda: f(a, b).sum(), Params([a, b])).values())


def by_backward(f: Callable[..., Tensor]) -> Any:
    a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
    f(a, b).sum().backward()
    return a.grad, b.grad


BATCH = torch.stack([X, 2 * X])

WAYS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "gradient": lambda f: gradient(total(f), X, X),
    "withgradient": lambda f: withgradient(total(f), X, X).grad,
    "params": by_params,
    "backward": by_backward,
    "jacobian": lambda f: jacobian(f, X, X, mode="reverse"),
    "jacobian, chunks": lambda f: jacobian(f, X, X, mode="reverse", chunk_size=2),
    "hessian_reverse": lambda f: hessian_reverse(lambda x: f(x, 3 * x).sum(), X),
    "hessian_dual": lambda f: hessian_dual(lambda x: f(x, 3 * x).sum(), X),
    "diaghessian": lambda f: diaghessian(lambda a, b: (f(a, b) * a).sum(), X, X),
    "gradient of gradient": lambda f: gradient(
        lambda a, b: sum((g**2).sum() for g in gradient(total(f), a, b)), X, X
    ),
    "torch.func.grad": lambda f: func.grad(total(f), argnums=(0, 1))(X, X),
    "torch.func.jacrev": lambda f: func.jacrev(f, argnums=(0, 1))(X, X),
    "torch.func.hessian": lambda f: func.hessian(total(f), argnums=(0, 1))(X, X),
    "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(f))(X, X),
    "gradient in vmap": lambda f: func.vmap(lambda a, b: gradient(total(f), a, b))(BATCH, BATCH),
    "vmap in gradient": lambda f: gradient(lambda a, b: func.vmap(f)(a, b).sum(), BATCH, BATCH),
    "vmap in jacobian": lambda f: jacobian(lambda a, b: func.vmap(f)(a, b), BATCH, BATCH, mode="reverse"),
    "jacrev in vmap": lambda f: func.vmap(func.jacrev(f, argnums=(0, 1)))(BATCH, BATCH),
    "vmap in jacrev": lambda f: func.jacrev(func.vmap(f), argnums=(0, 1))(BATCH, BATCH),
}


# There, what is written into is needed to differentiate what was computed of it.
TWICE = ["hessian_reverse", "diaghessian", "gradient of gradient", "jacrev of jacrev"]


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("shape", [beside, structured])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("way", WAYS)
def test_nobody_else_sees_what_is_written(way: str, pair: str, shape: Callable[..., Any]) -> None:
    in_place, new = PAIRS[pair]
    if pair == "damp_" and way in TWICE:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            WAYS[way](shape(in_place))
        return
    torch.testing.assert_close(WAYS[way](shape(in_place)), WAYS[way](shape(new)))


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("shape", [beside, structured])
@pytest.mark.parametrize(
    "way",
    [
        pytest.param("gradient", marks=hooks_compiled),
        pytest.param("backward", marks=hooks_compiled),
        pytest.param("jacobian", marks=hooks_compiled),
        pytest.param("gradient in vmap", marks=hooks_compiled_twice),
    ],
)
def test_compiled(way: str, shape: Callable[..., Any]) -> None:
    torch._dynamo.reset()
    if way == "backward":
        compiled = lambda fs: [by_backward(torch.compile(f, fullgraph=True, backend="aot_eager")) for f in fs]
    else:
        compiled = torch.compile(lambda fs: [WAYS[way](f) for f in fs], fullgraph=True, backend="aot_eager")
    found = compiled([shape(in_place) for in_place, _ in PAIRS.values()])
    torch.testing.assert_close(found, [WAYS[way](shape(new)) for _, new in PAIRS.values()])


def test_in_numbers() -> None:
    clip = PAIRS["clamp_"][0]
    found = gradient(lambda a, b: ((hook(clip, a) + b) ** 2).sum(), X, X)
    assert [g.tolist() for g in found] == [[1, 1, 1], [4, 8, 12]]


@pytest.mark.parametrize(
    "shape", [lambda fn, a: hook(fn, a), lambda fn, a: hook(lambda g: [fn(g[0])], [a])[0]]
)
def test_the_callers_cotangent_is_not_written_to(shape: Callable[..., Tensor]) -> None:
    ybar = torch.ones_like(X)
    back = pullback(lambda a: shape(lambda g: g.mul_(2), a), X)[1]
    assert [back(ybar)[0].tolist() for _ in range(2)] == [[2, 2, 2]] * 2
    assert back(ybar.expand(1, 3)[0])[0].tolist() == [2, 2, 2]
    vjp = func.vjp(lambda a: shape(lambda g: g.mul_(2), a), X)[1]
    assert vjp(ybar)[0].tolist() == [2, 2, 2]
    x = X.clone().requires_grad_()
    shape(lambda g: g.mul_(2), x).backward(ybar)
    assert ybar.tolist() == [1, 1, 1]


def test_an_expanded_gradient_is_memory_of_its_own() -> None:
    def first(g: Tensor) -> Tensor:
        g[0] = 5
        return g

    assert gradient(lambda x: hook(first, x * 1).sum(), X)[0].tolist() == [5, 1, 1]
