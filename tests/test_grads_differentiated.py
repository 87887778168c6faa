"""Arithmetic on Grads within other differentiations: its derivative in every mode, and under vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grads_samples import BINARY, IN_PLACE, close
from torch import Tensor

from torchzygote import (
    GradDict,
    Grads,
    Params,
    diaghessian,
    gradient,
    hessian,
    pullback,
    withgradient,
)


def inner(w: Tensor, b: Tensor) -> Tensor:
    return (w**3).sum() * b + b**2


@pytest.mark.parametrize("symbol", BINARY)
def test_arithmetic_on_grads_is_differentiable(symbol: str) -> None:
    """The gradient of what arithmetic on inner gradients gives, against torch.func on the formula."""
    w, b = torch.rand(3, dtype=torch.float64) + 1, torch.tensor(1.5, dtype=torch.float64)
    ps = Params([w, b])
    op = BINARY[symbol]

    def outer() -> Tensor:
        g = gradient(lambda: inner(w, b), ps)
        h = gradient(lambda: inner(w, b) * b, ps)
        k = op(op(op(g, h), 2), b)
        k = IN_PLACE[symbol](k, 1.5) + 3 / g - b
        return k[w].sum() + k[b] + g.norm()

    def formula(w: Tensor, b: Tensor) -> Tensor:
        g = torch.func.grad(inner, (0, 1))(w, b)
        h = torch.func.grad(lambda w, b: inner(w, b) * b, (0, 1))(w, b)
        k = [op(op(op(op(x, y), 2), b), 1.5) + 3 / x - b for x, y in zip(g, h, strict=True)]
        return k[0].sum() + k[1] + torch.cat([g[0], g[1][None]]).norm()

    expected = torch.func.grad(formula, (0, 1))(w, b)
    close(gradient(outer, ps), dict(zip([w, b], expected, strict=True)))
    assert not w.requires_grad


def second(mode: str) -> Callable[..., Any]:
    return lambda f: lambda x: hessian(f, x, mode=mode)


@pytest.mark.parametrize(
    ("transform", "reference"),
    [
        (torch.func.grad, torch.func.grad),
        (torch.func.jacfwd, torch.func.grad),
        (torch.func.hessian, torch.func.hessian),
        (lambda f: lambda x: gradient(f, x)[0], torch.func.grad),
        (second("reverse_over_reverse"), torch.func.hessian),
        (second("forward_over_reverse"), torch.func.hessian),
        (lambda f: lambda x: diaghessian(f, x)[0], torch.func.hessian),
    ],
)
def test_arithmetic_is_differentiated_in_every_mode(
    transform: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    w, b = torch.rand(3, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    x = torch.tensor(0.7, dtype=torch.float64)
    keys = Params([w, b])

    def mine(x: Tensor) -> Tensor:
        g = Grads(keys, [w * x, b * x**2])
        g *= x
        g = (g + 2 * g / (1 + x) - 3) ** 2
        clipped = g.clip_norm(0.5)
        g.clip_value_(-1.0, 4.0)
        return (2 - g)[w].sum() + (x / g)[b] + (x**g)[b] + clipped[w].sum() + g.to_vector().sum()

    def formula(x: Tensor) -> Tensor:
        g = [w * x * x, b * x**3]
        g = [(y + 2 * y / (1 + x) - 3) ** 2 for y in g]
        norm = torch.sqrt((g[0] ** 2).sum() + g[1] ** 2)
        clipped = g[0] * torch.clamp(0.5 / (norm + 1e-6), max=1.0)
        g = [y.clamp(-1, 4) for y in g]
        return (2 - g[0]).sum() + x / g[1] + x ** g[1] + clipped.sum() + g[0].sum() + g[1]

    torch.testing.assert_close(transform(mine)(x), reference(formula)(x))


def test_arithmetic_works_under_vmap() -> None:
    w, b = torch.rand(3), torch.rand(())
    ps = Params([w, b])

    def mine(x: Tensor) -> Tensor:
        g = Grads(ps, [w * x, b.clone()])
        g += {w: torch.ones(3), b: x}
        return (2 * g - x * g)[w].sum() + g.norm() + g[b]

    xs = torch.rand(4)
    torch.testing.assert_close(torch.func.vmap(mine)(xs), torch.stack([mine(x) for x in xs]))


def test_in_place_arithmetic_on_a_graph_keeps_the_derivative() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def outer() -> Tensor:
        g = gradient(lambda: (w**3).sum(), Params([w]))
        g *= g
        g.clip_norm_(10.0)
        return g[w].sum()

    def formula(w: Tensor) -> Tensor:
        g = (3 * w**2) ** 2
        return (g * torch.clamp(10 / (g.norm() + 1e-6), max=1)).sum()

    torch.testing.assert_close(gradient(outer, Params([w]))[w], torch.func.grad(formula)(w))


def test_plain_autograd_on_the_outside_with_create_graph() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    g = gradient(lambda: (w**3).sum(), Params([w]), create_graph=True)
    ((scale * g)[w] + (g + g)[w]).sum().backward()
    torch.testing.assert_close(w.grad, 4 * 6 * w.detach())
    torch.testing.assert_close(scale.grad, (3 * w.detach() ** 2).sum())


def test_grads_that_f_returns_carry_no_graph() -> None:
    """As auxiliary output, as a whole, in structures, and inside a transform; unless it is asked for."""
    w = torch.tensor([1.0, 2.0])
    ps = Params([w])
    kept: list[Grads] = []

    def f() -> Any:
        g = gradient(lambda: (w**3).sum(), ps)
        kept.append(g)
        return g.norm(), g, {"g": [GradDict(g), g.copy()]}

    val, grad = withgradient(f, ps)
    for found in (val[1], val[2]["g"][0], val[2]["g"][1]):
        assert not found[w].requires_grad
        assert torch.equal(found[w], 3 * w**2)
    assert type(val[1]) is Grads
    assert val[1].params is ps
    assert grad[w] is not None
    assert kept[0][w].requires_grad  # another object
    y, back = pullback(lambda: f()[1], ps)
    assert not y[w].requires_grad
    assert back(None)[w] is None
    assert withgradient(f, ps, create_graph=True).val[1][w].requires_grad
    plain = Grads(ps, [None])
    assert withgradient(lambda: (w.sum(), plain), ps).val[1] is plain
    by_row = torch.func.vmap(lambda s: withgradient(lambda s: ((f()[1][w] * s).sum(), f()[1]), s).val[1][w])
    assert torch.equal(by_row(torch.ones(2)), (3 * w**2).expand(2, 2))


def test_gradients_laid_out_as_their_parameters_keep_their_graph() -> None:
    p = torch.arange(6.0, dtype=torch.float64).view(3, 2).t()  # its gradients come row by row
    ps = Params([p])
    factor = torch.linspace(1, 2, 6, dtype=torch.float64).view(2, 3)

    def total(w: Tensor) -> Tensor:
        _, back = pullback(lambda: ((p.contiguous() * w) ** 3).sum(), ps)
        with torch.no_grad():
            found = back(1.0)[p]
        assert found.stride() == p.stride()
        return found.sum()

    # the sum of 3 p² w³
    torch.testing.assert_close(gradient(total, factor)[0], 9 * p**2 * factor**2)
