"""Flat vectors of any layout, and what may share memory with what they are copied to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from torchzygote import GradDict, Params, copy_

ARRAYS = {
    "reversed": lambda: np.zeros(4)[::-1],
    "big-endian": lambda: np.zeros(4, ">f8"),
    "a field": lambda: np.zeros(4, [("a", "f4"), ("b", "f8")])["b"],
    "strided": lambda: np.zeros(8)[::2],
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_numpy_vectors_of_any_layout(kind: str) -> None:
    w, b = torch.zeros(3), torch.zeros(())
    ps = Params([w, b])
    vector = ARRAYS[kind]()
    vector[...] = [1, 2, 3, 4]
    copy_(ps, vector)
    assert torch.equal(ps.to_vector(), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    vector[...] = 0
    assert copy_(vector, ps) is vector
    assert vector.tolist() == [1, 2, 3, 4]


def test_a_sparse_vector_will_do() -> None:
    w = torch.zeros(3)
    copy_(Params([w]), torch.tensor([1.0, 0.0, 3.0]).to_sparse())
    assert w.tolist() == [1, 0, 3]


def test_a_vector_may_share_memory_with_the_parameters() -> None:
    flat = torch.arange(4.0)
    copy_(Params([flat[2:], flat[:2]]), flat)
    assert flat.tolist() == [2, 3, 0, 1]
    copy_(flat, Params([flat[2:], flat[:2]]))
    assert flat.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("source", [3, torch.tensor([[1.0, 2.0]]), [torch.tensor([1.0, 2.0])], [(1, 2, 3)]])
def test_what_is_no_mapping_nor_pairs(source: Any) -> None:
    with pytest.raises(TypeError, match="mapping, or .* pairs"):
        GradDict(source)


def test_values_that_share_memory_are_changed_once_each() -> None:
    a, b, c = torch.zeros(4), torch.zeros(2, 2), torch.zeros(0)
    shared = torch.ones(4)
    g = GradDict({a: shared, b: shared.view(2, 2), c: torch.zeros(0)})
    g *= 2
    g += {a: torch.ones(4), b: torch.ones(2, 2), c: None}
    assert g[a].tolist() == [3, 3, 3, 3]
    assert g[b].tolist() == [[3, 3], [3, 3]]
