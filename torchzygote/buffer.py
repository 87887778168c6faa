"""An array whose elements may be assigned while differentiating.

Decides which way of keeping the values is in use, and hands over from one to the next; how each of them works
is its module's business:

- plain memory (``_buffer.memory``), until a value arrives that something follows;
- a log of rows (``_buffer.rows``), as long as whole rows are written and read;
- a log of any writes (``_buffer.elements``);
- out-of-place operations (``_buffer.traced``) under ``torch.compile``;
- a list (``_buffer.growing``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ._buffer.array_form import ArrayForm
from ._buffer.elements import ElementLog
from ._buffer.form import model_of, shape_of
from ._buffer.growing import ListForm, ListStore
from ._buffer.index import Key, explain, parse, row_of
from ._buffer.memory import MemoryStore
from ._buffer.refusal import NotATensor, NotTensorError, refused_elements
from ._buffer.rows import FOLD, RowLog
from ._buffer.traced import TracedStore, out_of_place, selected
from ._buffer.values import (
    TEMPORARY,
    as_value,
    fit,
    is_plain,
    is_unshared_result,
    like_no_row,
    snapshot,
    value_read,
)
from ._torch_private import alike, innermost_level, is_view, object_holders

__all__ = ["Buffer"]

_references = sys.getrefcount
_recording = torch.is_grad_enabled
_FOLD_MASK = FOLD - 1  # FOLD is a power of two


class Buffer(ArrayForm, ListForm, NotATensor):
    """Array whose elements may be assigned while differentiating, or growing list of tensors.

    Parameters
    ----------
    like : tensor or array, optional
        Gives dtype, device and, where no shape is given, the shape; its values don't matter. Without it, or
        with an empty list, the Buffer is a growing list with :meth:`append`, :meth:`pop` and ``del buf[i]``.
    *shape : int
        The shape; one tuple will do.
    dtype : torch.dtype, optional
        Another dtype than that of ``like``.

    Raises
    ------
    TypeError
        A floating or complex value is written into an integer Buffer, or a complex one into a real one; a
        Buffer is used as if it were a tensor.
    IndexError
        An index is out of range.
    ValueError
        A value doesn't broadcast to the part that is written (the error is a ``RuntimeError`` too, which is
        what plain assignment raises).
    RuntimeError
        Something is written after the Buffer was copied.

    Notes
    -----
    Elements are zero until they are written. An index is anything that a tensor takes. ``buf[i] = v`` copies
    ``v``, and what is read is a value of its own: changing either in place later changes nothing here. Where
    an index array names an element twice, the last value stays. If a write raises, nothing has been written.

    Writing costs what is written, forward and backward, however large the Buffer is; reading what was just
    written costs what is read. ``copy.copy(buf)`` or ``buf.copy()`` puts the tensor together, once, and
    freezes the Buffer.

    Examples
    --------
    >>> import copy, torch
    >>> from torchzygote import Buffer, gradient
    >>> def vstack(xs):
    ...     buf = Buffer(xs, len(xs), 5)
    ...     for i in range(5):
    ...         buf[:, i] = xs
    ...     return copy.copy(buf)
    >>> vstack(torch.tensor([1., 2., 3.]))
    tensor([[1., 1., 1., 1., 1.],
            [2., 2., 2., 2., 2.],
            [3., 3., 3., 3., 3.]])
    >>> gradient(lambda x: vstack(x).sum(), torch.tensor([1., 2., 3.]))
    (tensor([5., 5., 5.]),)

    A list of tensors:

    >>> def powers(x):
    ...     buf = Buffer()
    ...     for n in range(4):
    ...         buf.append(x**n)
    ...     return torch.stack(buf.copy())
    >>> gradient(lambda x: powers(x).sum(), 2)
    (tensor(17.),)

    References
    ----------
    ``Zygote.Buffer`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """

    __slots__ = (
        "_alike",
        "_device",
        "_dtype",
        "_frozen",
        "_row_shape",
        "_rows",
        "_shape",
        "_store",
        "_traced",
    )

    def __init__(self, like: Any = None, *shape: Any, dtype: torch.dtype | None = None) -> None:
        self._frozen = False
        self._traced = torch.compiler.is_compiling()
        self._alike = like_no_row  # whether a value is like a row that was written
        self._rows: Any = None  # what rows may be written into: the list of a RowLog, or plain memory
        self._store: Any = None
        if like is None or (isinstance(like, list) and not like):
            if shape or dtype is not None:
                raise TypeError("like: expected a tensor to go with a shape or dtype, got none")
            self._store = ListStore()
            return
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype: expected a torch.dtype or None, got {dtype!r}")
        model = like if isinstance(like, Buffer) else model_of(like)
        sizes = shape_of(model.shape, shape)
        self._dtype = model.dtype if dtype is None else dtype
        self._device = model.device
        self._shape = torch.Size(sizes)
        self._row_shape = torch.Size(sizes[1:])
        if self._traced:
            zeros = (model._store.whole if isinstance(model, Buffer) else model).new_zeros(
                sizes, dtype=self._dtype
            )
            self._store = TracedStore(sizes, self._dtype, self._device, zeros)
        else:
            self._store = MemoryStore(self._shape, self._dtype, self._device)

    # -----------------------------------------------------------------------------------------------------
    # what it is

    def __len__(self) -> int:
        if isinstance(self._store, ListStore):
            return len(self._store.items)
        if not self._shape:
            raise TypeError("len: expected a Buffer with axes, got one of shape ()")
        return self._shape[0]

    def __bool__(self) -> bool:
        if isinstance(self._store, ListStore):
            return bool(self._store.items)
        raise NotTensorError("bool: expected a tensor, got a Buffer, which is not one; copy it first")

    def __iter__(self) -> Iterator[Any]:
        if self._traced:
            return (self[i] for i in range(len(self)))
        return refused_elements() or self._live()

    def __contains__(self, item: object) -> bool:
        raise NotTensorError("in: expected a tensor, got a Buffer, which is not one; copy it first")

    def __repr__(self) -> str:
        frozen = ", frozen" if self._frozen else ""
        if isinstance(self._store, ListStore):
            return f"Buffer({len(self)} tensors{frozen})"
        return (
            f"Buffer(shape={tuple(self._shape)}, dtype={self._dtype}, device={str(self._device)!r}{frozen})"
        )

    # -----------------------------------------------------------------------------------------------------
    # writing

    def __setitem__(self, index: Any, value: Any) -> None:
        rows = self._rows
        by_row = rows is not None and type(index) is int
        try:
            seen = by_row and not value.is_nested and self._alike(value)  # a nested one would end the process
        except AttributeError:  # no tensor
            seen = False
        if seen or (by_row and self._fits(value)):
            try:
                if type(rows) is list:
                    # is_unshared_result, written out: its call is a percent of a loop that does little else
                    rows[index] = (
                        value
                        if _references(value) == TEMPORARY
                        and object_holders(value) == 1
                        and not value.is_leaf
                        and not is_view(value)
                        and (seen or innermost_level() is None)
                        and _recording()
                        else value.clone()
                    )
                    if not index & _FOLD_MASK and index > 0:
                        self._store.fold(index)
                    return
                if is_plain(value):
                    rows[index] = value
                    return
            except IndexError:
                pass  # the long way says what is wrong
        ordinary = type(value) is Tensor and not self._traced
        owned = ordinary and _references(value) == TEMPORARY and is_unshared_result(value)
        self._write(index, value, owned)

    def _fits(self, value: Any) -> bool:
        """Whether ``value`` is a row that needs no conversion; later ones may be compared with it."""
        if type(value) is not Tensor or value.is_nested or value.dtype is not self._dtype:
            return False
        fits = value.shape == self._row_shape and value.device == self._device
        if not (fits and value.layout is torch.strided):
            return False
        if self._alike is like_no_row and innermost_level() is None:
            self._alike = alike(value)
        return True

    def _write(self, index: Any, given: Any, owned: bool) -> None:
        """Any write; ``owned``: the value needs no copy."""
        self._refuse_frozen("buf[i] = v")
        if isinstance(self._store, (ListStore, TracedStore)):
            self._store.write(index, given)
        else:
            value = as_value(given, self._dtype, self._device)
            try:
                self._write_at(parse(index, self._shape), value, given, owned)
            except IndexError as error:
                explain(index, self._shape, error)

    def _write_at(self, key: Key, value: Tensor, given: Any, owned: bool) -> None:
        store = self._store
        if isinstance(store, MemoryStore):
            if key.known and is_plain(value):
                store.write(key, value)
                self._rows = store.tensor if self._shape else None
                return
            store = self._start_log(store, key)
        if isinstance(store, RowLog):
            row = row_of(key)
            if type(row) is int:
                i = store.in_range(row)
                value = fit(value, self._row_shape, self._shape)
                value = value if owned else snapshot(value, given)
                store.write(i, value if value.shape == self._row_shape else value.expand(self._row_shape))
                return
            store = self._to_elements(store)
        if key.known:
            store.write(key, value if owned else snapshot(value, given))
        else:
            store.replace(out_of_place(store.assemble(), key.given, value))

    def _start_log(self, store: MemoryStore, key: Key) -> Any:
        by_rows = len(self._shape) > 0 and type(row_of(key)) is int
        kind = RowLog if by_rows else ElementLog
        log = kind(self._shape, self._dtype, self._device, store.tensor)
        self._rows = log.rows if isinstance(log, RowLog) else None
        self._alike = like_no_row
        self._store = log
        return log

    def _to_elements(self, log: RowLog) -> ElementLog:
        self._rows = None
        self._store = elements = ElementLog.from_rows(log)
        return elements

    # -----------------------------------------------------------------------------------------------------
    # reading

    def __getitem__(self, index: Any) -> Any:
        rows = self._rows
        if rows is not None and type(index) is int and -len(rows) <= index < len(rows):
            row = rows[index]
            if type(row) is Tensor and innermost_level() is None:
                return row.clone()
        store = self._store
        if isinstance(store, TracedStore):
            return store.read(index)
        if isinstance(store, ListStore):
            found = store.read(index)
            if self._traced:
                return found
            return [value_read(item) for item in found] if isinstance(found, list) else value_read(found)
        try:
            return value_read(self._read(parse(index, self._shape)))
        except IndexError as error:
            explain(index, self._shape, error)

    def _read(self, key: Key) -> Tensor:
        store = self._store
        if not key.known:
            return selected(store.assemble(), key.given)
        if isinstance(store, RowLog):
            row = row_of(key)
            if type(row) is int:
                return store.read(store.in_range(row))
            if row is not None:
                return store.read_rows(row)
            store = self._to_elements(store)
        return store.read(key)  # type: ignore[no-any-return]

    def __getstate__(self) -> tuple[None, dict[str, Any]]:
        held = {name: getattr(self, name) for name in Buffer.__slots__ if hasattr(self, name)}
        return None, {**held, "_alike": like_no_row}  # which can't be pickled

    def copy(self) -> Any:
        """The tensor (for a list, the list of tensors); the Buffer is frozen from now on.

        Returns
        -------
        torch.Tensor or list of torch.Tensor
            Nothing of the Buffer's memory is copied for it.

        Raises
        ------
        RuntimeError
            Values were written inside a ``torch.func.vmap`` or ``grad`` that has ended.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Buffer
        >>> buf = Buffer(torch.zeros(()), 3)
        >>> buf[1:] = 2
        >>> buf.copy()
        tensor([0., 2., 2.])
        >>> buf[0] = 1
        Traceback (most recent call last):
        RuntimeError: buf[i] = v: expected a Buffer that may be written, got one that was copied, ...
        """
        self._frozen = True
        self._rows = None
        return self._assembled()

    __copy__ = copy
