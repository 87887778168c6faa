"""Norms, differentiated as often as one likes; PyTorch's own third derivatives of some are wrong (2.13)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote import (
    Params,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
    pushforward,
)

D = torch.float64
Norm = Callable[[Tensor], Tensor]
A = torch.linspace(-1, 1, 72, dtype=D).exp().sin().view(6, 12)
SHIFT = torch.linspace(0, 9, 72, dtype=D).cos().view(6, 12)
G, B = torch.tensor([0.5, -1.5, 2.0, 1.0], dtype=D), torch.tensor([0.1, 0.2, -0.3, 0.7], dtype=D)


def by_formula(x: Tensor, dims: tuple[int, ...], weight: Tensor | None, bias: Tensor | None) -> Tensor:
    mean = x.mean(dims, keepdim=True)
    variance = ((x - mean) ** 2).mean(dims, keepdim=True)
    y = (x - mean) / (variance + 1e-5).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def channels(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.view(1, 4, 1)


# h has shape (2, 4, 9)
NORMS: dict[str, tuple[Norm, Norm]] = {
    "layer": (lambda h: F.layer_norm(h, (4, 9)), lambda h: by_formula(h, (1, 2), None, None)),
    "layer, weight and bias": (
        lambda h: F.layer_norm(h.mT, (4,), G, B),
        lambda h: by_formula(h.mT, (2,), G, B),
    ),
    "layer, bias": (lambda h: F.layer_norm(h.mT, (4,), None, B), lambda h: by_formula(h.mT, (2,), None, B)),
    "batch": (
        lambda h: F.batch_norm(h, None, None, training=True),
        lambda h: by_formula(h, (0, 2), None, None),
    ),
    "batch, weight and bias": (
        lambda h: F.batch_norm(h, None, None, G, B, training=True),
        lambda h: by_formula(h, (0, 2), channels(G), channels(B)),
    ),
    "instance": (F.instance_norm, lambda h: by_formula(h, (2,), None, None)),
    "instance, weight": (
        lambda h: F.instance_norm(h, weight=G, bias=B),
        lambda h: by_formula(h, (2,), channels(G), channels(B)),
    ),
    "batch, given statistics": (
        lambda h: F.batch_norm(h, B.clone(), G.abs(), G, B),
        lambda h: (h - channels(B)) / (channels(G.abs()) + 1e-5).sqrt() * channels(G) + channels(B),
    ),
}


def values(x: Tensor) -> Tensor:
    return (x.unsqueeze(1) * A + SHIFT).sin().view(2, 4, 9)


def loss(norm: Norm) -> Callable[[Tensor], Tensor]:
    weights = torch.linspace(0.5, 2, 72, dtype=D)
    return lambda x: norm(values(x)).reshape(-1) ** 3 @ weights


def tall(norm: Norm) -> Callable[[Tensor], Tensor]:
    return lambda x: norm(values(x)).reshape(-1)


X = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.6, 0.4], dtype=D)
V = torch.linspace(-1, 1, 6, dtype=D)

WAYS: dict[str, Callable[[Norm], Tensor]] = {
    "gradient of a diagonal": lambda n: gradient(lambda x: diaghessian(loss(n), x)[0].sum(), X)[0],
    "gradient of a Hessian": lambda n: gradient(lambda x: hessian(loss(n), x).sin().sum(), X)[0],
    "gradient of hessian_dual": lambda n: gradient(lambda x: hessian_dual(loss(n), x).sin().sum(), X)[0],
    "jacobian of a Hessian": lambda n: jacobian(lambda x: hessian(loss(n), x), X)[0],
    "hessian of a gradient": lambda n: hessian(lambda x: gradient(loss(n), x)[0].square().sum(), X),
    "torch.func.grad of a Hessian": lambda n: torch.func.grad(lambda x: hessian_reverse(loss(n), x).sum())(X),
    "gradient of a Jacobian": lambda n: gradient(lambda x: jacobian(tall(n), x)[0].sin().sum(), X)[0],
    "gradient of a pushforward": lambda n: gradient(lambda x: pushforward(tall(n), x)(V).sin().sum(), X)[0],
    "hessian of forwarddiff": lambda n: hessian(lambda x: forwarddiff(tall(n), x).sin().sum(), X),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NORMS)
def test_derivatives_of_derivatives(name: str, way: str) -> None:
    norm, formula = NORMS[name]
    torch.testing.assert_close(WAYS[way](norm), WAYS[way](formula))


@pytest.mark.parametrize("name", NORMS)
def test_create_graph(name: str) -> None:
    found = []
    for norm in NORMS[name]:
        x = X.clone().requires_grad_()
        found.append(torch.autograd.grad(hessian(loss(norm), x, create_graph=True).sin().sum(), x)[0])
        plan = plan_hessian(loss(norm), X)
        found[-1] = torch.stack(
            [found[-1], *torch.autograd.grad(plan(x, create_graph=True).values().sum(), x)]
        )
    torch.testing.assert_close(found[0], found[1])


def test_a_network_trained_on_its_laplacian() -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(8).to(D)
    before, after = nn.Linear(2, 8).to(D), nn.Linear(8, 1).to(D)
    written = lambda h: by_formula(h, (-1,), norm.weight, norm.bias)
    params = Params([*before.parameters(), *norm.parameters(), *after.parameters()])
    x = torch.tensor([0.4, 0.7], dtype=D)
    of = lambda n: gradient(
        lambda: diaghessian(lambda v: after(n(before(v).tanh()).tanh())[0], x)[0].sum() ** 2, params
    )
    for p, g in of(norm).items():
        expected = of(written)[p]
        assert (g is None) == (expected is None)
        if g is not None:
            torch.testing.assert_close(g, expected)


def test_running_statistics_move_as_they_do() -> None:
    torch.manual_seed(0)
    for module in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)):
        moved, plain = module.to(D), type(module)(4, affine=True, track_running_stats=True).to(D)
        h = torch.randn(3, 4, 5, dtype=D)
        hessian(lambda s, m=moved, h=h: m(h * s).square().sum(), 1.0)
        plain(h)
        for name, value in plain.named_buffers():
            torch.testing.assert_close(dict(moved.named_buffers())[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_dtypes_are_the_same(dtype: torch.dtype) -> None:
    h = torch.randn(3, 4, 5).to(dtype)
    for weights in ((None, None), (G.to(dtype), B.to(dtype)), (G.float(), B.float())):
        for norm in (
            lambda h, w=weights: F.layer_norm(h.mT, (4,), *w),
            lambda h, w=weights: F.batch_norm(h, None, None, *w, training=True),
        ):
            expected = norm(h)
            seen: list[Tensor] = []

            def f(s: Tensor, norm: Norm = norm, seen: list[Tensor] = seen) -> Tensor:
                seen.append(norm(h * s.to(dtype)))
                return seen[-1].float().square().sum()

            hessian(f, 1.0)
            assert seen[0].dtype == expected.dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(seen[0].detach(), expected, rtol=4 * eps, atol=4 * eps)


def test_autocast_chooses_the_same_dtype() -> None:
    h = torch.randn(3, 4, dtype=torch.bfloat16)
    seen: list[torch.dtype] = []

    def f(s: Tensor) -> Tensor:
        y = F.layer_norm(h * s, (4,))
        seen.append(y.dtype)
        return y.float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        expected = F.layer_norm(h, (4,)).dtype
        hessian(f, 1.0)
    assert seen[0] == expected


def test_what_the_operators_refuse_is_refused() -> None:
    h = torch.randn(3, 4)
    bad: list[Callable[[], Tensor]] = [
        lambda: F.layer_norm(h, (5,)),
        lambda: F.layer_norm(h, (4,), torch.ones(3)),
        lambda: F.layer_norm(h, (4,), torch.ones(4, dtype=D)),
        lambda: F.batch_norm(h, None, None, torch.ones(3), training=True),
        lambda: F.batch_norm(h[:1], None, None, training=True),
    ]
    for call in bad:
        with pytest.raises((RuntimeError, ValueError)) as plain:
            call()
        with pytest.raises(plain.type):
            hessian(lambda s, call=call: (call() * s).sum(), 1.0)


def test_the_operators_are_back_afterwards() -> None:
    before = torch.layer_norm, torch.batch_norm, torch.instance_norm
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian(loss(NORMS["layer"][0]), X)
    assert (torch.layer_norm, torch.batch_norm, torch.instance_norm) == before
    with pytest.raises(ZeroDivisionError):
        hessian(lambda x: (x / (1 // 0)).sum(), X)
    assert (torch.layer_norm, torch.batch_norm, torch.instance_norm) == before
