"""Second derivatives that nobody differentiates keep the fused norms, and are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import recorded_names
from test_norms_differentiated import NORMS, D, Norm, X, loss
from torch import Tensor
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hook,
    plan_hessian,
    pushforward,
    withhessian,
)

V = torch.linspace(-1, 1, 6, dtype=D)
SECOND: dict[str, Callable[[Norm], Tensor]] = {
    "hessian": lambda n: hessian(loss(n), X),
    "hessian_reverse": lambda n: hessian_reverse(loss(n), X),
    "diaghessian": lambda n: diaghessian(loss(n), X)[0],
    "withhessian": lambda n: withhessian(loss(n), X).hess,
    "plan": lambda n: plan_hessian(loss(n), X)(X).to_dense(),
    "hessian_dual": lambda n: hessian_dual(loss(n), X),
    "vmap": lambda n: torch.func.vmap(lambda x: hessian(loss(n), x))(torch.stack([X, X.sin()])),
}
FUSED = {"hessian", "hessian_reverse", "diaghessian", "withhessian", "plan"}


@pytest.mark.parametrize("way", SECOND)
@pytest.mark.parametrize("name", NORMS)
def test_second_derivatives(name: str, way: str) -> None:
    norm, formula = NORMS[name]
    torch.testing.assert_close(SECOND[way](norm), SECOND[way](formula))


@pytest.mark.parametrize("way", sorted(FUSED - {"plan"}))
def test_they_are_fused(way: str) -> None:
    seen: list[set[str]] = []

    def norm(h: Tensor) -> Tensor:
        y = NORMS["layer"][0](h)
        seen.append(recorded_names(y))
        return y

    SECOND[way](norm)
    assert any("NativeLayerNormBackward0" in names for names in seen)
    seen.clear()
    gradient(lambda x: hessian(loss(norm), x).sum(), X)
    assert seen
    assert not any("NativeLayerNormBackward0" in names for names in seen)


# Differentiated inside, by whatever means.
INSIDE: dict[str, Callable[[Norm], Callable[[Tensor], Tensor]]] = {
    "gradient": lambda n: lambda x: gradient(loss(n), x)[0].sin().sum(),
    "gradient of checkpointed": lambda n: (
        lambda x: gradient(lambda y: checkpointed(loss(n), y), x)[0].sin().sum()
    ),
    "pushforward": lambda n: lambda x: pushforward(loss(n), x)(V).sin(),
    "torch.func.grad": lambda n: lambda x: torch.func.grad(loss(n))(x).sin().sum(),
    "torch.func.jvp": lambda n: lambda x: torch.func.jvp(loss(n), (x,), (V,))[1].sin(),
    "forward_ad": lambda n: lambda x: with_dual_numbers(loss(n), x).sin(),
    "checkpointed gradient": lambda n: (
        lambda x: checkpointed(lambda y: gradient(loss(n), y)[0].sin().sum(), x)
    ),
}


def with_dual_numbers(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with dual_level():
        return unpack_dual(f(make_dual(x, V)))[1]


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", ["layer, weight and bias", "batch", "instance, weight"])
def test_derivatives_inside_are_differentiated_twice(name: str, inside: str) -> None:
    for way in (hessian, lambda f, x: diaghessian(f, x)[0]):
        found, expected = (way(INSIDE[inside](norm), X) for norm in NORMS[name])
        torch.testing.assert_close(found, expected)


def inside_autograd(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def of_gradient(x: Tensor) -> Tensor:
        if not x.requires_grad:
            x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x, create_graph=True)[0].sin().sum()

    return of_gradient


AROUND: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "gradient": lambda f: gradient(f, X)[0],
    "hessian": lambda f: hessian(f, X),
    "hessian_reverse": lambda f: hessian_reverse(f, X),
    "withhessian": lambda f: tuple(withhessian(f, X, mode="reverse_over_reverse")),
    "sparse": lambda f: hessian(f, X, sparse=True).to_dense(),
    "diaghessian": lambda f: diaghessian(f, X)[0],
    "diaghessian by Params": lambda f: by_params(f),
    "plan": lambda f: plan_hessian(f, X, mode="reverse_over_reverse")(X).to_dense(),
    "create_graph": lambda f: hessian_reverse(f, X, create_graph=True).detach(),
}


def by_params(f: Callable[[Tensor], Tensor]) -> Tensor | None:
    p = X.clone().requires_grad_()
    return diaghessian(lambda: f(p), Params([p]))[p]


@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("name", ["layer, weight and bias", "layer", "batch", "instance, weight"])
def test_plain_autograd_inside(name: str, way: str) -> None:
    found, expected = (AROUND[way](inside_autograd(loss(norm))) for norm in NORMS[name])
    torch.testing.assert_close(found, expected)


def test_plain_autograd_inside_runs_f_twice_as_if_once() -> None:
    runs: list[object] = []
    seen: list[object] = []
    of = lambda norm: inside_autograd(lambda x: loss(norm)(x * torch.rand(6, dtype=D)))

    def f(x: Tensor) -> Tensor:
        runs.append(x)
        hook(seen.append, x * 2)
        return of(NORMS["layer"][0])(x)

    found = []
    for function in (f, of(NORMS["layer"][1])):
        torch.manual_seed(1)
        found.append((*withhessian(function, X, mode="reverse_over_reverse"), torch.rand(2)))
    torch.testing.assert_close(found[0], found[1])
    assert len(runs) == 2
    assert seen == [None]
    runs.clear()
    hessian_reverse(lambda x: (runs.append(x), loss(NORMS["layer"][0])(x))[1], X)
    assert len(runs) == 1


def test_plain_autograd_inside_is_refused_where_it_would_be_wrong() -> None:
    bound = torch.layer_norm
    f = inside_autograd(loss(lambda h: bound(h, (4, 9))))
    for way in (hessian_reverse, diaghessian):
        with pytest.raises(RuntimeError, match=r"torchzygote\.gradient"):
            way(f, X)
