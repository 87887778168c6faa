"""Forward mode by Params inside torch.func transforms, where the tensors are exchanged for dual numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import Params, gradient, hook, jacobian, plan_jacobian, withjacobian

DOUBLE = torch.float64
X = torch.linspace(-1, 1, 24, dtype=DOUBLE).reshape(2, 4, 3)
W = torch.tensor([1.0, -2.0, 0.5], dtype=DOUBLE)
B = torch.tensor(0.5, dtype=DOUBLE)


def layer(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(x @ w + b) * w.sum()


def forward_jacobians(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    found = jacobian(lambda: layer(x, w, b), Params([w, b]), mode="forward")
    return found[w], found[b]


def plain_jacobians(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.func.jacrev(layer, (1, 2))(x, w, b)
    return found


def test_inside_vmap() -> None:
    w, b = W.clone(), B.clone()
    found = torch.func.vmap(lambda x: forward_jacobians(x, w, b))(X)
    torch.testing.assert_close(found, torch.func.vmap(lambda x: plain_jacobians(x, W, B))(X))
    assert torch.equal(w, W)
    assert torch.equal(b, B)
    nested = torch.func.vmap(torch.func.vmap(lambda x: forward_jacobians(x, w, b)))(X[..., None, :])
    plain = torch.func.vmap(torch.func.vmap(lambda x: plain_jacobians(x, W, B)))(X[..., None, :])
    torch.testing.assert_close(nested, plain)


def test_of_members_that_are_batched_themselves() -> None:
    ws = torch.stack([W, 2 * W])
    found = torch.func.vmap(lambda x, w: forward_jacobians(x, w, B.clone()))(X, ws)
    torch.testing.assert_close(found, torch.func.vmap(lambda x, w: plain_jacobians(x, w, B))(X, ws))


OUTER: dict[str, Callable[..., Any]] = {
    "grad": torch.func.grad,
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": torch.func.hessian,
    "gradient": lambda f: lambda x: gradient(f, x)[0],
    "vmap of grad": lambda f: lambda x: torch.func.vmap(torch.func.grad(f))(x.expand(2, 4, 3)),
}


@pytest.mark.parametrize("outer", OUTER.values(), ids=OUTER)
@pytest.mark.parametrize("by", ["x", "w"])
def test_inside_other_derivatives(outer: Callable[..., Any], by: str) -> None:
    def of(jacobians: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def scalar(z: Tensor) -> Tensor:
            x, w = (z, W.clone()) if by == "x" else (X[0], z[0])
            of_w, of_b = jacobians(x, w, B.clone())
            return of_w.sin().sum() + of_b.pow(2).sum()

        return scalar

    point = X[1] + 0.25
    torch.testing.assert_close(outer(of(forward_jacobians))(point), outer(of(plain_jacobians))(point))


def test_of_modules_whose_parameters_require_grad() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 5)).double()
    ps = Params(net)
    one = lambda x, mode: tuple(jacobian(lambda: net(x), ps, mode=mode).values())
    found = torch.func.vmap(lambda x: one(x, "forward"))(X[0])
    torch.testing.assert_close(found, torch.func.vmap(lambda x: one(x, "reverse"))(X[0]))
    assert all(p.requires_grad and p.is_leaf for p in net.parameters())
    val, _ = withjacobian(lambda: net(X[0]), ps, mode="forward")
    torch.testing.assert_close(val, net(X[0]).detach())


class Cube(torch.autograd.Function):
    """With a forward derivative; the pullback's by its cotangent isn't known to be right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * t


def test_what_dual_numbers_can_do_alone_is_not_refused_there() -> None:
    w = W.clone()
    for f in (lambda w: Cube.apply(w), lambda w: torch.logcumsumexp(w, 0), lambda w: hook(torch.neg, w) ** 2):
        found = torch.func.vmap(lambda x: jacobian(lambda: f(w) * x, Params([w]), mode="forward")[w])(X[0])
        expected = torch.func.vmap(lambda x: torch.func.jacfwd(lambda w: f(w) * x)(W))(X[0])
        torch.testing.assert_close(found, expected)


def test_plans() -> None:
    w, b = W.clone(), B.clone()
    ps = Params([w, b])
    plan = plan_jacobian(lambda: layer(X[0], w, b).repeat(3), ps, mode="forward")

    def values(w1: Tensor) -> tuple[Tensor, ...]:
        return tuple(v * w1 for v in plan.values(ps))

    expected = plan.values(ps)
    torch.testing.assert_close(
        torch.func.vmap(values)(torch.ones(2)), tuple(v.expand(2, -1) for v in expected)
    )
    grads = plan(ps)
    torch.testing.assert_close(expected[0], grads[w].values())


def attention() -> tuple[nn.Module, Callable[[], Tensor]]:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0).double()
    x = torch.randn(2, 3, 4, dtype=DOUBLE)
    return layer, lambda: layer(x)[:, 0, :1]


def normed_weight() -> tuple[nn.Module, Callable[[], Tensor]]:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2).double())
    return layer, lambda: layer(X[0, :2])


@pytest.mark.parametrize("make", [attention, normed_weight])
@pytest.mark.parametrize("create_graph", [None, True])
def test_what_has_fused_kernels(make: Any, create_graph: bool | None) -> None:
    torch.manual_seed(0)
    module, f = make()
    params = Params(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch has no batching rule for the kernels' pullbacks
        expected = [jacobian(f, Params([p]), mode="reverse", chunk_size=1)[p] for p in params]
    for found in (
        jacobian(f, params, mode="forward", create_graph=create_graph),
        withjacobian(f, params, mode="forward", create_graph=create_graph).grad,
        plan_jacobian(f, params, mode="forward")(params, dense=True, create_graph=create_graph),
    ):
        torch.testing.assert_close([J.detach() for J in found.values()], expected)
