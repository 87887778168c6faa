"""Axes along which a scalar is a plain sum: its Hessian is block diagonal along them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from alignment_cases import ATTENTION, IMAGES, RULES, SEVERAL_RESULTS, D, N
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchzygote._recorded.alignment import shared_axes, summed_axes
from torchzygote.gradients import gradient
from torchzygote.hessians import diaghessian, hessian
from torchzygote.params import Params

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    **{name: (f, 2) for name, f in SEVERAL_RESULTS.items()},
    **{name: (f, 2) for name, (f, *_) in RULES.items()},
    **{name: (f, 4) for name, (f, *_) in {**ATTENTION, **IMAGES}.items()},
}
SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "weighted squares": lambda y: (torch.linspace(1, 2, y.numel(), dtype=D).view(y.shape) * y**2).sum(),
    "terms": lambda y: 3 * y.sin().mean() - y.flatten()[::2].exp().sum(0) / 2,
    "mean of squares": lambda y: F.mse_loss(y, torch.zeros_like(y)),
}


def point(rank: int) -> Tensor:
    flat = torch.linspace(0, 99, N**rank, dtype=D).sin()
    return flat.view([N] * rank).requires_grad_()


def holds(y: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> bool:
    """Whether the gradient moves in one place along the axis if ``x`` does there."""
    (g,) = torch.autograd.grad(y(x), x, create_graph=True)
    seed = torch.zeros_like(x).index_fill_(axis, torch.tensor([2]), 1.0) * x.detach().cos()
    (product,) = torch.autograd.grad(g, x, seed, allow_unused=True) if g.requires_grad else (None,)
    if product is None:
        return True
    elsewhere = product.index_fill(axis, torch.tensor([2]), 0.0).abs().max()
    return float(elsewhere) <= 1e-12 * float(product.abs().max())  # zero, but for what cancels


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_axes_hold_for_the_true_hessian(name: str, scalar: str) -> None:
    f, rank = FUNCTIONS[name]
    y, x = (lambda x: SCALARS[scalar](f(x))), point(rank)
    found = summed_axes(y(x), [x], rank)
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel lacks second derivatives
        assert all(holds(y, x, axis) for axis in found)


SUMS: dict[str, tuple[Callable[[Tensor], Tensor], list[int]]] = {
    "of squares": (lambda x: (x**2).sum(), [0, 1]),
    "of a layer": (lambda x: (x @ T).tanh().sum(), [0]),
    "of rows": (lambda x: x.exp().sum(1).sin().mean(), [0]),
    "through a matrix": (lambda x: (T @ x.exp()).sum(), [0, 1]),
    "through a matrix, bent": (lambda x: (T @ x.exp()).sin().sum(), [1]),
    "of two terms": (lambda x: (x @ T).sin().sum() - x.exp().mean() * 2, [0]),
    "of terms along other axes": (lambda x: (x @ T).sin().sum() + (T @ x).cos().sum(), []),
    "through views": (lambda x: x.t().reshape(-1).exp()[3:].sum(), [0, 1]),
    "of a product with one of its parts": (lambda x: (x * x[:, :1]).sum(), [0]),
    "times another": (lambda x: x.exp().sum() * x.sum(), []),
    "over another": (lambda x: x.sum() / x.exp().sum(), []),
    "over a constant": (lambda x: x.exp().sum() / T.sum(), [0, 1]),
    "bent": (lambda x: x.exp().sum().log(), []),
    "of a constant, too": (lambda x: x.exp().sum() + T.exp().sum().log(), [0, 1]),
    "of itself": (lambda x: (x.exp().sum() + x.exp().sum().sin()).squeeze(), []),
    "of a scaled product": (lambda x: torch.addmm(x, x.exp(), T, beta=2.0).sum(), [0, 1]),
    "of a product of both": (lambda x: torch.addmm(T, x, x.exp()).sum(), []),
    "cumulated": (lambda x: x.exp().cumsum(0).sum(), [0, 1]),
    "chosen": (lambda x: torch.where(T > 0.5, x.exp(), x.sin().flip(0)).sum(), [0, 1]),
    "gathered": (lambda x: x.exp().gather(0, PLACES).sum(), [0, 1]),
    "mean square error": (lambda x: F.mse_loss(x @ T, T), [0]),
    "mean square error of two": (lambda x: F.mse_loss(x @ T, x.exp()), [0]),
    "cross entropy": (lambda x: F.cross_entropy(x, PLACES[0]), [0]),
    "cross entropy of a part": (lambda x: F.cross_entropy(x.sum(0, keepdim=True), PLACES[0, :1]), []),
    "nothing": (lambda x: (T + 0 * x.detach()).sum(), []),
}
T = torch.linspace(0.1, 0.9, N * N, dtype=D).view(N, N)
PLACES = torch.tensor([[1, 0, 5, 2, 4, 3]]).expand(N, N)


@pytest.mark.parametrize("name", SUMS)
def test_axes_of_each_sum(name: str) -> None:
    y, expected = SUMS[name]
    x = point(2)
    assert summed_axes(y(x), [x], 2) == expected
    assert all(holds(y, x, axis) for axis in expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nothing_is_said_of_what_goes_through_nested_tensors() -> None:
    x = point(2)
    nested = torch.nested.as_nested_tensor([x[:1], x[1:]])
    y = x.sin().sum() + torch.nested.to_padded_tensor(nested, 0.0).sum() ** 2
    assert summed_axes(y, [x], 2) == []
    assert shared_axes([y.unsqueeze(0) * x], [x], 2) == []


def test_axes_of_several_inputs_run_jointly() -> None:
    x, t = point(1), point(1)
    assert summed_axes((x * t**2).sin().sum(), [x, t], 1) == [0]
    assert summed_axes((x.flip(0) * t**2).sin().sum(), [x, t], 1) == []
    assert summed_axes((x.flip(0) * t**2).sin().sum(), [t], 1) == [0]
    assert summed_axes(x.exp().sum() * t.sum(), [x], 1) == [0]
    assert summed_axes(x.exp().sum() * t.sum(), [x, t], 1) == []


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sin": lambda a, b: a.sin(),
    "scaled": lambda a, b: a * T,
    "product": lambda a, b: a * b,
    "sum": lambda a, b: a - 2 * b,
    "rows": lambda a, b: a @ T,
    "columns": lambda a, b: T @ a,
    "mean of rows": lambda a, b: a.mean(1, keepdim=True) * b,
    "mean of columns": lambda a, b: a.mean(0) + b,
    "softmax": lambda a, b: a.softmax(1),
    "transposed": lambda a, b: a.t(),
    "folded": lambda a, b: a.reshape(2, 3, 6).transpose(0, 1).reshape(6, 6) + b.flip(1),
    "all": lambda a, b: a.sum() * T,
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), st.sampled_from(sorted(SCALARS)))
def test_axes_of_random_programs_hold(steps: list[str], scalar: str) -> None:
    def y(x: Tensor) -> Tensor:
        a, b = x, x
        for step in steps:
            a, b = STEPS[step](a, b), a
        return SCALARS[scalar](a)

    x = point(2)
    assert all(holds(y, x, axis) for axis in summed_axes(y(x), [x], 2))


# ---------------------------------------------------------------------------------------------------------
# through public functions


def small_cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    ).double()


def test_by_images_a_product_for_each_pixel_of_one(pulls: list[int]) -> None:
    """The gradient of a convolution is one, which no rule knows: its own graph showed no batch axis."""
    net, images = small_cnn(), torch.randn(64, 1, 6, 6, dtype=D)
    loss = lambda x: F.mse_loss(net(x), torch.zeros(64, 2, dtype=D), reduction="sum")
    (found,) = diaghessian(loss, images)
    H = torch.func.vmap(torch.func.hessian(lambda x: net(x[None]).square().sum()))(images)
    expected = H.reshape(64, 36, 36).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found.reshape(64, 36), expected)
    assert sum(pulls) <= 1 + 36 + 1


def test_hessian_by_tokens_of_attention() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double()
    tokens = torch.randn(40, 3, 4, dtype=D)
    loss = lambda x: layer(x, x, x, need_weights=False)[0].sin().sum()
    H = hessian(loss, tokens).view(40, 12, 40, 12)
    with sdpa_kernel(SDPBackend.MATH):
        one = torch.func.vmap(torch.func.hessian(lambda x: loss(x[None])))(tokens).view(40, 12, 12)
    torch.testing.assert_close(H.diagonal(dim1=0, dim2=2).permute(2, 0, 1), one)
    assert int(H.count_nonzero()) == int(one.count_nonzero())


def test_by_parameters_that_are_a_batch_themselves() -> None:
    """An embedding, decayed: a sum over its rows."""
    table = torch.randn(300, 4, dtype=D, requires_grad=True)
    loss = lambda: table.softmax(1).square().sum() + (table**4).mean()
    found = diaghessian(loss, Params([table]))[table]
    one = lambda row: row.softmax(0).square().sum() + (row**4).sum() / table.numel()
    expected = torch.func.vmap(torch.func.hessian(one))(table.detach()).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(found, expected)


def test_results_are_differentiable_themselves() -> None:
    net, images = small_cnn(), torch.randn(64, 1, 6, 6, dtype=D)
    curvature = lambda scale: diaghessian(lambda x: net(x * scale).sin().sum(), images)[0].square().sum()
    step = 1e-5
    difference = (curvature(1 + step) - curvature(1 - step)) / (2 * step)
    (found,) = gradient(curvature, torch.tensor(1.0, dtype=D))
    torch.testing.assert_close(found, difference, rtol=1e-7, atol=0)


def test_a_sum_that_a_hook_bends_goes_by_the_gradient_itself() -> None:
    x = torch.randn(200, dtype=D)

    def f(x: Tensor) -> Tensor:
        y = x**3
        y.register_hook(lambda g: g * x.sum())
        return y.sum()

    torch.testing.assert_close(diaghessian(f, x)[0], 6 * x * x.sum() + 3 * x**2)
