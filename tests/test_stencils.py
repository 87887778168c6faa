"""Stencils that are read off the recorded graph: their patterns, and dense matrices made by them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchzygote import _structure_heuristics, diaghessian, jacobian, withhessian
from torchzygote._recorded.stencils import stencil
from torchzygote.sparsity.pattern import Pattern

D = torch.float64
X = torch.linspace(0.3, 1.9, 42, dtype=D)
ZERO, ONE = torch.zeros(1, dtype=D), torch.ones(1, dtype=D)


def on_torus(x: Tensor) -> Tensor:
    u = x.view(6, 7)
    return ((u.roll(1, 0) + u.roll(-1, 0) + u.roll(1, 1) + u.roll(-1, -1) - 4 * u) * u.exp()).reshape(-1)


def with_borders(x: Tensor) -> Tensor:
    u = F.pad(x.view(6, 7), (1, 1, 1, 1))
    return (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]).sin().reshape(-1)


def burgers(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x - 0.1 * x * (x.roll(-1) - x.roll(1)) + 0.1 * (x.roll(1) - 2 * x + x.roll(-1))
    return x


# the function, and how many entries its Jacobian has
VALUES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "neighbors": (lambda x: x[1:] * x[:-1].sin(), 82),
    "three neighbors": (lambda x: x[2:] - x[1:-1] * x[:-2], 120),
    "differences of differences": (lambda x: x.diff().square().diff(), 120),
    "around": (lambda x: x.roll(1) * (x.roll(-1) - x.roll(2)) - x.sin(), 168),
    "around, far": (lambda x: x.roll(40) * x.roll(-43), 84),
    "the same place twice": (lambda x: x.roll(20) * x.roll(-22), 42),
    "padded": (lambda x: F.pad(x, (2, 1)) * F.pad(x, (1, 2)).exp(), 84),
    "cut": (lambda x: F.pad(x, (-1, -2)), 39),
    "borders": (lambda x: torch.cat([x[:1], x[1:].square()]) * torch.cat([x, ONE])[:-1], 42),
    "a border of unknown size": (lambda x: torch.cat([ZERO, x]) * torch.cat([x, ONE]), 84),
    "upwind": (lambda x: torch.where(x[1:] > 1, x[1:] - x[:-1], x[:-1] ** 2), 82),
    "a limiter": (lambda x: torch.maximum(x[2:] - x[1:-1], x[1:-1] - x[:-2]).clamp(min=0.01), 120),
    "on a torus": (on_torus, 210),
    "with borders": (with_borders, 184),
    "time steps": (burgers, 42 * 7),
    "a grid in a row and back": (lambda x: (x.view(6, 7)[1:] * x.view(6, 7)[:-1]).sin(), 70),
    "from a row": (lambda x: (x.view(6, 7).roll(1, 0).reshape(-1) * x).view(6, 7).roll(1, 1), 84),
}
SUMS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "rosenbrock": (lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), 124),
    "bending": (lambda x: x.diff().diff().square().sum() + x.exp().mean(), 204),
    "a field": (
        lambda x: (x.view(6, 7).diff(dim=0) ** 4).sum() + x.view(6, 7).diff(dim=1).cos().sum(),
        42 + 2 * (35 + 36),
    ),
    "around": (lambda x: (x * x.roll(1)).sin().sum(), 126),
    "two terms of other weights": (lambda x: (x[1:] * x[:-1]).sum() * 3 - x.log().sum(), 124),
}
NOT_READ: dict[str, Callable[[Tensor], Tensor]] = {
    "each by itself": lambda x: x.sin() * x,
    "in another shape": lambda x: (x.view(6, 7) * x.view(6, 7).cos()).view(3, 14),
    "an empty piece beside a matrix": lambda x: torch.cat([x[:0], torch.ones(4, 3, dtype=D)]) * 2,
    "a quarter of all": lambda x: sum((x.roll(i) for i in range(11)), x).sin(),
    "a sum": lambda x: x * x.sum(),
    "a mean in a shape": lambda x: x.view(6, 7) - x.view(6, 7).mean(0, keepdim=True),
    "every other one": lambda x: x[::2],
    "mirrored": lambda x: x.flip(0) * x,
    "two grids": lambda x: x.view(6, 7).roll(1, 0).reshape(-1) * x.view(7, 6).roll(1, 0).reshape(-1),
    "a row of a grid": lambda x: x.view(6, 7)[:, 1:].reshape(-1)[1:],
    "around a part": lambda x: x[1:].roll(1),
    "borders of unknown sizes": lambda x: torch.cat([ZERO, x, ONE])[1:-1],
    "gathered": lambda x: x[torch.arange(41, -1, -1)],
    "most of all": lambda x: sum((x.roll(i) for i in range(30)), x).sin(),
    "nothing": lambda x: torch.ones(42, dtype=D) * x.detach(),
    "a matrix": lambda x: torch.eye(42, dtype=D) @ x,
    "a repeated element": lambda x: x[:1] * x,
}


def recorded(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    x = X.clone().requires_grad_()
    return f(x), x


def check(pattern: Pattern | None, J: Tensor, entries: int) -> None:
    """Everything that isn't zero is listed, and so many entries are."""
    assert pattern is not None
    listed = pattern.to_dense()
    assert listed.shape == J.shape
    assert bool((listed | (J == 0)).all())
    assert pattern.nnz == entries == int(listed.sum())


@pytest.mark.parametrize("name", VALUES)
def test_patterns_of_values(name: str) -> None:
    f, entries = VALUES[name]
    check(stencil(*recorded(f)), torch.func.jacrev(f)(X).reshape(-1, 42), entries)


@pytest.mark.parametrize("name", SUMS)
def test_patterns_of_gradients(name: str) -> None:
    f, entries = SUMS[name]
    y, x = recorded(f)
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    check(stencil(g, x), torch.func.hessian(f)(X), entries)


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_not_read(name: str) -> None:
    assert stencil(*recorded(NOT_READ[name])) is None


def test_a_matrix_of_two_axes() -> None:
    x = X.view(6, 7).clone().requires_grad_()
    f = lambda x: x[1:, 1:] * x[:-1, :-1]
    check(stencil(f(x), x), torch.func.jacrev(f)(X.view(6, 7)).reshape(30, 42), 60)


@st.composite
def programs(draw: st.DrawFn) -> Callable[[Tensor], Tensor]:
    """Random moves and products of values of one length, on a line or a grid."""
    shape = draw(st.sampled_from([(42,), (6, 7), (2, 3, 7)]))
    steps = draw(
        st.lists(st.tuples(st.sampled_from("rspcmd"), st.integers(0, 2), st.integers(-3, 3)), max_size=7)
    )

    def cut(u: Tensor, axis: int, by: int) -> Tensor:
        """Moved, with zeros where nothing comes from."""
        n = u.shape[axis]
        by = max(-n, min(n, by))
        part = u.narrow(axis, max(0, -by), n - abs(by))
        pad = [0, 0] * (u.dim() - 1 - axis) + [max(0, by), max(0, -by)]
        return F.pad(part, pad)

    def run(x: Tensor) -> Tensor:
        u = first = x.view(shape)
        for what, axis, by in steps:
            axis %= len(shape)
            if what == "r":
                u = u.roll(by, axis)
            elif what == "s":
                u = cut(u, axis, by)
            elif what == "p":
                u = u * cut(first, axis, -by)
            elif what == "c":
                size = min(abs(by), u.shape[axis])
                parts = u.split([size, u.shape[axis] - size], axis)
                u = torch.cat([u.narrow(axis, size, u.shape[axis] - size).sin(), parts[0]], axis)
            elif what == "m":
                u = u.sin() + first
            else:
                u = u.reshape(-1).view(shape) - u.roll(by, axis)
        return u.reshape(-1)

    return run


@given(programs())
def test_random_programs(f: Callable[[Tensor], Tensor]) -> None:
    pattern = stencil(*recorded(f))
    if pattern is not None:
        J = torch.func.jacrev(f)(X)
        assert bool((pattern.to_dense() | (J == 0)).all())


# ---- dense matrices by them --------------------------------------------------------------------------------


@pytest.fixture
def rows(chunks: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch of products; the stencil is looked for however small the problem is."""
    monkeypatch.setattr(_structure_heuristics, "_WORTH_READING", 0)
    monkeypatch.setattr(_structure_heuristics, "_WORTH_READING_NODE", 0)
    return chunks


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize(
    "name", ["three neighbors", "around", "on a torus", "with borders", "padded", "upwind"]
)
def test_jacobians_take_a_product_for_each_color(name: str, dtype: torch.dtype, rows: list[int]) -> None:
    f, x = VALUES[name][0], X.to(dtype)
    (J,) = jacobian(f, x)
    torch.testing.assert_close(J, torch.func.jacrev(f)(x).reshape(-1, 42))
    assert sum(rows) <= 12  # colors, and the check


@pytest.mark.parametrize("name", SUMS)
def test_hessians_take_a_product_for_each_color(
    name: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)
    f = SUMS[name][0]
    val, grad, H = withhessian(f, X)
    torch.testing.assert_close(val, f(X))
    torch.testing.assert_close(grad, torch.func.grad(f)(X))
    torch.testing.assert_close(H, torch.func.hessian(f)(X))
    assert sum(rows) <= 12


@pytest.mark.parametrize("name", SUMS)
def test_diagonals_take_a_product_for_each_color(name: str, rows: list[int]) -> None:
    f = SUMS[name][0]
    torch.testing.assert_close(diaghessian(f, X)[0], torch.func.hessian(f)(X).diagonal())
    assert sum(rows) <= 12


def test_results_are_differentiable(rows: list[int]) -> None:
    f = VALUES["three neighbors"][0]
    x = X.clone().requires_grad_()
    jacobian(f, x, create_graph=True)[0].square().sum().backward()
    expected = torch.func.grad(lambda x: torch.func.jacrev(f)(x).square().sum())(X)
    torch.testing.assert_close(x.grad, expected)


def test_a_wrong_rule_is_noticed(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    f = VALUES["three neighbors"][0]
    diagonal = Pattern.from_dense(torch.eye(40, 42))
    monkeypatch.setattr(_structure_heuristics, "stencil", lambda root, x: diagonal)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        (J,) = jacobian(f, X)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X))


def test_hooks_bend_what_is_pulled_back(rows: list[int]) -> None:
    def f(x: Tensor) -> Tensor:
        y = x[1:] * x[:-1]
        y.register_hook(lambda g: g.clamp(max=0.5))
        return y

    (J,) = jacobian(f, X)
    torch.testing.assert_close(J, torch.func.jacrev(lambda x: x[1:] * x[:-1])(X) * 0.5)
