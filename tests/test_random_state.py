"""Finding structure runs a random function, and leaves the generators as one plain call would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import (
    diaghessian,
    hessian,
    hessian_sparsity,
    jacobian,
    jacobian_sparsity,
    plan_hessian,
    plan_jacobian,
    withhessian,
)
from torchzygote._random import RandomState


@pytest.mark.parametrize("find", [jacobian_sparsity, plan_jacobian, hessian_sparsity, plan_hessian])
def test_random_numbers_go_on_as_after_one_plain_call(find: Callable[..., Any]) -> None:
    def f(x: Tensor) -> Tensor:
        return (x * torch.rand(4) + F.dropout(x**2)).sum()

    x = torch.rand(4)
    torch.manual_seed(0)
    f(x)
    expected = torch.rand(3)
    torch.manual_seed(0)
    find(f, x)
    assert torch.equal(torch.rand(3), expected)


# A draw that decides which entries there are: what finds them has to draw the same.


def shuffled(x: Tensor) -> Tensor:
    found: Tensor = (x**3)[torch.randperm(len(x))]
    return found


def chosen(x: Tensor) -> Tensor:
    found: Tensor = x[torch.rand(len(x)) > 0.5] ** 3
    return found


@pytest.mark.parametrize("f", [shuffled, chosen])
@pytest.mark.parametrize("seed", range(4))
def test_structure_is_that_of_the_draw_that_gave_the_value(f: Callable[[Tensor], Tensor], seed: int) -> None:
    x = torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    torch.manual_seed(seed)
    y = f(x)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    found = jacobian(f, x, sparse=True)[0]
    assert torch.equal(torch.get_rng_state(), after)
    torch.manual_seed(seed)
    torch.testing.assert_close(found.to_dense(), torch.func.jacrev(f)(x))
    assert found._nnz() == len(y)


@pytest.mark.parametrize("seed", range(4))
def test_so_is_that_of_hessians_and_their_diagonals(seed: int) -> None:
    def energy(x: Tensor) -> Tensor:
        return (shuffled(x) * x).sum()

    x = torch.linspace(0.5, 1.5, 400, dtype=torch.float64)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    expected = torch.func.hessian(lambda x: ((x**3)[order] * x).sum())(x)
    torch.manual_seed(seed)
    found = hessian(energy, x, sparse=True)
    torch.testing.assert_close(found.to_dense(), expected)
    assert found._nnz() <= 3 * len(x)
    torch.manual_seed(seed)
    torch.testing.assert_close(diaghessian(energy, x)[0], expected.diagonal())


@pytest.mark.parametrize("shape", [(4, 4), (5, 4), (30, 4)])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_pushed_hessians_are_of_the_same_draw_as_value_and_gradient(
    shape: tuple[int, int], chunk_size: int | None
) -> None:
    """In ``torch.func``, dropout of what isn't contiguous fills its mask in another order."""
    f = lambda x: (F.dropout(x.t(), 0.5) ** 2).sum()
    x = torch.ones(shape)
    torch.manual_seed(5)
    value, grad, hess = withhessian(f, x, mode="forward_over_reverse", chunk_size=chunk_size)
    torch.testing.assert_close(hess @ x.reshape(-1), grad.reshape(-1))
    torch.testing.assert_close(grad.reshape(-1) @ x.reshape(-1), 2 * value)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    f(x)
    assert torch.equal(after, torch.get_rng_state())


class Generators:
    """CUDA's, which refuse questions while a graph is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = torch.zeros(1)
        self.capturing = False
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", self.set)
        monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: self.set([torch.zeros(1)]))

    def get(self) -> list[Tensor]:
        assert not self.capturing
        return [self.state]

    def set(self, states: list[Tensor]) -> None:
        assert not self.capturing
        (self.state,) = states


def test_generators_are_not_asked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = Generators(monkeypatch)
    before = RandomState()
    generators.capturing = True
    within = RandomState()
    drawn = torch.rand(2)
    assert within.has_moved()
    within.restore()
    assert not within.has_moved()
    assert torch.equal(torch.rand(2), drawn)  # the CPU's go on as ever
    before.restore()
    generators.capturing = False
    generators.state = torch.ones(1)
    within.restore()
    assert generators.state == 1  # nothing is known of where they were
    assert before.has_moved()
    before.restore()
    assert generators.state == 0
    assert not before.has_moved()


def test_capturing_is_asked_of_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delattr(torch.cuda, "is_current_stream_capturing")
    state = RandomState()
    state.restore()
    assert not state.has_moved()
