"""Buffers that a function reads from outside: what it read is there again as it runs again.

A Buffer that such a function holds gets a class that tells of its reads, for the rest of its life; others pay
nothing. Knows nothing of derivatives.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .._buffer.growing import ListStore
from .._buffer.index import parse
from .._buffer.values import value_read
from .._torch_private import aside_of_checkpoint, under_hooks
from ..buffer import Buffer

__all__ = ["Reads", "is_buffer"]

_NOTHING = object()


class _ReadState(threading.local):
    """Per thread: the runs whose reads are noted, one inside the other, and what a rerun gets again."""

    def __init__(self) -> None:
        self.noting: list[Reads] = []
        self.again: dict[int, Iterator[Any]] = {}


_reading = _ReadState()


def is_buffer(value: Any) -> bool:
    """Whether ``value`` is a Buffer, watched or not."""
    return type(value) is Buffer or type(value) is _Watched


class _Watched(Buffer):
    """A Buffer that tells of its reads and writes."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        found = _read_then(self)
        if found is _NOTHING:
            # What a read saves is not the function's, which is given the same again without reading.
            with aside_of_checkpoint() if under_hooks() else contextlib.nullcontext():
                found = super().__getitem__(index)
        for reads in _reading.noting:
            found = reads.note(self, index, found)
        return found

    def __len__(self) -> int:
        if not _is_list(self):
            return super().__len__()
        count: Any = _read_then(self)
        if count is _NOTHING:
            count = super().__len__()
        for reads in _reading.noting:
            reads.note(self, ..., count)
        return count  # type: ignore[no-any-return]

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._tell_of_write(index)

    def append(self, value: Any) -> None:
        super().append(value)
        self._tell_of_write(...)

    def pop(self, index: int = -1) -> Tensor:
        found = super().pop(index)
        self._tell_of_write(...)
        return found

    def __delitem__(self, index: int | slice) -> None:
        super().__delitem__(index)
        self._tell_of_write(...)

    def _tell_of_write(self, index: Any) -> None:
        for reads in _reading.noting:
            reads.note_write(self, index)


def _is_list(buffer: Buffer) -> bool:
    return isinstance(buffer._store, ListStore)


def _read_then(buffer: Buffer) -> Any:
    """What the first run got at this point of the rerun; nothing if it isn't to be given again."""
    return next(_reading.again.get(id(buffer), iter(())), _NOTHING) if _reading.again else _NOTHING


def _fresh(found: Any) -> Any:
    """A copy, which may be written in place."""
    if isinstance(found, list):
        return [value_read(x.clone()) for x in found]
    return value_read(found.clone()) if isinstance(found, Tensor) else found


class Reads:
    """What one run reads from ``buffers``: a context around it; :meth:`again` is one around a rerun.

    ``adopt`` is told the tensors that are read.
    """

    __slots__ = ("_adopt", "_buffers", "_found", "_written")

    def __init__(self, buffers: Sequence[Buffer], adopt: Callable[[Tensor], None] | None) -> None:
        self._buffers = {id(buffer): buffer for buffer in buffers if not buffer._traced}
        self._adopt = adopt
        self._found: dict[int, list[Any]] = {key: [] for key in self._buffers}
        # Elements that the run has written itself, and the rerun writes again before it reads them.
        self._written: dict[int, np.ndarray[Any, Any]] = {}
        for buffer in self._buffers.values():
            if type(buffer) is Buffer:
                buffer.__class__ = _Watched

    def __enter__(self) -> None:
        _reading.noting.append(self)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        _reading.noting.remove(self)

    def note(self, buffer: Buffer, index: Any, found: Any) -> Any:
        """``found`` was read; returns what ``f`` gets, which it may write to."""
        entries = self._found.get(id(buffer))
        if entries is None:
            return found
        if self._is_written(buffer, index):
            entries.append(_NOTHING)
            return found
        entries.append(found)
        if self._adopt is not None:
            for x in found if isinstance(found, list) else (found,):
                if isinstance(x, Tensor):
                    self._adopt(x)
        return _fresh(found)

    def note_write(self, buffer: Buffer, index: Any) -> None:
        """The run itself wrote there."""
        if id(buffer) not in self._found:
            return
        written = self._written.get(id(buffer))
        if written is None:
            shape = () if _is_list(buffer) else tuple(buffer.shape)
            written = self._written[id(buffer)] = np.zeros(shape, dtype=bool)
        key = None if _is_list(buffer) else parse(index, written.shape)
        if key is None or not key.known:
            written[...] = True
        else:
            key.assign(written, True)

    def _is_written(self, buffer: Buffer, index: Any) -> bool:
        written = self._written.get(id(buffer))
        if written is None:
            return False
        key = None if _is_list(buffer) else parse(index, written.shape)
        return True if key is None or not key.known else bool(np.any(key.select(written)))

    def again(self) -> Callable[[], None]:
        """From here on what is read is what was read then, until the function returned is called."""
        before = _reading.noting, _reading.again
        _reading.noting = []
        _reading.again = {
            key: (x if x is _NOTHING else _fresh(x) for x in entries) for key, entries in self._found.items()
        }

        def end() -> None:
            _reading.noting, _reading.again = before

        return end
