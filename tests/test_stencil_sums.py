"""Hessians of sums over a grid and their diagonals, by distances, without any product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import ACTIVATIONS, ONE
from hypothesis import given
from hypothesis import strategies as st
from stencil_cases import SUMS, VALUES, ZERO, C, D, X, programs, rosenbrock
from torch import Tensor

import torchzygote as tz
from torchzygote import diaghessian, hessian, withhessian
from torchzygote._curvature import stencil_program

pytestmark = pytest.mark.usefixtures("grids_read_at_once")


def shared(x: Tensor) -> Tensor:
    """Of what the sums take, other operations take some, too."""
    h = x.exp()
    d = h[1:] - h[:-1]
    return h.sum() + 2 * d.mean() - (3 * h[1:]).sum() / 7 + (d * d).sum() + d.sum() + x.sum() * 0.5


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: f for name, (f, _) in SUMS.items()},
    **{
        f"squares of {name}": (lambda x, f=f: f(x).square().sum())
        for name, (f, _) in VALUES.items()
        if name != "a limiter"  # maximum() has no rule where both vary
    },
    "rosenbrock": rosenbrock,
    "shared": shared,
    "each by itself": lambda x: (x.sin() * x).sum(),
    "in another shape": lambda x: (x.view(6, 7) ** 3).mean(),
    "quotients": lambda x: (x[1:] / x[:-1] - 2 / x[1:]).sum(),
    "a quotient by itself": lambda x: (x / (1 + x * x)).roll(3).cos().sum(),
    "times constants": lambda x: (C[1:] * x[1:] * x[:-1] / C[:-1].exp()).sum() * 3,
    "chosen": lambda x: torch.where(C > 0, x.exp(), x.roll(1) ** 2).sum(),
    "masked": lambda x: (x.masked_fill(C > 0, 2.0) * x.roll(1)).sum(),
    "without curvature": lambda x: x.diff().abs().sum() + x.diff().relu().sum(),
    "linear": lambda x: (3 * x[1:] - x[:-1]).sum(),
    "some of both": lambda x: x.diff().abs().sum() + (x[1:] * x[:-1]).tanh().sum(),
    "activations": lambda x: (x.diff().sigmoid() * F.softplus(x[1:])).sum() + F.gelu(x.diff() * 3).sum(),
    "powers": lambda x: (x.roll(1) ** 3 * x**0.5 + 2**x).sum(),
    "powers by a tensor": lambda x: (x.roll(2) ** C * x).sum(),
    "from a number": lambda x: (1 - x.roll(1)).sub(x, alpha=2).square().sum(),
    "rsub": lambda x: torch.rsub(x, x.roll(-1), alpha=3).square().sum(),
    "joined": lambda x: (torch.cat([x[:1].exp(), ZERO, x[2:] * x[:-2], x[-1:]]) ** 2).sum(),
    "joined twice": lambda x: (torch.cat([x, x.sin()]) ** 2).sum(),
    "rolled and cut": lambda x: (x.roll(5)[3:-2] * x[4:-1]).exp().sum(),
    "a matrix, rolled both ways": lambda x: (x.view(6, 7).roll((1, -2), (0, 1)) * x.view(6, 7)).sin().sum(),
    "moved all around": lambda x: (x.roll(21) * x).sum() + (x.roll(42) * x).sin().sum(),
    "three axes": lambda x: (x.view(2, 3, 7)[:, 1:] * x.view(2, 3, 7)[:, :-1] ** 2).sum(),
    "padded with numbers": lambda x: (F.pad(x, (1, 1), value=3.0)[2:] * x.exp()).sum(),
    "in float64 constants": lambda x: (x[1:] * torch.ones(41, dtype=D) * x[:-1]).sum(),
    "terms of weights that vary": lambda x: (x[1:] ** 2).sum() / 3 - (x[:-1].sin() * x[1:]).mean() * 2.5,
}
# Where two distances lead to one element, tangents times themselves are not all of the diagonal.
MEETING = ("moved all around", "squares of the same place twice")
# Not seen as such a sum, but no less right.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "the gradient of a sum": lambda x: (tz.gradient(rosenbrock, x)[0] * C).sum(),
    "a product of sums": lambda x: (x[1:] ** 2).sum() * x.sin().sum(),
    "a root of a sum": lambda x: (x.diff() ** 2).sum().sqrt(),
    "partial sums": lambda x: (x.view(6, 7) ** 2).sum(1).exp().sum(),
    "a sum inside": lambda x: (x * x.sum()).sin().sum(),
    "every other one": lambda x: (x[::2] * x[1::2]).exp().sum(),
    "mirrored": lambda x: (x.flip(0) * x).sum(),
    "a repeated element": lambda x: (x[:1] * x).sin().sum(),
    "two dtypes": lambda x: (x.float()[1:] * x.float()[:-1]).double().sin().sum(),
    "a matrix": lambda x: ((torch.eye(42, dtype=D) + 1) @ x).square().sum(),
    "the larger ones": lambda x: torch.maximum(x[1:] ** 2, x[:-1] ** 3).sum(),
    "all of all": lambda x: sum((x.roll(i) for i in range(42)), x).sin().sum(),
    "nothing": lambda x: torch.ones(3, dtype=D).sum(),
    "an element": lambda x: x[3].exp(),
    "random": lambda x: (F.dropout(x[1:] * x[:-1], 0.5) ** 2).sum(),
}


def check(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Against nested reverse mode, twice: once read, once recognized."""
    for point in (x, x.flip(0)):
        before = point.clone()
        expected = torch.func.jacrev(torch.func.grad(f))(point).reshape(x.numel(), x.numel())
        val, grad, H = withhessian(f, point)
        torch.testing.assert_close(H, expected)
        torch.testing.assert_close(val, f(point))
        torch.testing.assert_close(grad, torch.func.grad(f)(point))
        assert [one.requires_grad for one in (val, grad, H)] == [False] * 3
        assert H.is_contiguous()
        torch.testing.assert_close(hessian(f, point), expected)
        (h,) = diaghessian(f, point)
        torch.testing.assert_close(h, expected.diagonal().reshape(x.shape))
        assert torch.equal(point, before)


@pytest.mark.parametrize("name", TAKEN)
def test_without_any_product(name: str, grids_taken: list[bool], chunks: list[int]) -> None:
    check(TAKEN[name], X)
    if name in MEETING:
        assert grids_taken == [True, True, False] * 2
        return
    assert grids_taken == [True] * len(grids_taken) != []
    assert chunks == []


@pytest.mark.parametrize("name", [*ONE, *ACTIVATIONS])
def test_functions_of_one_element(name: str, chunks: list[int]) -> None:
    act = getattr(F, name) if name in ACTIVATIONS else getattr(torch, name)
    check(lambda x: (act(0.3 * x[1:] + 0.2 * x[:-1]) * x[1:]).sum() + act(x.roll(1) * 0.4).mean(), X)
    assert chunks == []


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "random"])
def test_what_is_not_seen_as_a_sum_goes_other_ways(name: str, grids_taken: list[bool]) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "two dtypes" else {}
    f = OTHERS[name]
    if name == "nothing":
        assert torch.equal(hessian(f, X), torch.zeros(42, 42, dtype=D))
    else:
        torch.testing.assert_close(hessian(f, X), torch.func.hessian(f)(X), **tolerance)  # type: ignore[arg-type]
    assert True not in grids_taken


def test_random_functions_are_drawn_once() -> None:
    torch.manual_seed(0)
    H = hessian(OTHERS["random"], X)
    torch.manual_seed(0)
    mask = F.dropout(torch.ones(41, dtype=D), 0.5)
    torch.testing.assert_close(H, torch.func.hessian(lambda x: ((x[1:] * x[:-1] * mask) ** 2).sum())(X))


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("shape", [(42,), (6, 7), (2, 3, 7)])
def test_arguments_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, grids_taken: list[bool]) -> None:
    x = X.to(dtype).reshape(shape)
    f = lambda x: ((x[1:] - x[:-1]) ** 2).sum() + (x.roll(1, -1) * x).sin().mean()
    check(f, x)
    assert False not in grids_taken


def test_half_precision_goes_other_ways(grids_taken: list[bool]) -> None:
    x = X.to(torch.bfloat16)
    torch.testing.assert_close(hessian(rosenbrock, x), torch.func.hessian(rosenbrock)(x))
    assert True not in grids_taken


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_short_ones(n: int) -> None:
    x = X[:n]
    for f in (
        lambda x: (x.roll(1) * x).sin().sum(),
        lambda x: (x[1:] * x[:-1]).exp().sum(),
        lambda x: (x.roll(1) * x.roll(2) * x.roll(-1)).sum(),
        lambda x: (F.pad(x, (2, 2)) ** 2).sum(),
    ):
        torch.testing.assert_close(hessian(f, x), torch.func.hessian(f)(x))
        torch.testing.assert_close(diaghessian(f, x)[0], torch.func.hessian(f)(x).diagonal())


def test_no_elements() -> None:
    assert hessian(lambda x: (x.roll(1) * x).sum(), torch.ones(0)).shape == (0, 0)


def test_one_backward_pass_and_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchzygote._curvature import stencil_hessians

    runs: list[Tensor] = []
    passes: list[bool] = []
    original = stencil_hessians.pull_back

    def counted(*args: Any) -> Any:
        passes.append(args[-1])
        return original(*args)

    def f(x: Tensor) -> Tensor:
        runs.append(x)
        return rosenbrock(x)

    monkeypatch.setattr(stencil_hessians, "pull_back", counted)
    withhessian(f, X)
    assert len(runs) == 1
    assert passes == [False]  # no graph of the gradient


# ---- graphs that look the same -----------------------------------------------------------------------------

# Pairs that differ in what only the nodes of the graph know
ALIKE: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "exponents": tuple(lambda x, p=p: (x.diff() ** p).sum() for p in (2, 3, 1, 4.0)),
    "weights": tuple(lambda x, a=a: x[1:].sub(x[:-1], alpha=a).exp().sum() for a in (1, 2, -1)),
    "weights of sums": tuple(lambda x, a=a: x[1:].add(x[:-1], alpha=a).exp().sum() for a in (1, 2, -1)),
    "from": tuple(lambda x, a=a: torch.rsub(x[1:], x[:-1], alpha=a).exp().sum() for a in (1, 2)),
    "shifts": tuple(lambda x, s=s: (x.roll(s) * x).sin().sum() for s in (1, 2, -1, 0)),
    "axes": tuple(lambda x, d=d: (x.view(6, 7).roll(1, d) * x.view(6, 7)).sin().sum() for d in (0, 1)),
    "slices": tuple(lambda x, i=i: (x[i : i + 30] * x[12:]).sin().sum() for i in (0, 1, 5)),
    "sliced axes": (
        lambda x: (x.view(6, 7)[1:, 1:] * x.view(6, 7)[:-1, :-1]).sum(),
        lambda x: (x.view(6, 7)[1:, :-1] * x.view(6, 7)[:-1, 1:]).sum(),
    ),
    "pads": tuple(lambda x, a=a: (F.pad(x, (a, 3 - a))[:42] * x).sin().sum() for a in (0, 1, 2, 3)),
    "orders": (
        lambda x: (torch.cat([x[:1], x[1:].exp()]) * x).sum(),
        lambda x: (torch.cat([x[1:].exp(), x[:1]]) * x).sum(),
    ),
    "joined axes": (
        lambda x: (torch.cat([x.view(6, 7)[:3], x.view(6, 7)[3:].exp()], 0) ** 2).sum(),
        lambda x: (torch.cat([x.view(6, 7)[:, :3], x.view(6, 7)[:, 3:].exp()], 1) ** 2).sum(),
    ),
    "sums": (lambda x: (x.diff() ** 2).sum(), lambda x: (x.diff() ** 2).mean()),
    "which is which": (
        lambda x: (x[1:] / x[:-1]).sum(),
        lambda x: (x[:-1] / x[1:]).sum(),
    ),
    "constants": tuple(lambda x, c=c: ((x.diff() * c) ** 2).sum() for c in (2.0, C[1:], C[:1])),
    "minus": (lambda x: x.diff().exp().sum() - x.exp().sum(), lambda x: x.exp().sum() - x.diff().exp().sum()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_graphs_that_look_alike_are_told_apart(name: str) -> None:
    for _ in range(2):
        for f in ALIKE[name]:
            torch.testing.assert_close(hessian(f, X), torch.func.hessian(f)(X))
            torch.testing.assert_close(diaghessian(f, X)[0], torch.func.hessian(f)(X).diagonal())


def test_dtypes_and_sizes_are_told_apart() -> None:
    for x in (X, X.float(), X[:20], X.view(6, 7), X.view(7, 6), X.view(42, 1)):
        f = lambda x: (x.diff(dim=0) ** 3).sum()
        H = hessian(f, x)
        assert H.dtype == x.dtype
        torch.testing.assert_close(H, torch.func.hessian(f)(x).reshape(H.shape))


def test_few_programs_are_kept_and_no_large_ones() -> None:
    for i in range(100):
        hessian(lambda x, i=i: (x.roll(i) * x).sum(), X)
    assert len(stencil_program._programs) <= 32
    stencil_program._programs.clear()
    diaghessian(lambda x: (x[1:] * x[:-1]).exp().sum(), torch.rand(1 << 16))
    assert not stencil_program._programs
    x = torch.rand(8)
    for _ in range(3):
        diaghessian(lambda x: F.pad(x, (0, 200_000)).square().sum(), x)  # large inside
    assert not stencil_program._programs


def test_what_is_kept_is_not_given_away() -> None:
    """Nobody can write into it."""
    for f in (lambda x: (x.diff() ** 2).sum(), lambda x: (x * x).sum(), lambda x: x.diff().sum()):
        first = hessian(f, X)
        expected = first.clone()
        first.fill_(7)
        diaghessian(f, X)[0].fill_(7)
        withhessian(f, X).grad.fill_(7)
        assert torch.equal(hessian(f, X), expected)
        assert torch.equal(diaghessian(f, X)[0], expected.diagonal())


# ---- random sums -------------------------------------------------------------------------------------------


@given(programs(), programs(), st.integers(0, 3))
def test_random_programs(f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], which: int) -> None:
    def total(x: Tensor) -> Tensor:
        u, v = f(x), g(x)
        if which == 0:
            return u.sum() + v.square().mean()
        if which == 1:
            return (u * v).sum()
        if which == 2:
            return (u.sin() / (2 + v * v)).sum() - u.sum() * 3
        return (u - v).square().sum() + u.exp().mean() - (2 * u).sum()

    expected = torch.func.hessian(total)(X)
    torch.testing.assert_close(hessian(total, X), expected)
    torch.testing.assert_close(diaghessian(total, X)[0], expected.diagonal())
