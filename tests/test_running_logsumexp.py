"""``torch.logcumsumexp``: PyTorch's derivatives are wrong where cotangents are zero or numbers far apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import save_on_cpu
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
    plan_hessian,
    pushforward,
)

D = torch.float64
LOGCUMSUMEXP = torch.logcumsumexp
WEIGHTS = torch.tensor([[1.0, 2, 0, 1], [0, 1, 1, 1]], dtype=D)  # some are zero: so are cotangents
POINTS = {
    "near": torch.tensor([0.3, -0.5, 0.8, 0.1], dtype=D),
    "far apart": torch.tensor([0.0, 40, 80, -40], dtype=D),
    "equal": torch.zeros(4, dtype=D),
    "falling": torch.tensor([30.0, 10, -10, -90], dtype=D),
}


def plain(x: Tensor, dim: int = -1) -> Tensor:
    """By ``logsumexp``, whose derivatives are right."""
    x = x.movedim(dim, -1)
    y = torch.stack([x[..., : i + 1].logsumexp(-1) for i in range(x.shape[-1])], -1)
    return y.movedim(-1, dim)


def loss(running: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: (WEIGHTS @ running(x, -1)).sin()[0] + running(x, -1)[1] ** 2


WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "hessian": hessian,
    "dual": hessian_dual,
    "reverse": hessian_reverse,
    "sparse": lambda f, x: hessian(f, x, sparse=True).to_dense(),
    "plan": lambda f, x: plan_hessian(f, x)(x).to_dense(),
    "jacobian of gradient": lambda f, x: jacobian(lambda x: gradient(f, x)[0], x)[0],
    "forward jacobian": lambda f, x: jacobian(lambda x: gradient(f, x)[0], x, mode="forward")[0],
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: gradient(f, x)[0])(x),
    "by Params": lambda f, x: torch.diag(diaghessian(lambda: f(x), Params([x]))[x]),
    "under vmap": lambda f, x: torch.func.vmap(lambda x: hessian(f, x))(torch.stack([x, x]))[1],
}


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives(way: str, point: str) -> None:
    x = POINTS[point]
    expected = torch.func.hessian(loss(plain))(x)
    if way == "by Params":
        expected = torch.diag(expected.diagonal())
    torch.testing.assert_close(WAYS[way](loss(torch.logcumsumexp), x), expected)


def test_through_forwarddiff() -> None:
    x = POINTS["near"]
    f = lambda x: forwarddiff(torch.sin, x.logcumsumexp(0))[1]
    torch.testing.assert_close(hessian(f, x), torch.func.hessian(lambda x: plain(x).sin()[1])(x))


@pytest.mark.parametrize("point", POINTS)
def test_pushes(point: str) -> None:
    x, xdot = POINTS[point], torch.tensor([1.0, 0.5, -1, 2], dtype=D)
    for f in (
        lambda x: x.logcumsumexp(dim=0),
        lambda x: torch.logcumsumexp(x.expand(2, 4), 1),
        lambda x: torch.logcumsumexp(input=x.reshape(2, 2), dim=0),
    ):
        J = torch.autograd.functional.jacobian(f, x)  # the first derivative is right in reverse mode
        torch.testing.assert_close(pushforward(f, x)(xdot), J @ xdot)
        torch.testing.assert_close(jacobian(f, x, mode="forward")[0], J.reshape(-1, 4))
        forward = jacobian(lambda x: forwarddiff(f, x), x)[0]
        torch.testing.assert_close(forward, J.reshape(-1, 4))


@given(
    st.sampled_from([(1,), (5,), (8,), (3, 4), (4, 1), (2, 3, 9)]),
    st.integers(-3, 2),
    st.floats(0.0, 60.0),
    st.integers(0, 2**31),
)
def test_all_shapes(shape: tuple[int, ...], dim: int, spread: float, seed: int) -> None:
    dim = max(-len(shape), min(dim, len(shape) - 1))
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(shape, dtype=D, generator=generator)
    weights = torch.randint(-1, 2, shape, generator=generator).to(D)
    theirs = lambda x: (weights * plain(x, dim)).sin().sum()
    ours = lambda x: (weights * x.logcumsumexp(dim)).sin().sum()
    expected = torch.func.jacrev(torch.func.grad(theirs))(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(hessian(ours, x), expected)
    torch.testing.assert_close(hessian_dual(ours, x), expected)


def test_third_derivatives() -> None:
    x = POINTS["near"]
    total = lambda f, h: lambda x: (h(f, x) * torch.arange(16.0, dtype=D).reshape(4, 4)).sum()
    expected = torch.func.grad(total(loss(plain), lambda f, x: torch.func.hessian(f)(x)))(x)
    for h in (hessian, hessian_dual):
        torch.testing.assert_close(gradient(total(loss(torch.logcumsumexp), h), x)[0], expected)


def test_what_is_minus_infinity_counts_for_nothing() -> None:
    x = torch.tensor([-torch.inf, 0.3, -torch.inf, 1.0], dtype=D)
    xdot = torch.ones(4, dtype=D)
    found = pushforward(lambda x: x.logcumsumexp(0), x)(xdot)
    assert found.tolist() == pytest.approx([0, 1, 1, 1])
    later = torch.tensor([0.5, -torch.inf, 0.3], dtype=D)
    f = lambda x: (x.logcumsumexp(0) * WEIGHTS[0, :3]).sin().sum()
    kept = hessian(f, later)[[0, 0, 2, 2], [0, 2, 0, 2]].reshape(2, 2)
    without = lambda z: (torch.stack([z[0], z[0], z.logsumexp(0)]) * WEIGHTS[0, :3]).sin().sum()
    torch.testing.assert_close(kept, torch.func.hessian(without)(later[[0, 2]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 3, 5, -4]).to(dtype)
    found = pushforward(lambda x: x.logcumsumexp(0), x)(torch.ones(4, dtype=dtype))
    assert found.dtype is dtype
    assert found.tolist() == pytest.approx([1] * 4, rel=0.02)
    H = hessian(lambda x: loss(torch.logcumsumexp)(x.double()), x.float())
    torch.testing.assert_close(H, torch.func.hessian(loss(plain))(x.double()).float(), rtol=1e-4, atol=1e-4)


def test_infinity_stays_where_it_is() -> None:
    x = torch.tensor([0.0, torch.inf, 1.0], dtype=D)
    plainly = gradient(lambda x: x.logcumsumexp(0)[0], x)[0]
    recorded = gradient(lambda x: x.logcumsumexp(0)[0], x, create_graph=True)[0]
    torch.testing.assert_close(recorded.detach(), plainly, equal_nan=True)


def by_pytorch(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(f, x, use_reentrant=False)


def by_this_package(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpointed(f, x)


@pytest.mark.parametrize("around", [by_pytorch, by_this_package])
def test_inside_checkpoints(around: Any) -> None:
    """They show what they saved once: right where no cotangent is zero, and refused where one is."""
    x = POINTS["near"]
    whole = lambda x: x.logcumsumexp(0).sin().sum()
    expected = torch.func.hessian(lambda x: plain(x).sin().sum())(x)
    for h in (hessian, hessian_reverse):
        torch.testing.assert_close(h(around(whole), x), expected)
    with pytest.raises(RuntimeError, match="leave logcumsumexp out of the checkpoint"):
        hessian_reverse(around(loss(torch.logcumsumexp)), x)


def test_checkpointed_in_forward_mode() -> None:
    x = POINTS["far apart"]
    f = by_this_package(loss(torch.logcumsumexp))
    torch.testing.assert_close(hessian_dual(f, x), torch.func.hessian(loss(plain))(x))


def test_saved_on_the_cpu() -> None:
    def f(x: Tensor) -> Tensor:
        with save_on_cpu():
            return loss(torch.logcumsumexp)(x)

    x = POINTS["near"]
    torch.testing.assert_close(hessian(f, x), torch.func.hessian(loss(plain))(x))


def test_scalars_and_mistakes() -> None:
    assert hessian(lambda x: x.logcumsumexp(0) ** 2, torch.tensor(3.0)).item() == 2
    assert pushforward(lambda x: x.logcumsumexp(0), torch.tensor(2.0))(torch.tensor(4.0)).item() == 4
    with pytest.raises(IndexError, match="Dimension out of range"):
        pushforward(lambda x: x.logcumsumexp(2), torch.zeros(3))(torch.zeros(3))


def test_compiled() -> None:
    """By the function; the tracer shows nobody a method."""
    x = POINTS["near"]
    f = loss(lambda x, dim: torch.logcumsumexp(x, dim))
    ways: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda x: hessian(f, x),
        lambda x: pushforward(lambda x: torch.logcumsumexp(x, 0), 50 * x)(x),
    )
    for derivative in ways:
        compiled = torch.compile(derivative, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), derivative(x))
    assert torch.logcumsumexp is LOGCUMSUMEXP
