"""Forward mode by the recorded pullback, at the edges of functions: as dual numbers have it, silently."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from noted_calls import noted_calls
from torch import Tensor

from torchzygote import Params, _engine, checkpointed, jacobian, plan_jacobian

nan = torch.nan


def of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Where the derivative of the backward by its cotangent is masked, or 0/0, and f has a derivative, or an
# infinite one; and beside NaN. All are diagonal, but for NaN times zero, for which there are no entries.
EDGES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "xlogy of a constant": (lambda x: torch.xlogy(x, of(0, 0.5, -1)), of(0.3, 0.4, 0.5)),
    "xlogy of both": (lambda x: torch.xlogy(x, x), of(-0.5, 0.5, 2)),
    "xlog1py": (lambda x: torch.special.xlog1py(x, of(-1, 0.5, 3)), of(0.3, 0.4, 0.5)),
    "divergence": (lambda x: F.kl_div(of(0.2, 0.3, 0.5).log(), x, reduction="none"), of(0, 0.5, 0.5)),
    "sinc": (torch.sinc, of(0, 0.5, 1)),
    "sinc beside NaN": (torch.sinc, of(nan, 0, 1)),
    "logit": (lambda x: torch.logit(x, 1e-6), of(0, 0.5, 1)),
    "powers": (lambda x: x ** of(0, 2, 3), of(0, 0, 1)),
    "norm of zeros": (lambda x: torch.linalg.vector_norm(x[:, None] * of(1, 0), 3, 1), of(0, 1, 2)),
    "deviation of equals": (lambda x: torch.stack([x, x.flip(0)], 1).std(1), of(0, 1, 2)),
}


def tall(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([f(x) * k for k in range(1, 9)])


WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "dense": lambda f, x: jacobian(f, x, mode="forward")[0],
    "sparse": lambda f, x: jacobian(f, x, mode="forward", sparse=True)[0].to_dense(),
    "plan": lambda f, x: plan_jacobian(f, x, mode="forward")(x)[0].to_dense(),
    "differentiable": lambda f, x: jacobian(f, x, mode="forward", create_graph=True)[0].detach(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, way: str) -> None:
    f, x = EDGES[name]
    expected = torch.func.jacfwd(f)(x)
    found = WAYS[way](f, x)
    if way in ("sparse", "plan"):
        found, expected = found.diagonal(), expected.diagonal()
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", EDGES)
def test_edges_in_tall_matrices(name: str, sparse: bool) -> None:
    f, x = tall(EDGES[name][0]), EDGES[name][1]
    J, expected = jacobian(f, x, sparse=sparse)[0], torch.func.jacfwd(f)(x)
    if sparse:
        on_diagonal = torch.eye(3).repeat(8, 1) == 1
        J, expected = J.to_dense()[on_diagonal], expected[on_diagonal]
    torch.testing.assert_close(J, expected, equal_nan=True)


def test_attention() -> None:
    """What the tape lacks, dual numbers have, by the formula of attention."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).view(3, 1, 4, 2)
    f = lambda x: F.scaled_dot_product_attention(x, x.cos(), x)
    written = lambda x: torch.softmax(x @ x.cos().mT / 2**0.5, -1) @ x
    expected = torch.func.jacfwd(written)(x).reshape(24, 24)
    torch.testing.assert_close(jacobian(f, x, mode="forward", sparse=True)[0].to_dense(), expected)
    torch.testing.assert_close(plan_jacobian(f, x, mode="forward")(x)[0].to_dense(), expected)


def test_an_operator_whose_backward_has_no_derivative() -> None:
    x = 4 * torch.linspace(-4, 4, 12, dtype=torch.float64).sin()
    expected = torch.func.jacrev(lambda x: (x / 6 + 0.5).clamp(0, 1))(x)
    for found in (
        jacobian(F.hardsigmoid, x, mode="forward", sparse=True)[0],
        plan_jacobian(F.hardsigmoid, x, mode="forward")(x)[0],
    ):
        torch.testing.assert_close(found.to_dense(), expected)


def test_a_few_columns_at_a_time() -> None:
    """The chunk that isn't finite is pushed by dual numbers, the others stay."""
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    J = jacobian(torch.sinc, x, mode="forward", chunk_size=2)[0]
    torch.testing.assert_close(J, torch.func.jacfwd(torch.sinc)(x))
    f = lambda x: torch.sinc(x[:, None] - x[None, :]).sum(1)
    J = jacobian(f, x, mode="forward", sparse=True, chunk_size=2)[0].to_dense()
    torch.testing.assert_close(J, torch.func.jacfwd(f)(x))


def test_by_params() -> None:
    """No dual number can stand in for a tensor that f finds: the tape alone."""
    w = torch.tensor([0.0, 40.0, -40.0, 3.0], dtype=torch.float64)
    f = lambda w: torch.xlogy(w.abs(), of(0.5, 2, 0.1, 0))
    found = jacobian(lambda: f(w), Params([w]), mode="forward")[w]
    torch.testing.assert_close(found, torch.func.jacrev(f)(w))


# ---------------------------------------------------------------------------------------------------------
# what a call takes: pullbacks, and walks along the graph


def states(x: Tensor) -> Tensor:
    """All states of a recurrence."""
    found = []
    for _ in range(8):
        x = x + 0.1 * x.sin()
        found.append(x)
    return torch.stack(found)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return noted_calls(monkeypatch, _engine, "survey", "coarsest")


@pytest.mark.parametrize("create_graph", [False, True])
def test_elementary_operations_take_one_walk_and_two_pullbacks(
    create_graph: bool, pulls: list[int], walks: list[str]
) -> None:
    x = of(0.3, 0.4, 0.5).requires_grad_(create_graph)
    found = jacobian(states, x, mode="forward", create_graph=create_graph)[0]
    assert len(pulls) == 2  # recorded, which is what the result is compared with, and that one pulled back
    assert walks == ["survey"]
    torch.testing.assert_close(found, torch.func.jacrev(states)(x).reshape(24, 3))


def bent(x: Tensor) -> Tensor:
    x = x.sin()
    if x.requires_grad:
        x.register_hook(lambda g: 2 * g.relu())
    return x.repeat(2)


# Pulled back once more to compare with: what need not be the same where it is recorded, or runs again.
COMPARED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "another formula": (lambda x: F.silu(x).repeat(2), 3),
    "checkpointed": (lambda x: checkpointed(states, x), 3),
    "autocast": (lambda x: torch.sin(x.float()).bfloat16().cos().repeat(2).double(), 2),
}


@pytest.mark.parametrize("name", COMPARED)
def test_others_are_pulled_back_once_more(name: str, pulls: list[int]) -> None:
    f, count = COMPARED[name]
    x = of(0.3, 0.4, 0.5)
    found = jacobian(f, x, mode="forward")[0]
    assert len(pulls) == count
    torch.testing.assert_close(found, torch.func.jacrev(f)(x).reshape(-1, 3), rtol=0.01, atol=0.01)


def test_a_hook_that_is_not_linear_is_seen() -> None:
    """It gives the vector that it is compared with, times the matrix that is wrong."""
    with pytest.warns(UserWarning, match="forward mode gave another derivative"):
        found = jacobian(bent, of(0.3, 0.4, 0.5), mode="forward")[0]
    torch.testing.assert_close(found, jacobian(bent, of(0.3, 0.4, 0.5), mode="reverse")[0])


def test_coarse_numbers_in_between_are_looked_for_where_they_show(walks: list[str]) -> None:
    weights = torch.linspace(-1, 1, 12, dtype=torch.bfloat16).view(4, 3).sin()
    f = lambda x: (weights @ (weights.T @ (weights @ x.bfloat16()))).double().repeat(3)
    found = jacobian(f, of(0.3, 0.4, 0.5), mode="forward")[0]
    assert walks == ["survey", "coarsest"]
    expected = (weights @ weights.T @ weights).double().repeat(3, 1)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_backward_that_selects_by_a_mask_goes_row_by_row() -> None:
    """Batched, PyTorch gets that wrong, as only the recorded pullback shows."""
    mask = torch.tensor([True, False, True, True, False, False])
    f = lambda x: torch.zeros(2, 6, dtype=x.dtype).masked_scatter(mask, x.sin().repeat(2)).repeat(2, 1)
    x = of(0.3, 0.4, 0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rows are computed one at a time")
        found = jacobian(f, x, mode="forward", verify=False)[0]
    torch.testing.assert_close(found, jacobian(f, x, mode="reverse", chunk_size=1)[0])


def test_many_columns_are_walked_along(walks: list[str]) -> None:
    x = torch.linspace(-1, 1, 600, dtype=torch.float64)
    jacobian(lambda x: torch.cat([x.sin(), x.cos().flip(0)]).cumsum(0), x, mode="forward")
    assert walks[:2] == ["survey", "survey"]


# ---------------------------------------------------------------------------------------------------------
# results of many parts


def parts(x: Tensor, k: int = 40) -> list[Tensor]:
    found = [x.sin()]
    for i in range(k - 1):
        found.append((found[-1] + i * x).cos())
    return found


OF_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "cat": lambda x: torch.cat(parts(x)),
    "stack": lambda x: torch.stack(parts(x)),
    "stack of numbers": lambda x: torch.stack([a.sum() for a in parts(x)]),
    "last axis": lambda x: torch.stack(parts(x.view(1, 3)), -1),
    "second axis": lambda x: torch.cat([p.expand(2, 3) for p in parts(x.view(1, 3))], 1),
    "with constants": lambda x: torch.cat([x.new_ones(2), *parts(x), x.new_ones(1)]),
    "with itself": lambda x: torch.cat([x, *parts(x), x]),
    "one part twice": lambda x: torch.stack([*parts(x), parts(x)[3]] * 2),
    "of different sizes": lambda x: torch.cat([a[: 1 + i % 3] for i, a in enumerate(parts(x))]),
    "promoted": lambda x: torch.cat([a.float() if i % 2 else a for i, a in enumerate(parts(x))]),
    "left out": lambda x: torch.cat([x.new_ones(0), *(a.view(1, 3) for a in parts(x))]),
    "views of it": lambda x: torch.stack(parts(x)).t().reshape(-1),
}


@pytest.mark.parametrize("name", OF_PARTS)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"create_graph": True}, {"verify": False}])
def test_results_of_many_parts(name: str, options: dict[str, Any]) -> None:
    f, x = OF_PARTS[name], of(0.3, 0.4, 0.5)
    found = jacobian(f, x, mode="forward", **options)[0]
    torch.testing.assert_close(found.detach(), torch.func.jacrev(f)(x).reshape(-1, 3), rtol=1e-6, atol=1e-6)


def test_results_of_many_parts_by_several_arguments() -> None:
    """Some parts depend on one of them alone, and nothing on the last."""
    f = lambda a, b, c: torch.stack([*parts(a, 20), *parts(b, 20)])
    xs = (of(0.3, 0.4, 0.5), of(0.1, 0.2, 0.3), of(1.0))
    found = jacobian(f, *xs, mode="forward")
    for J, expected in zip(found, torch.func.jacrev(f, (0, 1, 2))(*xs), strict=True):
        torch.testing.assert_close(J, expected.reshape(120, -1))


def test_results_of_many_parts_by_params() -> None:
    w = of(0.3, 0.4, 0.5).requires_grad_()
    found = jacobian(lambda: torch.stack(parts(w)), Params([w]), mode="forward")[w]
    torch.testing.assert_close(
        found, torch.func.jacrev(lambda w: torch.stack(parts(w)))(w).reshape(-1, 3).detach()
    )


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("k", [4, 40])
def test_no_part_is_padded_to_the_whole(k: int, verify: bool) -> None:
    x = of(0.3, 0.4, 0.5)
    with torch.profiler.profile(acc_events=True) as profile:  # without, 2.10 warns
        jacobian(lambda x: torch.cat(parts(x, k)), x, mode="forward", verify=verify)
    padded = [event for event in profile.events() if event.name == "aten::slice_backward"]
    assert (len(padded) >= k) is (k == 4)
