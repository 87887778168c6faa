"""Convolutions and transposed ones by input and weights, and their gradients: exactly what is nonzero."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detection import detect_hessian, detect_jacobian
from torch import Tensor

from torchzygote import plan_jacobian

CASES = {
    "1d": (1, False, {}),
    "1d, stride 2, padded": (1, False, {"stride": 2, "padding": 1}),
    "1d, dilated, padded": (1, False, {"dilation": 2, "padding": 2}),
    "2d, padded, grouped": (2, False, {"padding": 1, "groups": 2}),
    "2d, more padding than kernel": (2, False, {"padding": (3, 1)}),
    "3d, stride 2": (3, False, {"stride": 2, "padding": 1}),
    "transposed 1d, stride 3": (1, True, {"stride": 3}),
    "transposed 1d, stride 2, dilated": (1, True, {"stride": 2, "dilation": 2}),
    "transposed 2d, stride 2": (2, True, {"stride": 2}),
    "transposed 2d, grouped, padded on one side": (
        2,
        True,
        {"stride": 2, "groups": 2, "padding": 1, "output_padding": 1},
    ),
    "transposed 3d, stride 2": (3, True, {"stride": 2}),
}
SIZES = {1: (6,), 2: (4, 3), 3: (3, 2, 3)}


def case(name: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The convolution, with its input of two samples, weight and bias."""
    depth, transposed, how = CASES[name]
    op: Any = getattr(F, f"conv_transpose{depth}d" if transposed else f"conv{depth}d")
    groups = how.get("groups", 1)
    kernel = (2,) * depth if transposed else (3, 2, 2)[:depth]
    channels = (4, 2) if transposed else (2, 4 // groups)
    sizes = [(2, 4, *SIZES[depth]), (*channels, *kernel), (2 * groups if transposed else 2,)]
    return lambda x, w, b: op(x, w, b, **how), points(sizes, 0)


def points(sizes: list[Any], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(size), generator=generator, dtype=torch.float64) for size in sizes]


def nonzero(f: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Of dense Jacobians at a few points."""
    found = [torch.zeros(())] * len(inputs)
    for seed in range(2):
        at = points([x.shape for x in inputs], seed)
        Js = torch.autograd.functional.jacobian(f, tuple(at))
        found = [a + J.reshape(-1, x.numel()).abs() for a, J, x in zip(found, Js, at, strict=True)]
    return [a != 0 for a in found]


def check(f: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """By all inputs at once, and by each beside constants."""
    expected = nonzero(f, inputs)
    together = detect_jacobian(f, inputs)
    for i, (pattern, true) in enumerate(zip(together, expected, strict=True)):
        before, after = inputs[:i], inputs[i + 1 :]
        (alone,) = detect_jacobian(lambda x, a=before, b=after: f(*a, x, *b), [inputs[i]])
        for found in (pattern, alone):
            assert not found.unknown
            assert torch.equal(found.to_dense(), true)


@pytest.mark.parametrize("name", CASES)
def test_values(name: str) -> None:
    check(*case(name))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients(name: str, which: int) -> None:
    """As functions of what they are multiplied with, by what is pulled back too."""
    f, inputs = case(name)
    pulled = torch.randn_like(f(*inputs))

    def gradient(g: Tensor, *others: Tensor) -> Tensor:
        xs = list(others)
        xs.insert(which, inputs[which].clone().requires_grad_())
        with torch.enable_grad():
            return torch.autograd.grad(f(*xs), xs[which], g, create_graph=True)[0]

    others = [x for i, x in enumerate(inputs) if i != which]
    check(gradient, [pulled, *others])


@pytest.mark.parametrize("name", [*CASES][::2])
@pytest.mark.parametrize("squared", [False, True])
def test_hessians_by_input_and_weight_hold_all_that_is_nonzero(name: str, squared: bool) -> None:
    f, (x, w, b) = case(name)
    c = torch.randn_like(f(x, w, b))

    def loss(z: Tensor) -> Tensor:
        first, second = z[: x.numel()].view(x.shape), z[x.numel() :].view(w.shape)
        y = f(first, second, b) * c
        if not squared:
            return y.sum()
        gradients = torch.autograd.grad((y**2).sum(), (first, second), create_graph=True)
        return sum(g.sum() for g in gradients)

    z = torch.cat([x.reshape(-1), w.reshape(-1)]).requires_grad_()
    (pattern,) = detect_hessian(loss, [z])
    assert not pattern.unknown
    true = torch.autograd.functional.hessian(loss, z) != 0
    assert not bool((true & ~pattern.to_dense()).any())


def test_few_colors() -> None:
    x, w = points([(1, 3, 5, 5), (3, 4, 2, 2)], 0)
    plan = plan_jacobian(lambda w: F.conv_transpose2d(x, w, stride=2), w)
    assert (plan.patterns[0].nnz, plan.ncolors) == (1200, 3)


def test_channels_of_gradients_stay_apart() -> None:
    """A weight's gradient has to do with its own channels only."""
    x, w, g = points([(2, 3, 6), (4, 3, 3), (2, 4, 4)], 0)

    def gradient(g: Tensor) -> Tensor:
        leaf = w.clone().requires_grad_()
        with torch.enable_grad():
            return torch.autograd.grad(F.conv1d(x, leaf), leaf, g, create_graph=True)[0]

    dense = detect_jacobian(gradient, [g])[0].to_dense().view(4, 9, 2, 4, 4)
    for i, j in itertools.product(range(4), range(4)):
        assert bool((dense[i, :, :, j] == (i == j)).all())
