"""The list form of a Buffer: tensors of any shapes, appended while differentiating.

Knows nothing of arrays: each element is kept whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import is_number, number_to_tensor, numpy_to_tensor, type_name
from .._torch_private import innermost_level, is_wrapped
from .refusal import NotTensorError
from .values import not_a_value, value_read

__all__ = ["ListForm", "ListStore"]


def _as_element(value: Any) -> Tensor:
    """A snapshot of ``value`` as a tensor."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return numpy_to_tensor(value).clone()
    if is_number(value):
        return number_to_tensor(value)
    raise not_a_value(value)


def _of_ended() -> RuntimeError:
    return RuntimeError(
        "copy: expected values that are still there, got some that were written inside a torch.func.vmap or "
        "grad that has ended; make the Buffer inside, or write what the transform returns"
    )


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


class ListForm:
    """What a Buffer does as a growing list."""

    __slots__ = ()

    _frozen: bool
    _shape: torch.Size
    _store: Any
    _traced: bool

    def _list(self, what: str) -> ListStore:
        store = self._store
        if not isinstance(store, ListStore):
            raise NotTensorError(
                f"{what}: expected a growing list, Buffer(), got a Buffer of shape {tuple(self._shape)}"
            )
        return store

    def _refuse_frozen(self, what: str) -> None:
        if self._frozen:
            raise RuntimeError(
                f"{what}: expected a Buffer that may be written, got one that was copied, which freezes it; "
                "write before copying, or into a new Buffer"
            )

    def _live(self) -> Iterator[Any]:
        """The elements one after the other, as a list gives them: also those that are appended meanwhile."""
        buffer: Any = self
        i = 0
        while i < len(buffer):
            yield buffer[i]
            i += 1

    def _assembled(self) -> Any:
        """The tensor or the list that it stands for."""
        try:
            found = self._store.assemble()
        except RuntimeError as error:
            if "escaped" in str(error) or "INTERNAL ASSERT" in str(error):
                raise _of_ended() from None
            raise
        alone = isinstance(found, list) and not self._traced and innermost_level() is None
        if alone and any(map(is_wrapped, found)):
            raise _of_ended()
        return found

    def append(self, value: Any) -> None:
        """Add an element at the end of a growing list.

        Parameters
        ----------
        value : tensor, array or number
            Of any shape and dtype. The element is a copy.

        Raises
        ------
        TypeError
            The Buffer has a shape, or ``value`` is something else.
        RuntimeError
            The Buffer was copied.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Buffer
        >>> buf = Buffer()
        >>> buf.append(1)
        >>> buf.append(torch.tensor([2., 3.]))
        >>> buf.copy()
        [tensor(1.), tensor([2., 3.])]
        """
        store = self._list("append")
        self._refuse_frozen("append")
        store.append(value)

    def pop(self, index: int = -1) -> Tensor:
        """Remove an element of a growing list, and return it.

        Parameters
        ----------
        index : int
            Which one, counted from the end where it is negative; by default the last.

        Returns
        -------
        torch.Tensor
            The element.

        Raises
        ------
        IndexError
            There is no such element.
        TypeError
            The Buffer has a shape, or ``index`` is no int.
        RuntimeError
            The Buffer was copied.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Buffer
        >>> buf = Buffer()
        >>> for i in range(3):
        ...     buf.append(i)
        >>> buf.pop(), buf.pop(0), len(buf)
        (tensor(2.), tensor(0.), 1)
        """
        store = self._list("pop")
        self._refuse_frozen("pop")
        return store.pop(index) if self._traced else value_read(store.pop(index))

    def __delitem__(self, index: int | slice) -> None:
        store = self._list("del buf[i]")
        self._refuse_frozen("del buf[i]")
        store.delete(index)
