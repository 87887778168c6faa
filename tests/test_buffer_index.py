"""Positions that an index selects: NumPy's own, at a cost that is the index's, not the Buffer's."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from torchzygote import Buffer
from torchzygote._buffer.index import parse, positions


@st.composite
def indexed(draw: DrawFn) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    """A shape and an index that may fit it, with an index array or a mask in it."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    items: list[Any] = []
    axis = 0
    while axis < len(shape):
        n = shape[axis]
        kind = draw(st.sampled_from(["int", "slice", "array", "mask", "none", "rest"]))
        if kind == "none":
            items.append(None)
            continue
        if kind == "rest":
            items.append(...)
            break
        if kind == "int":
            items.append(draw(st.integers(-n, n - 1)))
        elif kind == "slice":
            bounds = st.none() | st.integers(-5, 5)
            items.append(slice(draw(bounds), draw(bounds), draw(st.sampled_from([None, 1, 2]))))
        elif kind == "array":
            size = draw(st.sampled_from([(1,), (2,), (2, 1), (2, 3), (0,)]))
            entries = st.lists(
                st.integers(-n, n - 1), min_size=int(np.prod(size)), max_size=int(np.prod(size))
            )
            items.append(torch.tensor(draw(entries), dtype=torch.int64).reshape(size))
        else:
            items.append(torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n))))
        axis += 1
    return shape, tuple(items)


@given(indexed())
def test_positions_are_what_selects_from_all(case: tuple[tuple[int, ...], tuple[Any, ...]]) -> None:
    shape, index = case
    key = parse(index, shape)
    everything = np.arange(np.prod(shape)).reshape(shape)
    try:
        expected = np.asarray(key.select(everything))
    except IndexError as error:
        with pytest.raises(IndexError, match=str(error)[:20].replace("(", r"\(")):
            positions(key, shape)
        return
    found = positions(key, shape)
    assert found.shape == expected.shape
    assert (found == expected).all()


@pytest.mark.parametrize("kind", ["tensor", "list", "added"])
def test_a_write_by_an_index_array_costs_its_elements(kind: str) -> None:
    n = 2_000_000
    buf = Buffer(torch.zeros(1), n, 2)
    buf[0] = torch.ones(2)  # its memory is there
    index = torch.arange(4)
    tracemalloc.start()
    try:
        for i in range(3):
            if kind == "list":
                buf[[i, i + 5, n - 1], 1] = torch.tensor(7.0)
            elif kind == "added":
                buf[index + i] += torch.ones(2)
            else:
                buf[index + i, 1] = torch.ones(4)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000, peak  # one number for each row would be 16 MB
