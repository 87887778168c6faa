"""Which structure hangs on values, and says so, and which values are not taken for structure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detection import detect_jacobian
from oracles import true_jacobian
from torch import nn

from torchzygote import jacobian_sparsity


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * 2 if x[0] > 0 else x.sum(),
        lambda x: x * x[0].item(),
        lambda x: x[x > 0],
        lambda x: x[x.argmax()],
        lambda x: x.sort().values,
        lambda x: x.max(),
        lambda x: x[: int(x.sum().abs()) + 1],
        lambda x: x.index_select(0, (x > 0.5).nonzero()[:, 0]),
        lambda x: x.gather(0, x.detach().argsort()),
        lambda x: x[x.argsort().tolist()] * x,
        lambda x: x * x[x.tolist().index(max(x.tolist()))],
        lambda x: x[torch.from_numpy(x.detach().numpy().argsort())],
        lambda x: x[np.asarray(x.detach() * 2).argsort().tolist()],
        lambda x: x[np.from_dlpack(x.detach()).argsort().tolist()],
    ],
)
def test_structure_that_hangs_on_values_says_so(f: Any) -> None:
    x = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64)
    (pattern,) = detect_jacobian(f, [x])
    assert pattern.is_local
    assert torch.equal(pattern.to_dense(), true_jacobian(f, x))
    assert jacobian_sparsity(f, x)[0].is_local


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x[torch.tensor([2, 0])],
        lambda x: torch.relu(x).abs(),
        lambda x: torch.where(x > 0.5, x, -x),
        lambda x: x * (x > 0.5),
        lambda x: x[:2] if x.shape[0] > 2 else x,
        lambda x: x[torch.tensor([True, False, True])],
        lambda x: x * torch.randn(1).item(),
        lambda x: F.max_pool1d(x[None], 2),
        lambda x: x[torch.arange(3).flip(0).tolist()],
        lambda x: x * torch.from_numpy(torch.ones(3).numpy()),
    ],
)
def test_structure_that_does_not_says_so_too(f: Any) -> None:
    x = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64)
    assert not detect_jacobian(f, [x])[0].is_local


def test_values_of_a_random_mask_are_not_taken_for_structure() -> None:
    (pattern,) = detect_jacobian(lambda x: F.dropout(x, 0.9), [torch.rand(50)])
    assert pattern.nnz == 50


def test_zeros_of_a_trainable_matrix_are_not_taken_for_structure() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    (pattern,) = detect_jacobian(layer, [torch.rand(3)])
    assert pattern.nnz == 6
    plain = layer.weight.detach().clone()
    assert detect_jacobian(lambda x: plain @ x, [torch.rand(3)])[0].nnz == 0
