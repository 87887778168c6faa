"""Understanding an index: what a tensor takes, as something that NumPy's integer arrays take.

A :class:`Key` selects from any array of the Buffer's shape with PyTorch's semantics. Knows nothing of values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .._arguments import type_name
from .._torch_private import concrete, outside_functorch

__all__ = ["Key", "explain", "parse", "positions", "row_of"]


class Key:
    """A parsed index.

    ``basic``: ints, slices, ``None`` and ellipsis. ``arrays``: NumPy index arrays and masks by place in
    ``basic``, which holds full slices there (``None`` where there are none). ``known``: whether the
    index arrays could be read; if not, they differ between the examples of a ``vmap``, or are being traced.
    ``given``: the index as a tuple for PyTorch.
    """

    __slots__ = ("arrays", "basic", "given", "known")

    def __init__(
        self, basic: tuple[Any, ...], arrays: tuple[Any, ...] | None, known: bool, given: tuple[Any, ...]
    ) -> None:
        self.basic = basic
        self.arrays = arrays
        self.known = known
        self.given = given

    def select(self, array: np.ndarray[Any, Any]) -> Any:
        """The elements of ``array``, which has the Buffer's shape."""
        part = array[self.basic]
        return part if self.arrays is None else part[self.arrays]

    def assign(self, array: np.ndarray[Any, Any], values: Any) -> None:
        """Assign to the elements of ``array``; of an element that is named twice, the last value stays."""
        if self.arrays is None:
            array[self.basic] = values
        else:
            part = array[self.basic]
            if not isinstance(part, np.ndarray):  # one element, not a view of it
                place = (*self.basic, ...)
                part = array[place]
            part[self.arrays] = values


class WrongIndexError(IndexError, TypeError):
    """What can't be an index: an ``IndexError``, as tensors raise, and a ``TypeError``, as lists do."""


def parse(index: Any, shape: Sequence[int]) -> Key:
    """The :class:`Key` of ``index`` into an array of this shape."""
    items = index if type(index) is tuple else (index,)
    if type(index) is list and _is_taken_for_a_tuple(index):
        items = tuple(index)
    plain = True
    for item in items:
        kind = type(item)
        if kind is slice:
            plain = plain and (item.step is None or type(item.step) is int) and _ints(item)
            if plain and item.step is not None and item.step < 1:
                _refuse_step(item)
        elif not (kind is int or item is None or item is Ellipsis):
            plain = False
    if plain:
        return Key(items, None, True, items)
    return _parse_slowly([_item(item) for item in items], shape)


def explain(index: object, shape: Sequence[int], error: IndexError) -> NoReturn:
    """Raise ``error`` with the index and the Buffer's shape in its words."""
    text = str(error)
    if text.startswith("index:"):
        raise error
    shown = repr(index) if len(repr(index)) < 80 else type_name(index)
    raise IndexError(
        f"index: expected one that a Buffer of shape {tuple(shape)} has, got {shown}: {text}"
    ) from None


def _is_taken_for_a_tuple(index: list[Any]) -> bool:
    """Whether PyTorch takes a list that holds more than ints for a tuple of indices (deprecated there)."""
    if len(index) >= 32 or not any(
        isinstance(item, (Sequence, Tensor, slice)) or item is None or item is ... for item in index
    ):
        return False
    # Asked, because a release will stop doing so; it says so itself, by a warning.
    return torch.zeros(1, 1)[[[0], [0]]].ndim == 1


def _ints(item: slice) -> bool:
    return (item.start is None or type(item.start) is int) and (item.stop is None or type(item.stop) is int)


def _refuse_step(item: slice) -> None:
    raise ValueError(f"index: expected slices with a positive step, as PyTorch's, got a step of {item.step}")


def _item(item: Any) -> Any:
    """One item of an index: an int, a slice, ``None``, an ellipsis, a NumPy array, or an unknown tensor."""
    if item is None or item is Ellipsis:
        return item
    if isinstance(item, slice):
        bounds = [None if b is None else operator.index(b) for b in (item.start, item.stop, item.step)]
        found = slice(*bounds)
        if found.step is not None and found.step < 1:
            _refuse_step(found)
        return found
    if isinstance(item, (bool, np.bool_)):
        return np.array(bool(item))
    if isinstance(item, Tensor):
        readable = concrete(item)
        if readable is None:
            return item
        with outside_functorch():
            return _array(readable.detach().cpu().numpy(), item.dtype)
    if isinstance(item, (list, tuple, range)):
        return _list(item)
    if isinstance(item, np.ndarray):
        return _array(item, item.dtype)
    try:
        return operator.index(item)
    except TypeError:
        raise WrongIndexError(
            "index: expected ints, slices, None, ..., boolean masks or arrays of ints, got "
            f"{type(item).__name__}"
        ) from None


def _list(item: Sequence[Any]) -> Any:
    if len(item) == 0:
        return np.zeros(0, dtype=np.int64)
    if any(isinstance(part, Tensor) for part in item):
        parts = [_item(part) for part in item]
        if any(isinstance(part, Tensor) for part in parts):
            return torch.stack([torch.as_tensor(part) for part in parts])
        item = parts
    try:
        return _array(np.array(item), type(item[0]))
    except ValueError:
        raise TypeError(f"index: expected a list of ints or of lists of them, got {item!r}") from None


def _array(array: np.ndarray[Any, Any], dtype: object) -> Any:
    if array.dtype == np.uint8 and dtype is torch.uint8:  # PyTorch's old masks
        array = array.astype(bool)
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind not in "iu":
        raise IndexError(f"index: expected index arrays of ints or bools, got dtype {dtype}")
    return int(array) if array.ndim == 0 else array.astype(np.int64, copy=False)


def _parse_slowly(items: list[Any], shape: Sequence[int]) -> Key:
    """Split into a basic part and the arrays that then select from what the basic part left.

    PyTorch takes ints first, as views; NumPy would count them among the arrays.
    """
    given = tuple(torch.from_numpy(item) if isinstance(item, np.ndarray) else item for item in items)
    known = not any(isinstance(item, Tensor) for item in items)
    basic: list[Any] = []
    arrays: list[Any] = []
    for item in items:
        if isinstance(item, (np.ndarray, Tensor)):
            taken = item.ndim if item.dtype in (np.bool_, torch.bool) else 1
            basic.extend([slice(None)] * taken)
            arrays.append(item)
            if isinstance(item, np.ndarray) and item.dtype == np.bool_:
                _check_mask(item, basic, items, shape)
        else:
            basic.append(item)
            if item is Ellipsis:
                # As many axes as it covers, perhaps none: NumPy would take it for something between arrays.
                arrays.extend([slice(None)] * (len(shape) - _axes_taken(items)))
            elif item is None or isinstance(item, slice):
                arrays.append(slice(None))
    if not any(isinstance(item, (np.ndarray, Tensor)) for item in items):
        return Key(tuple(basic), None, True, given)
    return Key(tuple(basic), tuple(arrays), known, given)


def _axes_taken(items: list[Any]) -> int:
    """How many axes the items of an index name."""
    return sum(
        item.ndim if isinstance(item, (np.ndarray, Tensor)) and item.dtype in (np.bool_, torch.bool) else 1
        for item in items
        if item is not None and item is not Ellipsis
    )


def _check_mask(mask: np.ndarray[Any, Any], basic: list[Any], items: list[Any], shape: Sequence[int]) -> None:
    """A mask of another size than the axes it stands for: PyTorch's error, before NumPy's (or none)."""
    end = sum(item is not None for item in basic)
    if any(item is Ellipsis for item in basic):
        end += len(shape) - _axes_taken(items)
        end -= 1
    axes = tuple(shape)[max(end - mask.ndim, 0) : end]
    if len(axes) == mask.ndim and mask.shape != axes:
        raise IndexError(f"index: expected a mask of shape {axes}, got one of shape {mask.shape}")


def positions(key: Key, shape: Sequence[int]) -> np.ndarray[Any, Any]:
    """Row-major positions of the elements that ``key`` selects, at a cost that is theirs, not the axes'."""
    nothing = np.broadcast_to(np.int8(0), tuple(shape))
    selected = key.select(nothing)  # raises what NumPy raises
    offset, lines = _lines(key.basic, shape)
    arrays: list[Any] = []
    axis = 0
    for item in key.arrays or ():
        if isinstance(item, np.ndarray) and item.dtype != np.bool_:
            # The axis in the order of the index, which then counts through it: no longer than that is.
            start, step, length = lines[axis]
            wrapped = np.where(item < 0, item + length, item).reshape(-1)
            lines[axis] = wrapped * step + start
            item = np.arange(item.size).reshape(item.shape)
        arrays.append(item)
        axis += item.ndim if isinstance(item, np.ndarray) and item.dtype == np.bool_ else 1
    vectors = [x if isinstance(x, np.ndarray) else np.arange(x[2]) * x[1] + x[0] for x in lines]
    lengths = tuple(map(len, vectors))
    found = np.full(np.shape(selected), offset, dtype=np.int64)
    for axis, vector in enumerate(vectors):
        line = vector.reshape([-1 if a == axis else 1 for a in range(len(lengths))])
        found = found + np.broadcast_to(line, lengths)[tuple(arrays)]
    return np.asarray(found)


def _lines(basic: Sequence[Any], shape: Sequence[int]) -> tuple[int, list[Any]]:
    """What ints select, and the positions along each axis that is left: start, step and length."""
    named = sum(item is not None and item is not Ellipsis for item in basic)
    items: list[Any] = []
    for item in basic:
        items.extend([slice(None)] * (len(shape) - named) if item is Ellipsis else [item])
    items.extend([slice(None)] * (len(shape) - sum(item is not None for item in items)))
    offset, lines, axis = 0, [], 0
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    for item in items:
        if item is None:
            lines.append((0, 0, 1))
            continue
        n, stride = shape[axis], strides[axis]
        if isinstance(item, slice):
            along = range(*item.indices(n))
            lines.append((along.start * stride, along.step * stride, len(along)))
        else:
            offset += (item + n if item < 0 else item) * stride
        axis += 1
    return offset, lines


def row_of(key: Key) -> Any:
    """The int or slice for the first axis, if the others are taken whole; else ``None``."""
    if key.arrays is not None or not key.known:
        return None
    basic = key.basic
    first: Any = slice(None)
    rest = basic
    if basic and (isinstance(basic[0], slice) or type(basic[0]) is int):
        first, rest = basic[0], basic[1:]
    whole = slice(None)
    return (
        first
        if all(item is Ellipsis or (isinstance(item, slice) and item == whole) for item in rest)
        else None
    )
