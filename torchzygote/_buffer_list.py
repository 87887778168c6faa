"""The list form of a Buffer: tensors of any shapes, appended while differentiating.

Knows nothing of arrays: each element is kept whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ._arguments import number_to_tensor, numpy_to_tensor, type_name
from ._buffer_values import not_a_value

__all__ = ["ListStore"]


def _as_element(value: Any) -> Tensor:
    """A snapshot of ``value`` as a tensor."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return numpy_to_tensor(value).clone()
    if isinstance(value, (int, float, complex, np.number)) and not isinstance(value, bool):
        return number_to_tensor(value)
    raise not_a_value(value)


class ListStore:
    """A list of tensors that belong to nobody else."""

    def __init__(self) -> None:
        self.items: list[Tensor] = []

    def append(self, value: Any) -> None:
        """One more element at the end."""
        self.items.append(_as_element(value))

    def pop(self, index: int) -> Tensor:
        """Remove an element and return it."""
        if not self.items:
            raise IndexError("pop: expected a Buffer with elements, got an empty one")
        return self.items.pop(self._position("pop", index))

    def delete(self, index: int | slice) -> None:
        """Remove an element, or those of a slice."""
        if isinstance(index, slice):
            del self.items[index]
        else:
            del self.items[self._position("del buf[i]", index)]

    def read(self, index: int | slice) -> Any:
        """A fresh copy of an element; a list of them for a slice."""
        if isinstance(index, slice):
            return [item.clone() for item in self.items[index]]
        return self.items[self._position("buf[i]", index)].clone()

    def write(self, index: int, value: Any) -> None:
        """Replace an element."""
        self.items[self._position("buf[i] = v", index)] = _as_element(value)

    def assemble(self) -> list[Tensor]:
        """The elements themselves, in a new list."""
        return list(self.items)

    def _position(self, what: str, index: Any) -> int:
        if isinstance(index, (bool, slice)) or not hasattr(index, "__index__"):
            raise TypeError(f"{what}: expected an int for a growing list, got {type_name(index)}")
        position = index.__index__()
        count = len(self.items)
        if not -count <= position < count:
            raise IndexError(f"{what}: expected an index within {count} elements, got {position}")
        return int(position % count)
