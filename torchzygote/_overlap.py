"""Which tensors can be written into, and which would be changed by a write into others.

By addresses: a view, another view of the same base and a tensor that NumPy shares need no telling apart.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._memory_layout import non_overlapping
from ._metadata import TENSOR_TYPES, Metadata, extent_of, metadata_of
from ._torch_private import has_meta_storage, storage_key, uncoalesced_values

__all__ = [
    "AddressRanges",
    "all_apart",
    "can_be_written",
    "detached_from",
    "is_unresolved",
    "known_apart",
    "span_of",
    "writable",
]

_STRIDED = torch.strided
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

_address: Callable[[Any], int] = Tensor.data_ptr
_FEW = 64
_ALL = 1 << 63
_NOTHING = Metadata(())


def is_unresolved(x: Tensor) -> bool:
    """Whether ``x`` is a conjugate or a negative view, which multi-tensor calls don't write into."""
    return x.is_conj() or x.is_neg()


def can_be_written(x: Tensor) -> bool:
    """Whether ``x.copy_(y)`` works: not into sparse, nested, expanded and inference tensors."""
    return (
        x.layout is _STRIDED
        and not x.is_nested
        and (x.is_contiguous() or non_overlapping(x))
        and (not x.is_inference() or torch.is_inference_mode_enabled())
    )


def span_of(x: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last; 0 for what has no memory."""
    if x.layout is not _STRIDED:
        if x.layout is torch.sparse_coo:
            x = uncoalesced_values(x)
        elif x.layout in _COMPRESSED:
            x = x.values()
        else:
            return 0, 0
    if x.is_meta or (type(x) not in TENSOR_TYPES and has_meta_storage(x)):  # fake ones warn of being asked
        return _span_in_storage(x, exact=True)
    try:
        start = x.data_ptr()
    except RuntimeError:  # a wrapper
        start = 0
    return (start, start + extent_of(x)) if start else _span_in_storage(x, exact=False)


def _span_in_storage(x: Tensor, exact: bool) -> tuple[int, int]:
    """The same of what has no address, in numbers beyond all addresses: 2**64 for each storage.

    Functional tensors don't tell where in their storage they are, nor fake ones of unknown size: all of it.
    """
    if not (key := storage_key(x)) or x.numel() == 0:
        return 0, 0
    offset, extent = (x.storage_offset() * x.element_size(), extent_of(x)) if exact else (0, _ALL)
    if not (isinstance(offset, int) and isinstance(extent, int)):
        offset, extent = 0, _ALL
    return (key << 64) + offset, (key << 64) + offset + extent


class AddressRanges:
    """What a set of tensors occupies."""

    def __init__(self, xs: Iterable[Tensor]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(map(span_of, xs)):
            if self._ends and start < self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(start)
                self._ends.append(end)

    def meets(self, x: Tensor) -> bool:
        """Whether a write into the tensors might change ``x``, or the other way round."""
        start, end = span_of(x)
        first = bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] < end


def all_apart(written: Sequence[Tensor], read: Sequence[Tensor] = ()) -> bool:
    """Whether one call can write into all of ``written``, which changes no other one, and none of ``read``.

    Told fast for the common case; ``False`` where it takes a closer look.
    """
    if not written:
        return True
    mine, theirs = metadata_of(written), metadata_of(read) if read else None
    if mine is None or (read and theirs is None):
        return False
    return known_apart(written, mine, read, theirs)


def known_apart(
    written: Sequence[Tensor], mine: Metadata, read: Sequence[Tensor] = (), theirs: Metadata | None = None
) -> bool:
    """The same of tensors whose metadata are known."""
    if mine.extents is None or not mine.writable():
        return False
    if theirs is None:
        theirs, read = _NOTHING, ()
    if theirs.extents is None:
        return False
    try:
        addresses = [*map(_address, written), *map(_address, read)]
    except RuntimeError:  # wrappers have no addresses
        return False
    if mine.were_apart(theirs, addresses):
        return True
    # As many spans have ended as have begun exactly where none lies over another.
    apart: bool
    if len(addresses) <= _FEW:  # NumPy takes ten microseconds to begin
        ends = sorted(map(operator.add, addresses, [*mine.extents, *theirs.extents]))
        apart = True not in map(operator.gt, ends, sorted(addresses)[1:])
    else:
        starts = np.array(addresses, dtype=np.uint64)
        past = starts + np.concatenate((mine.extents_as_array(), theirs.extents_as_array()))
        starts.sort()
        past.sort()
        apart = not np.count_nonzero(past[:-1] > starts[1:])
    if apart:
        mine.found_apart(theirs, addresses)
    return apart


def writable(xs: Sequence[Tensor], kept: Sequence[Tensor] = ()) -> tuple[list[int], list[int]]:
    """Positions of the tensors that one call can write into, and of those that must be replaced instead.

    Those can't be written into, are unresolved, or lie over another one or over one of ``kept``.
    """
    if all_apart(xs, kept):
        return list(range(len(xs))), []
    memory = AddressRanges(kept)
    can = [i for i, x in enumerate(xs) if can_be_written(x) and not is_unresolved(x) and not memory.meets(x)]
    reached = 0
    apart = set()
    for start, end, i in sorted((*span_of(xs[i]), i) for i in can):
        if end == 0 or start >= reached:
            apart.add(i)
            reached = end
    return sorted(apart), [i for i in range(len(xs)) if i not in apart]


def detached_from(xs: list[Tensor], written: list[int], ys: list[Tensor]) -> list[Tensor]:
    """``ys``, cloned where a write into one of ``written`` would change it before it is read.

    What is combined with the very value that it is may stay.
    """
    memory = AddressRanges(xs[i] for i in written)
    inside = set(written)
    return [
        y.clone() if memory.meets(y) and not (i in inside and _same_view(xs[i], y)) else y
        for i, y in enumerate(ys)
    ]


def _same_view(x: Tensor, y: Tensor) -> bool:
    if x is y:
        return True
    if y.layout is not _STRIDED or x.dtype is not y.dtype or x.shape != y.shape or x.stride() != y.stride():
        return False
    start, end = span_of(x)
    return (start, end) == span_of(y) and end - start != _ALL and not is_unresolved(y)
