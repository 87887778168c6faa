"""Stencils that are read off the recorded graph: their patterns, and dense matrices made by them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from stencil_cases import ONE, SUMS, VALUES, ZERO, D, X, programs
from torch import Tensor

from torchzygote import _stencil_sums, _structure_heuristics, diaghessian, jacobian, withhessian
from torchzygote._recorded.stencils import stencil
from torchzygote.sparsity.pattern import Pattern

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


@pytest.fixture
def by_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is summed up along the graph, which takes no products."""
    monkeypatch.setattr(_stencil_sums, "_attempt", lambda way: None)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize(
    "name", ["three neighbors", "around", "on a torus", "with borders", "padded", "upwind"]
)
def test_jacobians_take_a_product_for_each_color(name: str, dtype: torch.dtype, rows: list[int]) -> None:
    f, x = VALUES[name][0], X.to(dtype)
    (J,) = jacobian(f, x)
    torch.testing.assert_close(J, torch.func.jacrev(f)(x).reshape(-1, 42))
    assert sum(rows) <= 12  # colors, and the check


@pytest.mark.usefixtures("by_colors")
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


@pytest.mark.usefixtures("by_colors")
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
