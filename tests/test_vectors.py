"""Flat vectors of any layout, and what may share memory with what they are copied to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from noted_calls import noted_calls

from torchzygote import GradDict, Params, _multi_tensor, copy_, gradient

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


@pytest.mark.parametrize("dtype", [object, np.longdouble, "U3"])
def test_arrays_of_what_pytorch_has_no_dtype_for(dtype: Any) -> None:
    w = torch.zeros(3)
    array = np.zeros(3, dtype)
    for attempt, name in (
        (lambda: copy_(Params([w]), array), "src"),
        (lambda: copy_(array, Params([w])), "dst"),
    ):
        with pytest.raises(
            TypeError, match=f"copy_: expected {name} to be a vector of a dtype that PyTorch has"
        ):
            attempt()


def test_arrays_that_share_memory_with_the_parameters() -> None:
    memory = np.arange(4.0)
    u, v = torch.from_numpy(memory[1:]), torch.from_numpy(memory[:1])
    copy_(memory, Params([u, v]))
    assert memory.tolist() == [1, 2, 3, 0]
    copy_(Params([u, v]), memory)
    assert memory.tolist() == [0, 1, 2, 3]


def test_parameters_that_overlap_are_written_one_after_another() -> None:
    u = torch.zeros(4)
    copy_(Params([u[:3], u[1:]]), torch.arange(6.0))
    assert u.tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize("kind", ["expanded", "made in inference mode"])
def test_parameters_that_cannot_be_written(kind: str) -> None:
    with torch.inference_mode(kind == "made in inference mode"):
        w = torch.zeros(1).expand(2) if kind == "expanded" else torch.zeros(2)
    b = torch.zeros(1)
    with pytest.raises(ValueError, match="expected writable parameters"):
        copy_(Params([b, w]), torch.ones(3))
    assert b == 0
    with pytest.raises(ValueError, match="expected dst to be a writable vector"):
        copy_(w, Params([torch.ones(2)]))


def test_grads_that_could_not_be_written_into_share_no_memory_with_the_vector() -> None:
    w = torch.zeros(2)
    ps = Params([w])
    gs = gradient(lambda: w.sum(), ps)
    gs[w] = torch.ones(1).expand(2)  # can't be written into
    vector = torch.tensor([3.0, 4.0])
    copy_(gs, vector)
    vector.zero_()
    assert gs[w].tolist() == [3, 4]


def test_a_conjugate_vector_is_filled() -> None:
    memory = torch.zeros(3, dtype=torch.complex64)
    ps = Params([torch.tensor([1.0 + 2j], dtype=torch.complex64), torch.tensor([3.0, 4.0])])
    copy_(memory.conj(), ps)
    assert memory.tolist() == [1 - 2j, 3, 4]


# Members of a Params, of 13 elements each time, and how often all parts of a vector are made in one call.
MEMBERS: dict[str, tuple[Callable[[], list[torch.Tensor]], int]] = {
    "small": (lambda: [torch.zeros(2, 3), torch.zeros(()), torch.zeros(6, 1)], 1),
    "of several dtypes": (
        lambda: [torch.zeros(2, 3), torch.zeros((), dtype=torch.float64), torch.zeros(6).double()],
        1,
    ),
    "transposed": (lambda: [torch.zeros(3, 2).T, torch.zeros(14)[::2]], 1),
    "parameters": (lambda: [torch.nn.Parameter(torch.zeros(n)) for n in (4, 9)], 1),
    "some are empty": (lambda: [torch.zeros(0, 2), torch.zeros(13), torch.zeros(3, 0)], 0),
    "views of one": (lambda: list(torch.zeros(13).split([6, 7])), 1),
}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kind", MEMBERS)
def test_parts_of_a_vector_are_made_at_once(
    kind: str, strided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, times = MEMBERS[kind]
    calls = noted_calls(monkeypatch, _multi_tensor, "unflatten_dense")
    vector = torch.arange(26.0)[::2] if strided else torch.arange(13.0)
    expected = vector.tolist()
    ps = Params(make())
    shapes = [p.shape for p in ps]
    assert copy_(ps, vector) is ps
    assert len(calls) == times
    assert [p.shape for p in ps] == shapes
    assert [x for p in ps for x in p.detach().reshape(-1).tolist()] == expected
    gs = gradient(lambda: sum(p.sum() for p in ps), ps)
    copy_(gs, vector)
    assert len(calls) == 2 * times
    assert [g.shape for g in gs.values()] == shapes
    assert gs.to_vector().tolist() == expected


def test_parts_of_a_vector_are_differentiated() -> None:
    ps = Params([torch.zeros(2, 2), torch.zeros(3)])

    def f(v: torch.Tensor) -> torch.Tensor:
        gs = copy_(gradient(lambda: sum(p.sum() for p in ps), ps), v)
        return sum((g**2).sum() for g in gs.values())

    v = torch.arange(7.0)
    assert torch.equal(gradient(f, v)[0], 2 * v)
    assert torch.equal(torch.func.grad(f)(v), 2 * v)
