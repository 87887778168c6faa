"""Random programs of writes and reads, with a Buffer and as out-of-place mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from torchzygote import Buffer

POINT = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------
# random indices, as a tensor takes them


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """An index into an array of this shape; repeated elements of index arrays included."""
    if draw(st.integers(0, 7)) == 0:
        return draw(masks(shape[: draw(st.integers(1, len(shape)))]))
    items: list[Any] = []
    arrays: int | None = None
    for axis in range(draw(st.integers(0, len(shape)))):
        n = shape[axis]
        kind = draw(st.sampled_from(["int", "slice", "array", "list", "number"]))
        if kind == "slice":
            bounds = st.none() | st.integers(-n - 1, n + 1)
            items.append(slice(draw(bounds), draw(bounds), draw(st.none() | st.integers(1, 3))))
        elif kind in ("int", "number"):
            i = draw(st.integers(-n, n - 1))
            items.append(i if kind == "int" else draw(st.sampled_from([np.int64, torch.tensor]))(i))
        else:
            arrays = draw(st.integers(0, 3)) if arrays is None else arrays
            found = draw(st.lists(st.integers(-n, n - 1), min_size=arrays, max_size=arrays))
            items.append(found if kind == "list" else torch.tensor(found, dtype=torch.int64))
    where = draw(st.sampled_from(["nothing", "none", "ellipsis", "both"]))
    if where in ("none", "both"):
        items.insert(draw(st.integers(0, len(items))), None)
    if where in ("ellipsis", "both"):
        items.append(Ellipsis)
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    flags = draw(
        st.lists(st.booleans(), min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel())
    )
    return torch.tensor(flags, dtype=torch.bool).reshape(shape)


@st.composite
def value_shapes(draw: st.DrawFn, target: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to the target."""
    shape = [n if draw(st.booleans()) else 1 for n in target]
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple([1] * (draw(st.integers(0, 4)) == 0) + kept)


@st.composite
def programs(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[Any, tuple[int, ...], Any]]]:
    """A shape, and steps: where to write, the shape of the value, and where to read for the next value."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    numbers = torch.zeros(shape)
    steps = []
    for _ in range(draw(st.integers(1, 5))):
        index = draw(indices(shape))
        target = tuple(numbers[torch_index(index)].shape)
        steps.append((index, draw(value_shapes(target)), draw(st.none() | indices(shape))))
    return shape, steps


def torch_index(index: Any) -> Any:
    """The index as PyTorch wants it: lists are deprecated there when they stand alone."""
    if isinstance(index, tuple):
        return tuple(torch.tensor(i, dtype=torch.int64) if isinstance(i, list) else i for i in index)
    return torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index


def out_of_place(whole: Tensor, index: Any, value: Tensor) -> Tensor:
    """The mathematics of assignment: for each element, which value it gets; the last one wins."""
    numbers = torch.arange(whole.numel()).reshape(whole.shape)[torch_index(index)]
    while value.ndim > numbers.ndim:
        value = value[0]
    chosen = value.expand(numbers.shape).reshape(-1)
    source = list(range(whole.numel()))
    for k, position in enumerate(numbers.reshape(-1).tolist()):
        source[position] = whole.numel() + k
    return torch.cat([whole.reshape(-1), chosen])[torch.tensor(source, dtype=torch.int64)].reshape(
        whole.shape
    )


def run_with_buffer(shape: tuple[int, ...], steps: list[Any]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, *shape)
        for k, (index, value_shape, source) in enumerate(steps):
            value = value_of(x, k, value_shape)
            if source is not None:
                value = value * (1 + buf[source].sum())
            buf[index] = value
        return buf.copy()

    return f


def run_out_of_place(shape: tuple[int, ...], steps: list[Any]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        whole = torch.zeros(shape, dtype=x.dtype)
        for k, (index, value_shape, source) in enumerate(steps):
            value = value_of(x, k, value_shape)
            if source is not None:
                value = value * (1 + whole[torch_index(source)].sum())
            whole = out_of_place(whole, index, value)
        return whole

    return f


def value_of(x: Tensor, k: int, shape: tuple[int, ...]) -> Tensor:
    """Something nonlinear in ``x``, different in each element and step."""
    weights = torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=x.dtype).reshape(shape)
    return torch.sin(x[k % 3] * weights + k) + x[(k + 1) % 3] * x[k % 2]
