"""Tensors that f finds by identity, of modules and Params: nested, and shared by two arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import Params, checkpointed, gradient, hessian, jacobian, pullback, pushforward

func = torch.func


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(2, 1, dtype=torch.float64)


@pytest.fixture
def X() -> Tensor:
    return torch.randn(3, 2, dtype=torch.float64)


def product(layer: nn.Linear, X: Tensor, v: Tensor) -> Tensor:
    """The Hessian of the cubic loss, by weight and bias as one vector, times ``v``."""

    def loss(flat: Tensor) -> Tensor:
        return ((X @ flat[:2] + flat[2]) ** 3).sum()

    flat = torch.cat([layer.weight.detach().reshape(-1), layer.bias.detach()])
    H: Tensor = func.hessian(loss)(flat)
    return H @ v


def cubic(layer: nn.Module, X: Tensor) -> Tensor:
    loss: Tensor = (layer(X) ** 3).sum()
    return loss


def flat(by_name: dict[str, Tensor]) -> Tensor:
    return torch.cat([by_name["weight"].reshape(-1), by_name["bias"]])


# ---- a derivative by the same tensors inside -------------------------------------------------------------

# Each gives the gradient of the cubic loss by the layer, as one vector.
INNER: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "module": lambda m, X: flat(gradient(cubic, m, X, argnums=0)[0]),
    "module, pulled back": lambda m, X: flat(pullback(lambda m: cubic(m, X), m)[1](1.0)[0]),
    "Params": lambda m, X: gradient(lambda: cubic(m, X), Params(m)).to_vector(),
    "Params of a list": lambda m, X: gradient(lambda: cubic(m, X), Params([m])).to_vector(),
    "in a structure": lambda m, X: flat(gradient(lambda s: cubic(s["m"], X), {"m": m})[0]["m"]),
    "checkpointed": lambda m, X: checkpointed(lambda X: INNER["module"](m, X), X),
    "gradient of a pushforward": lambda m, X: flat(
        gradient(lambda m: pushforward(lambda c: c * cubic(m, X), 1.0)(1.0), m)[0]
    ),
}


@pytest.mark.parametrize("inner", INNER)
def test_a_gradient_inside_a_pushforward_by_the_same_module(inner: str, layer: nn.Linear, X: Tensor) -> None:
    v = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    tangent = {"weight": v[None, :2], "bias": v[2:]}
    found = pushforward(lambda m: INNER[inner](m, X), layer)(tangent)
    torch.testing.assert_close(found, product(layer, X, v))
    assert all(p.requires_grad and p.is_leaf for p in layer.parameters())


def test_a_pushforward_inside_a_pushforward_by_the_same_module(layer: nn.Linear, X: Tensor) -> None:
    v = {"weight": torch.ones_like(layer.weight), "bias": torch.ones_like(layer.bias)}
    found = pushforward(lambda m: pushforward(lambda m: cubic(m, X), m)(v), layer)(v)
    ones = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(found, ones @ product(layer, X, ones))


def test_a_gradient_inside_a_pushforward_inside_a_gradient(layer: nn.Linear, X: Tensor) -> None:
    v = {"weight": torch.ones_like(layer.weight), "bias": torch.ones_like(layer.bias)}

    def curvature(m: nn.Linear) -> Tensor:
        return pushforward(lambda m: INNER["module"](m, X).sum(), m)(v)

    ones = torch.ones(3, dtype=torch.float64)
    loss = lambda flat: ((X @ flat[:2] + flat[2]) ** 3).sum()
    at = flat({name: p.detach() for name, p in layer.named_parameters()})
    want = func.grad(lambda flat: ones @ func.hessian(loss)(flat) @ ones)(at)
    torch.testing.assert_close(flat(gradient(curvature, layer)[0]), want)


def test_what_is_frozen_stays_frozen_inside_a_pushforward(layer: nn.Linear, X: Tensor) -> None:
    layer.bias.requires_grad_(False)
    found = pushforward(lambda m: gradient(cubic, m, X, argnums=0)[0], layer)({"weight": layer.weight})
    assert list(found) == ["weight"]
    names = pushforward(lambda m: (seen.append(len(Params(m))), cubic(m, X))[1], layer)
    seen: list[int] = []
    names({"weight": layer.weight})
    assert seen == [1]


def test_whether_a_parameter_is_trained_is_known_again_after_an_error(layer: nn.Linear) -> None:
    def f(m: nn.Linear) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pushforward(f, layer)({"weight": layer.weight})
    layer.weight.requires_grad_(False)
    assert list(gradient(lambda m: m(torch.ones(2, dtype=torch.float64)).sum(), layer)[0]) == ["bias"]


# ---- one tensor in two arguments ---------------------------------------------------------------------------


@pytest.fixture
def tied() -> tuple[nn.Linear, nn.Linear]:
    enc, dec = nn.Linear(2, 2, dtype=torch.float64), nn.Linear(2, 2, dtype=torch.float64)
    dec.weight = enc.weight
    return enc, dec


def through_both(W: Tensor, b: Tensor, c: Tensor, X: Tensor) -> Tensor:
    return ((X @ W.T + b).tanh() @ W.T + c).square().sum()


def by_weight(enc: nn.Linear, dec: nn.Linear, X: Tensor) -> Tensor:
    """The whole gradient by the weight that both have."""
    W: Tensor = func.grad(through_both)(enc.weight.detach(), enc.bias.detach(), dec.bias.detach(), X)
    return W


def test_tangents_of_a_tied_parameter_add_up(tied: tuple[nn.Linear, nn.Linear], X: Tensor) -> None:
    whole = by_weight(*tied, X)
    t, s = torch.randn(2, 2, 2, dtype=torch.float64)
    push = pushforward(lambda enc, dec: dec(enc(X).tanh()).square().sum(), *tied)
    torch.testing.assert_close(push({"weight": t}, None), (whole * t).sum())
    torch.testing.assert_close(push(None, {"weight": t}), (whole * t).sum())
    torch.testing.assert_close(push({"weight": s}, {"weight": t}), (whole * (s + t)).sum())


def test_a_module_given_twice(layer: nn.Linear, X: Tensor) -> None:
    t = torch.ones_like(layer.weight)
    whole = gradient(lambda m: cubic(m, X), layer)[0]["weight"]
    push = pushforward(lambda m, n: cubic(m, X), layer, layer)
    torch.testing.assert_close(push({"weight": t}, None), (whole * t).sum())
    torch.testing.assert_close(push(None, {"weight": t}), (whole * t).sum())


# Each gives f(1), for an f that is linear.
OUTER: dict[str, Callable[[Callable[[Any], Tensor]], Tensor]] = {
    "nothing": lambda f: f(1.0),
    "vmap": lambda f: func.vmap(f)(torch.ones(2))[0],
    "pushforward": lambda f: pushforward(f, 1.0)(1.0),
    "pushforward under vmap": lambda f: func.vmap(lambda s: pushforward(f, s)(s))(torch.ones(2))[0],
    "torch.func.jacrev": lambda f: func.jacrev(f)(torch.tensor(1.0, dtype=torch.float64)),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("position", [0, 1])
def test_both_holders_of_a_tied_parameter_get_the_whole_gradient(
    outer: str, position: int, tied: tuple[nn.Linear, nn.Linear], X: Tensor
) -> None:
    def f(s: Any) -> Tensor:
        g = gradient(lambda enc, dec: s * dec(enc(X).tanh()).square().sum(), *tied)
        found: Tensor = g[position]["weight"]
        return found

    torch.testing.assert_close(OUTER[outer](f), by_weight(*tied, X))


def test_second_derivatives_by_a_tied_parameter(tied: tuple[nn.Linear, nn.Linear], X: Tensor) -> None:
    enc, dec = tied
    t = torch.randn(2, 2, dtype=torch.float64)

    def by_both(enc: nn.Linear, dec: nn.Linear) -> Tensor:
        g = gradient(lambda enc, dec: dec(enc(X).tanh()).square().sum(), enc, dec)
        found: Tensor = g[0]["weight"]
        return found

    loss = lambda W: through_both(W, enc.bias.detach(), dec.bias.detach(), X)
    H = hessian(loss, enc.weight.detach())
    found = pushforward(by_both, enc, dec)({"weight": t}, None)
    torch.testing.assert_close(found.reshape(-1), H @ t.reshape(-1))


# ---- a parameter as the result ----------------------------------------------------------------------------


def test_f_may_return_a_parameter_itself(layer: nn.Linear) -> None:
    t = torch.ones_like(layer.weight)
    found = pushforward(lambda m: {"w": m.weight, "b": [2 * m.bias]}, layer)({"weight": t})
    torch.testing.assert_close(found, {"w": t, "b": [torch.zeros_like(layer.bias)]})

    def pulled(s: Any) -> Tensor:
        g: Tensor = pullback(lambda m: m.weight, layer)[1](t * s)[0]["weight"]
        return g

    torch.testing.assert_close(func.vmap(pulled)(torch.ones(2, dtype=torch.float64)), t.expand(2, 1, 2))
    p = torch.ones(2)
    torch.testing.assert_close(
        func.vmap(lambda s: s * jacobian(lambda: p, Params([p]))[p])(p)[0], torch.eye(2)
    )
