"""Functions that PyTorch lacks second or forward derivatives of: by their formulas they have them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dispatched import LargestResult
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    pushforward,
    withgradient,
    withhessian,
    withjacobian,
)

D = torch.float64
V = torch.linspace(-1.3, 1.9, 12, dtype=D)
T = V.cos()
Function = Callable[[Tensor], Tensor]


def points(v: Tensor) -> Tensor:
    return v.view(4, 3)


FUNCTIONS: dict[str, Function] = {
    "mse_loss": lambda v: F.mse_loss(v**2, T),
    "mse_loss, broadcast": lambda v: F.mse_loss(points(v**2), T[:3].expand(4, 3), reduction="sum"),
    "MSELoss": lambda v: nn.MSELoss()(v.sin(), v.exp()),
    "mse_loss, weighted": lambda v: F.mse_loss(v**2, T, weight=T.abs()),
    "huber_loss": lambda v: F.huber_loss(v**2, T, delta=0.7),
    "huber_loss, each": lambda v: F.huber_loss(v**2, T, reduction="none").square().sum(),
    "soft_margin_loss": lambda v: F.soft_margin_loss(v**3, T.sign()),
    "hardsigmoid": lambda v: (F.hardsigmoid(4 * v) * v.exp()).sum(),
    "Hardsigmoid": lambda v: (nn.Hardsigmoid(inplace=True)(4 * v) * v.exp()).sum(),
    "cdist": lambda v: torch.cdist(points(v)[:2], points(v)[2:]).exp().sum(),
    "cdist to itself": lambda v: torch.cdist(points(v), points(v)).square().sum(),
    "cdist, p = 1": lambda v: torch.cdist(points(v), T.view(2, 2, 3), p=1.0).square().sum(),
    "cdist, p = 3": lambda v: torch.cdist(points(v), T.view(4, 3), p=3.0).exp().sum(),
    "cdist, largest": lambda v: torch.cdist(points(v), T.view(4, 3), p=float("inf")).exp().sum(),
    "pdist": lambda v: F.pdist(points(v)).exp().sum(),
    "pdist, p = 1.5": lambda v: torch.pdist(points(v), 1.5).exp().sum(),
}
PLACES = [
    *((torch._C._nn, f"{name}_loss") for name in ("mse", "huber", "soft_margin")),
    *((torch._C._nn, name) for name in ("hardsigmoid", "hardsigmoid_")),
    *((torch._VF, "cdist"), (torch, "cdist"), (torch, "pdist"), (F, "pdist")),
    *((F, name) for name in ("mse_loss", "huber_loss", "soft_margin_loss", "hardsigmoid")),
]
OPERATORS = [getattr(*place) for place in PLACES]


@pytest.fixture(autouse=True)
def all_are_put_back() -> Iterator[None]:
    yield
    assert [getattr(*place) for place in PLACES] == OPERATORS


WAYS: dict[str, Callable[[Function, Tensor], Tensor]] = {
    "hessian": hessian,
    "hessian_dual": hessian_dual,
    "hessian_dual, by columns": lambda f, v: hessian_dual(f, v, chunk_size=1),
    "hessian_reverse": hessian_reverse,
    "withhessian": lambda f, v: withhessian(f, v).hess,
    "jacobian of gradient": lambda f, v: jacobian(lambda z: gradient(f, z)[0], v)[0],
    "the same, forward": lambda f, v: jacobian(lambda z: gradient(f, z)[0], v, mode="forward")[0],
    "forwarddiff of gradient": lambda f, v: jacobian(
        lambda z: forwarddiff(lambda q: gradient(f, q)[0], z), v
    )[0],
    "pushforward of gradient": lambda f, v: torch.stack(
        [pushforward(lambda z: gradient(f, z)[0], v)(e) for e in torch.eye(12, dtype=D)]
    ),
    "jacfwd of gradient": lambda f, v: torch.func.jacfwd(lambda z: gradient(f, z)[0])(v),
    "vmap": lambda f, v: torch.func.vmap(lambda z: hessian(f, z))(v.unsqueeze(0))[0],
    "create_graph": lambda f, v: jacobian(lambda z: gradient(f, z, create_graph=True)[0], v)[0],
}


def differences(f: Function) -> Tensor:
    """Of gradients by plain autograd, which is right for all of these."""

    def slope(v: Tensor) -> Tensor:
        leaf = v.clone().requires_grad_()
        return torch.autograd.grad(f(leaf), leaf)[0]

    return torch.stack([(slope(V + h) - slope(V - h)) / 2e-6 for h in 1e-6 * torch.eye(12, dtype=D)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:rows are computed one at a time", "ignore:There is a performance drop")
def test_second_derivatives(name: str, way: str) -> None:
    f = FUNCTIONS[name]
    torch.testing.assert_close(WAYS[way](f, V), differences(f), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_derivatives_in_forward_mode(name: str) -> None:
    f = FUNCTIONS[name]
    leaf = V.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(jacobian(f, V, mode="forward")[0].reshape(-1), expected)
    torch.testing.assert_close(pushforward(f, V)(T), expected @ T)
    torch.testing.assert_close(forwarddiff(f, V), f(V))
    held = V.clone()
    drawn: list[Tensor] = []

    def drawing() -> Tensor:
        drawn.append(torch.rand(()))
        return f(held) + drawn[-1] - drawn[0]

    value, grads = withjacobian(drawing, Params([held]), mode="forward")
    torch.testing.assert_close(grads[held].reshape(-1), expected)
    torch.testing.assert_close(value, f(V))  # of one draw, however often it ran


@pytest.mark.parametrize("way", ["hessian", "hessian_dual"])
@pytest.mark.parametrize(
    "name", ["mse_loss", "MSELoss", "huber_loss", "soft_margin_loss", "hardsigmoid", "cdist", "pdist"]
)
def test_compiled(name: str, way: str) -> None:
    """``hessian_dual`` of ``mse_loss`` was a segmentation fault."""
    torch.compiler.reset()
    f = FUNCTIONS[name]
    compiled = torch.compile(lambda v: WAYS[way](f, v), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(V), differences(f), rtol=1e-5, atol=1e-6)


def test_by_parameters() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=D)
    nets = [
        nn.Sequential(nn.Linear(3, 4), bend, nn.Linear(4, 1)).double()
        for bend in (nn.Hardsigmoid(), WrittenOut())
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    found, expected = (
        diaghessian(lambda net=net: F.mse_loss(net(x), torch.ones(5, 1, dtype=D)), Params(net))
        for net in nets
    )
    for a, b in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(a, b)


class WrittenOut(nn.Module):
    """Of what PyTorch can differentiate twice."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def test_distances_of_equal_points_have_no_derivatives() -> None:
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], dtype=D)
    energy = lambda x: torch.cdist(x, x).sum()
    H = hessian(energy, x)
    assert bool(H.isfinite().all())
    torch.testing.assert_close(H, hessian_dual(energy, x))


@pytest.mark.parametrize("x", [-3.0, 3.0])
def test_ends_of_hardsigmoid_are_those_of_pytorch(x: float) -> None:
    leaf = torch.tensor(x, requires_grad=True)
    (expected,) = torch.autograd.grad(F.hardsigmoid(leaf), leaf)
    assert pushforward(F.hardsigmoid, torch.tensor(x))(1.0) == expected
    assert withhessian(F.hardsigmoid, torch.tensor(x)).val == F.hardsigmoid(leaf.detach())


def test_autocast_is_followed() -> None:
    x, t = torch.linspace(-1, 1, 6).bfloat16(), torch.zeros(6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert pushforward(lambda x: F.mse_loss(x, t), x)(t + 1).dtype == F.mse_loss(x, t).dtype
        assert hessian_dual(lambda x: F.mse_loss(x, t), x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch._C._nn.mse_loss(x, torch.ones(5, dtype=D)),
        lambda x: F.huber_loss(x, x, delta=-1.0),
        lambda x: torch.cdist(x, x).sum(),
        lambda x: F.pdist(x).sum(),
        lambda x: F.soft_margin_loss(x, torch.ones(5, dtype=D)),
    ],
)
def test_what_pytorch_refuses_is_refused_in_its_words(f: Function) -> None:
    x = torch.ones(4, dtype=D)
    with pytest.raises((RuntimeError, ValueError)) as plain:
        f(x)
    with pytest.raises((RuntimeError, ValueError)) as ours:
        hessian_dual(f, x)
    assert str(plain.value).split("\n")[0] in str(ours.value)


CHECKPOINTED: dict[str, Callable[[Function, Tensor], Any]] = {
    "torchzygote": checkpointed,
    "torch": lambda f, v: checkpoint(f, v, use_reentrant=False),
}


@pytest.mark.parametrize("by", CHECKPOINTED)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_runs_again_under_a_checkpoint_is_the_same(name: str, by: str) -> None:
    """Else what one of them saved would be taken for what the other one did, silently."""
    f = FUNCTIONS[name]
    leaf, twin = V.clone().requires_grad_(), V.clone().requires_grad_()
    withgradient(lambda v: CHECKPOINTED[by](f, v), leaf, create_graph=True).val.backward()
    f(twin).backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize(
    "way", ["hessian", "hessian_dual", "forwarddiff of gradient", "gradient of forwarddiff"]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_checkpointed(name: str, way: str) -> None:
    f = FUNCTIONS[name]
    again = lambda v: checkpointed(f, v)
    if way == "gradient of forwarddiff":
        found = gradient(lambda v: forwarddiff(again, v), V)[0]
        torch.testing.assert_close(found, gradient(f, V)[0])
    else:
        torch.testing.assert_close(WAYS[way](again, V), differences(f), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mse_loss", "huber_loss", "soft_margin_loss"])
def test_gradients_of_gradients_through_checkpoints(name: str) -> None:
    f = FUNCTIONS[name]
    expected = differences(f) @ gradient(f, V)[0] * 2
    for by in CHECKPOINTED.values():
        norm = lambda v, by=by: gradient(lambda z: by(f, z), v)[0].square().sum()
        torch.testing.assert_close(gradient(norm, V)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("margin", [1e3, -1e3, 100.0, 0.0])
def test_soft_margins_of_any_size(margin: float) -> None:
    x = torch.tensor([margin, 1.0])
    f = lambda x: F.soft_margin_loss(x, torch.ones(2))
    curvature = x.double().sigmoid() * (-x.double()).sigmoid() / 2  # a mean of two
    torch.testing.assert_close(hessian_dual(f, x), curvature.float().diag())


@pytest.mark.parametrize("name", ["mse_loss", "huber_loss", "soft_margin_loss", "hardsigmoid"])
def test_nan_stays_nan(name: str) -> None:
    v = V.clone()
    v[2] = float("nan")
    for create_graph in (None, True):
        assert withgradient(FUNCTIONS[name], v, create_graph=create_graph).val.isnan()
    assert withhessian(FUNCTIONS[name], v).val.isnan()
    assert forwarddiff(FUNCTIONS[name], v).isnan()


@pytest.mark.parametrize("p", [0.0, float("inf")])
def test_gradients_at_ties_do_not_depend_on_the_graph(p: float) -> None:
    x = torch.tensor([[1.0, 1.0, 0.0]])
    f = lambda x: torch.cdist(x, torch.zeros(1, 3), p=p).sum()
    torch.testing.assert_close(gradient(f, x, create_graph=True)[0].detach(), gradient(f, x)[0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.0, float("inf")])
def test_distances_that_are_not_finite_are_those_of_pytorch(p: float, value: float) -> None:
    x = torch.tensor([[value, 1.0], [2.0, 3.0]])
    f = lambda x: torch.cdist(x, torch.zeros(2, 2), p=p)
    torch.testing.assert_close(forwarddiff(f, x), f(x), equal_nan=True)


def test_many_distances_are_left_to_matrix_products() -> None:
    """By the formula they take a tensor of all differences."""
    x = torch.linspace(0, 1, 300 * 8).sin().view(300, 8)
    with LargestResult() as seen:
        gradient(lambda x: torch.cdist(x, x + 1).sum(), x, create_graph=True)
    assert seen.numel <= 300 * 300
    y = x[:30, :2].double()
    energy = lambda y: torch.cdist(y, y).square().sum()
    torch.testing.assert_close(hessian(energy, y), hessian_dual(energy, y))


@pytest.mark.parametrize("module", [nn.MSELoss(), nn.LayerNorm(3), nn.Hardsigmoid()])
def test_scripted_while_others_stand_in(module: nn.Module) -> None:
    x = V.view(4, 3).float()
    call = (lambda m, x: m(x, x**2)) if isinstance(module, nn.MSELoss) else (lambda m, x: m(x))
    gradient(lambda x: call(torch.jit.script(module), x).sum(), x, create_graph=True)
    torch.testing.assert_close(call(torch.jit.script(module), x), call(module, x))
