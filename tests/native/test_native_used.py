"""The operators are used on the paths that they were made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_samples import needs_library
from torch.utils._python_dispatch import TorchDispatchMode

from torchzygote import Params, diaghessian, hessian, jacobian

pytestmark = needs_library


class Recorded(TorchDispatchMode):
    """The names of our operators that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchzygote":
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


def used(run: Callable[[], object]) -> list[str]:
    with Recorded() as recorded:
        run()
    return recorded.names


N = 300
W = torch.randn(N, N) / N**0.5


def test_jacobian_rows_of_all_arguments_are_scattered_at_once() -> None:
    x, y = torch.randn(N), torch.randn(N)
    names = used(lambda: jacobian(lambda x, y: torch.tanh(W @ (x * y)), x, y, chunk_size=100, mode="reverse"))
    assert names.count("scatter_rows_") == 3


def test_jacobian_rows_by_params_are_scattered_at_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.Tanh(), torch.nn.Linear(20, 50))
    x = torch.randn(20)
    names = used(lambda: jacobian(lambda: model(x), Params(model), chunk_size=25, mode="reverse"))
    assert names.count("scatter_rows_") == 2


def test_hessian_rows_are_scattered() -> None:
    names = used(lambda: hessian(lambda x: torch.tanh(W @ x).sum() ** 2, torch.randn(N), chunk_size=100))
    assert names.count("scatter_rows_") == 3


def test_seeds_of_large_chunks_are_written_at_once() -> None:
    names = used(lambda: hessian(lambda x: torch.tanh(W @ x).sum() ** 2, torch.randn(N), chunk_size=N))
    assert "seed_rows_" in names


def test_hessian_diagonals_are_gathered() -> None:
    names = used(lambda: diaghessian(lambda x: torch.tanh(W @ x).sum() ** 2, torch.randn(N), chunk_size=100))
    assert names.count("gather_diagonal_") == 3


def test_symmetric_blocks_are_read_and_compared_at_once() -> None:
    names = used(lambda: hessian(lambda x: (x[:, 0].sin() * x[:, 1] ** 3).sum(), torch.randn(N, 2)))
    assert names == ["mirrored_blocks"]


def test_tangents_pass_functions_of_elements_in_one_step_each() -> None:
    names = used(lambda: diaghessian(lambda x: (x @ W[:3] + 1).tanh().exp().sum(), torch.randn(N, 3)))
    assert names == ["push_elementwise_"] * 2


def test_sparse_derivatives_use_colored_seeds_and_slots() -> None:
    names = used(lambda: jacobian(lambda x: x[1:] * x[:-1], torch.randn(N), sparse=True))
    assert "seed_rows_" in names


@pytest.mark.parametrize("size", [1, 3])
def test_small_ones_are_not_slowed_down(size: int) -> None:
    names = used(lambda: jacobian(lambda x: x**2, torch.randn(size)))
    assert "scatter_rows_" not in names
    assert "seed_rows_" not in names
