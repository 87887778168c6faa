"""Batch axes found in the recorded graph: they hold for the true Jacobian, and few products suffice."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from dispatched import LargestResult
from torch import Tensor, nn

from torchzygote import _dense_hessians, _separable
from torchzygote._block_layout import Layout
from torchzygote._cost_model import RowCost
from torchzygote._recorded.alignment import aligned_axes
from torchzygote._separable import find_layout
from torchzygote.gradients import gradient
from torchzygote.hessians import diaghessian, hessian
from torchzygote.jacobians import jacobian

Function = Callable[[Tensor], Tensor]
W = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
B = torch.linspace(-1, 1, 5 * 3 * 2, dtype=torch.float64).reshape(5, 3, 2)
conv = nn.Conv1d(3, 2, 2).double()
norm = nn.LayerNorm(3).double()

# x has shape (5, 3); the pairs of axes (of y, of x) that run along with each other
OPERATIONS: dict[str, tuple[Function, list[tuple[int, int]]]] = {
    "elementwise": (lambda x: torch.tanh(x) * x.sin() + 2, [(0, 0), (1, 1)]),
    "broadcast": (lambda x: x * x[:, :1], [(0, 0)]),
    "other axis": (lambda x: x * x[:1], [(1, 1)]),
    "outer": (lambda x: x.unsqueeze(0) * x.unsqueeze(1), [(2, 1)]),
    "added axis": (lambda x: x.unsqueeze(1).expand(5, 7, 3).exp(), [(0, 0), (2, 1)]),
    "mm": (lambda x: x.sin() @ W, [(0, 0)]),
    "mm from the left": (lambda x: W.t() @ x.t(), [(1, 0)]),
    "mm of both": (lambda x: x @ x.t(), []),
    "addmm": (lambda x: torch.addmm(x[:, :1], x, W), [(0, 0)]),
    "mv": (lambda x: (x**2) @ W[:, 0], [(0, 0)]),
    "mv by x": (lambda x: W.t() @ x[0], []),
    "bmm": (lambda x: torch.bmm(x.unsqueeze(1).cos(), B), [(0, 0)]),
    "bmm of both": (lambda x: torch.bmm(x.unsqueeze(1), x.unsqueeze(2)), [(0, 0)]),
    "transpose": (lambda x: x.transpose(-1, 0) ** 2, [(0, 1), (1, 0)]),
    "t": (lambda x: (x**2).t().exp(), [(0, 1), (1, 0)]),
    "permute": (lambda x: x.unsqueeze(0).permute(2, 0, 1) ** 2, [(0, 1), (2, 0)]),
    "view": (lambda x: x.exp().reshape(5, 3, 1).view(5, 3), [(0, 0), (1, 1)]),
    "view that folds": (lambda x: x.exp().view(15).sin(), []),
    "view that folds behind": (lambda x: x.unsqueeze(-1).expand(5, 3, 2).reshape(5, 6).sin(), [(0, 0)]),
    "view that folds in front": (lambda x: x.expand(2, 5, 3).reshape(10, 3).sin(), [(1, 1)]),
    "sum": (lambda x: (x**2).sum(1), [(0, 0)]),
    "sum of the front": (lambda x: (x**2).sum(0, keepdim=True), [(1, 1)]),
    "mean": (lambda x: (x**2).mean(-1), [(0, 0)]),
    "sum of all": (lambda x: x.exp().sum().unsqueeze(0).expand(5), []),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=1), [(0, 0)]),
    "amax": (lambda x: x.amax(1), [(0, 0)]),
    "softmax": (lambda x: x.softmax(1), [(0, 0)]),
    "log_softmax": (lambda x: x.log_softmax(0), [(1, 1)]),
    "logsumexp": (lambda x: x.logsumexp(1), [(0, 0)]),
    "cumsum": (lambda x: x.exp().cumsum(0), [(1, 1)]),
    "slice": (lambda x: x[1:].exp(), [(1, 1)]),
    "slice of everything": (lambda x: x[:, 1:].exp(), [(0, 0)]),
    "shifted": (lambda x: x[1:, :].exp() * x[:-1, :], [(1, 1)]),
    "select": (lambda x: x[:, 1].exp(), [(0, 0)]),
    "select in front": (lambda x: x[2].exp(), [(0, 1)]),
    "unbind": (lambda x: x.unbind(1)[1] * x.unbind(1)[0], [(0, 0)]),
    "split": (lambda x: torch.mul(*x[:4].split(2)), [(1, 1)]),
    "split behind": (lambda x: torch.mul(*x[:, :2].split(1, dim=1)), [(0, 0)]),
    "stack": (lambda x: torch.stack([x.sin(), x * 2], -1), [(0, 0), (1, 1)]),
    "stack in front": (lambda x: torch.stack([x.sin(), x * 2]), [(1, 0), (2, 1)]),
    "cat": (lambda x: torch.cat([x.sin(), x[:, :1]], 1), [(0, 0)]),
    "cat in front": (lambda x: torch.cat([x.sin(), x[:1]]), [(1, 1)]),
    "squeeze": (lambda x: x.unsqueeze(1).exp().squeeze(1), [(0, 0), (1, 1)]),
    "squeeze of all": (lambda x: x.unsqueeze(1).unsqueeze(0).exp().squeeze().sin(), [(0, 0), (1, 1)]),
    "where": (lambda x: torch.where(x > 0, x**2, x[:, :1]), [(0, 0)]),
    "flip": (lambda x: x.flip(0) * 2, [(1, 1)]),
    "index": (lambda x: x[torch.tensor([1, 0, 2, 3, 4])].exp(), [(1, 1)]),
    "cumprod": (lambda x: x.cumprod(0), []),
    "conv": (lambda x: conv(x.unsqueeze(2).expand(5, 3, 4)), [(0, 0)]),
    "layer norm": (lambda x: norm(x), [(0, 0)]),
    "batch norm": (lambda x: F.batch_norm(x, None, None, training=True), [(1, 1)]),
    "pow of both": (lambda x: x.exp() ** x, [(0, 0), (1, 1)]),
    "in place": (lambda x: x.clone().mul_(x).exp_(), [(0, 0), (1, 1)]),
    "write into a slice": (lambda x: x.clone().index_fill_(0, torch.tensor([1]), 0.0), []),
    "gelu, silu, softplus": (lambda x: F.gelu(x) * F.silu(x) + F.softplus(x), [(0, 0), (1, 1)]),
}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("name", OPERATIONS)
def test_axes_of_each_operation(name: str, x: Tensor) -> None:
    f, expected = OPERATIONS[name]
    assert (aligned_axes(f(x), x) or []) == expected


def off_axis(J: Tensor, p: int, q: int, y_dim: int) -> Tensor:
    """Where the index on axis p of y differs from the one on axis q of x."""
    a = torch.arange(J.shape[p]).view([-1 if i == p else 1 for i in range(J.dim())])
    b = torch.arange(J.shape[y_dim + q]).view([-1 if i == y_dim + q else 1 for i in range(J.dim())])
    return J[(a != b).expand(J.shape)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_axes_hold_for_the_true_derivatives(name: str, x: Tensor) -> None:
    f, _ = OPERATIONS[name]
    y = f(x)
    J = torch.func.jacrev(f)(x.detach())
    for p, q in aligned_axes(y, x) or []:
        assert not off_axis(J, p, q, y.dim()).any()
    scalar = lambda x: (f(x) ** 2).sum()
    (g,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    H = torch.func.hessian(scalar)(x.detach())
    for p, q in aligned_axes(g, x) or []:
        assert not off_axis(H, p, q, x.dim()).any()


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_derivative_equals_torch_func(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_separable, "LEAST_ROWS", 1)
    monkeypatch.setattr(_separable, "LEAST_SAVING", 1)
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)
    f, _ = OPERATIONS[name]
    x = torch.randn(5, 3, dtype=torch.float64)
    y = f(x)
    expected = torch.func.jacrev(f)(x).reshape(y.numel(), x.numel())
    for mode in ("reverse", "forward"):
        torch.testing.assert_close(jacobian(f, x, mode=mode)[0], expected)
    scalar = lambda x: (f(x) ** 2).sum()
    H = torch.func.hessian(scalar)(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(hessian(scalar, x), H)
    torch.testing.assert_close(diaghessian(scalar, x)[0].reshape(-1), H.diagonal())


def mlp(sizes: list[int]) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def test_per_sample_jacobians_take_as_many_products_as_one_sample() -> None:
    net = mlp([4, 8, 2])
    x = torch.randn(300, 4, dtype=torch.float64)
    (J,) = jacobian(net, x)
    one = torch.func.vmap(torch.func.jacrev(net))(x)  # (300, 2, 4)
    blocks = J.view(300, 2, 300, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    torch.testing.assert_close(blocks, one)
    assert int(J.count_nonzero()) == one.numel()
    with LargestResult() as seen:
        diaghessian(lambda x: net(x).square().sum(), x)
    assert seen.numel <= (4 + 1) * 300 * 8  # four products and the check, of the widest layer


def test_second_derivatives_of_a_network_on_points() -> None:
    net = mlp([2, 8, 8, 1])
    points = torch.randn(200, 2, dtype=torch.float64)
    u = lambda x, y: net(torch.stack([x, y], -1)).sum()
    x, y = points.unbind(1)
    (found,) = diaghessian(lambda p: net(p).sum(), points)
    found_x, found_y = diaghessian(u, x, y)
    single = torch.func.vmap(torch.func.hessian(lambda p: net(p)[0]))(points)
    expected = single.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.stack([found_x, found_y], 1), expected)


JOINT: dict[str, Callable[..., Tensor]] = {
    "coordinates of a network": lambda net, x, t, z: net(torch.cat([torch.stack([x, t], 1), z], 1)).sum(),
    "products": lambda net, x, t, z: (x.sin() * t**3 * z.exp().sum(1)).sum(),
    "one is linear": lambda net, x, t, z: (x**3 + t + (z**2).prod(1)).sum(),
    "one mixes the batch": lambda net, x, t, z: (x * t).sin().sum() + z.sum(0).square().sum(),
    "two mix each other's batch": lambda net, x, t, z: (x.flip(0) * t**2 + z[:, 0] * x).sin().sum(),
    "all mix": lambda net, x, t, z: (x.sum() * t.sum() * z.sum()).sin(),
}


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("create_graph", [None, True])
def test_diagonals_by_several_arguments(
    name: str, create_graph: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_separable, "LEAST_ROWS", 1)
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)
    torch.manual_seed(0)
    net = mlp([4, 8, 1]).double()
    f = functools.partial(JOINT[name], net)
    args = (torch.randn(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 1)
    z = torch.randn(12, 2, dtype=torch.float64)
    found = diaghessian(f, *args, z, create_graph=create_graph)
    H = torch.func.hessian(f, argnums=(0, 1, 2))(*args, z)
    for i, (h, x) in enumerate(zip(found, (*args, z), strict=True)):
        torch.testing.assert_close(h.reshape(-1), H[i][i].reshape(x.numel(), x.numel()).diagonal())


def test_arguments_along_one_batch_axis_share_their_products(pulls: list[int]) -> None:
    """u_xx and u_tt of a network at every point: the gradient, and a product for each."""
    net = mlp([2, 16, 1]).float()
    x, t = torch.rand(2000), torch.rand(2000)
    diaghessian(lambda x, t: net(torch.stack([x, t], 1).sin()).cumsum(1).prod(1).sum(), x, t)
    assert len(pulls) == 1 + 2


def test_a_hook_that_mixes_the_batch_is_noticed_in_the_joint_check() -> None:
    def f(x: Tensor, t: Tensor) -> Tensor:
        y = x.sin() * t
        # The recorded gradient doesn't show it.
        y.register_hook(lambda g: g if torch.is_grad_enabled() else g.flip(0))
        return (y**2).sum()

    x, t = torch.rand(200, dtype=torch.float64), torch.rand(200, dtype=torch.float64)
    with pytest.warns(UserWarning, match="contradicts"):
        diaghessian(f, x, t)


def test_results_are_differentiable_themselves() -> None:
    net = mlp([2, 8, 1])
    points = torch.randn(100, 2, dtype=torch.float64)

    def residual(scale: Tensor) -> Tensor:
        (h,) = diaghessian(lambda p: net(p * scale).sum(), points)
        return (h.sum(1) ** 2).mean()

    def plain(scale: Tensor) -> Tensor:
        H = torch.func.vmap(torch.func.hessian(lambda p: net(p * scale)[0]))(points)
        return (H.diagonal(dim1=1, dim2=2).sum(1) ** 2).mean()

    scale = torch.tensor([1.3, 0.7], dtype=torch.float64)
    torch.testing.assert_close(gradient(residual, scale)[0], torch.func.grad(plain)(scale))
    through = jacobian(lambda s: jacobian(lambda p: net(p * s), points)[0].sum(0), scale)[0]
    expected = torch.func.jacrev(
        lambda s: torch.func.jacrev(lambda p: net(p * s))(points).reshape(100, 200).sum(0)
    )(scale)
    torch.testing.assert_close(through, expected)


def test_a_hook_that_mixes_the_batch_is_noticed() -> None:
    """A hook may make a pullback anything; the check then sends the call the dense way."""

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda g: g.flip(0))
        return y * 2

    x = torch.randn(500, dtype=torch.float64)
    with pytest.warns(UserWarning, match="contradicts.*SinBackward0"):
        (J,) = jacobian(f, x, mode="reverse")
    torch.testing.assert_close(J, 2 * torch.eye(500, dtype=torch.float64).flip(0) * x.cos())


def test_a_hook_that_mixes_what_is_far_smaller_than_another_element_is_noticed() -> None:
    scale = torch.cat([torch.ones(1999), torch.tensor([1e8])])

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        y.register_hook(lambda g: torch.cat([g[:-1].flip(0), g[-1:]]))
        return y * scale

    x = torch.randn(2000)
    with pytest.warns(UserWarning, match="contradicts.*SinBackward0"):
        (J,) = jacobian(f, x, mode="reverse")
    torch.testing.assert_close(J[0], torch.eye(2000)[1998] * x.cos())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_pass_through(value: float) -> None:
    x = torch.randn(500, dtype=torch.float64)
    x[3] = value
    f = lambda x: x**2 * 3
    expected = torch.func.jacrev(f)(x)
    torch.testing.assert_close(jacobian(f, x, mode="reverse")[0], expected, equal_nan=True)


def test_small_problems_are_left_alone() -> None:
    x = torch.randn(10, requires_grad=True)
    assert find_layout(x.sin(), x, RowCost(1 << 20, 1)) is None
    y = torch.randn(100, requires_grad=True)
    assert find_layout(y.sin(), y, RowCost(100, 1)) is None
    assert find_layout(y.sin(), y, RowCost(1 << 20, 1)) is not None


def test_no_diagonal_keeps_the_memory_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)
    f = lambda x, t: torch.cat([x.t(), t[None]]).sin().prod(0).sum()  # its pullback gives parts of one tensor
    args = [torch.rand(*shape, dtype=torch.float64) for shape in ((40, 3), (40,))]
    for h in diaghessian(f, *args):
        assert h.untyped_storage().nbytes() == h.nbytes


@pytest.mark.filterwarnings("ignore:a batch axis")
def test_small_blocks_where_a_hook_bends_what_is_pulled_back() -> None:
    def clamped(x: Tensor) -> Tensor:
        y = x.sin() @ torch.eye(2, dtype=torch.float64)
        if y.requires_grad:
            y.register_hook(lambda g: g.clamp(-0.4, 0.4))
        return (y**3).sum()

    x = torch.linspace(0.2, 1.2, 512, dtype=torch.float64).view(256, 2)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(clamped(leaf), leaf, create_graph=True)
    some = [0, 3, 100, 511]
    expected = [torch.autograd.grad(g.flatten()[i], leaf, retain_graph=True)[0].flatten() for i in some]
    found = hessian(clamped, x, mode="reverse_over_reverse").reshape(512, 512)
    torch.testing.assert_close(found[some], torch.stack(expected))


@pytest.mark.parametrize("by_curvature", [True, False])
def test_layouts_are_made_for_each_shape_not_each_pair(
    by_curvature: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Layout] = []

    def counting(*args: object) -> Layout:
        made.append(Layout(*args))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(_separable, "Layout", counting)
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)
    if not by_curvature:
        monkeypatch.setattr(_dense_hessians, "diagonals_by_curvature", lambda *args: None)
    xs = [torch.rand((20, 2) if i % 3 else (20,), dtype=torch.float64) for i in range(24)]

    def f(*xs: Tensor) -> Tensor:
        return sum((x if x.dim() == 1 else x.sum(1)).sin() for x in xs).square().sum()  # type: ignore[union-attr]

    found = diaghessian(f, *xs)
    assert 0 < len(made) <= (2 if by_curvature else 4)
    total = sum((x if x.dim() == 1 else x.sum(1)).sin() for x in xs)
    for x, h in zip(xs, found, strict=True):
        z = x if x.dim() == 1 else x.sum(1)
        by_hand = 2 * z.cos() ** 2 - 2 * total * z.sin()
        torch.testing.assert_close(h, by_hand if x.dim() == 1 else by_hand[:, None].expand(20, 2))
