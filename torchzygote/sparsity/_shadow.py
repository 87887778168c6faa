"""The shadow of a piece of memory: for each of its elements the id of a set.

A view of a tensor is the same view of its shadow, which is why views need no rules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._sets import ID
from ._trace import Place, Ref

__all__ = ["Shadow"]

Unite = Callable[[Tensor, Tensor], Tensor]


class Shadow:
    """Ids of a place; kept as one tensor of ids as long as only the tensor that made the place is used.

    Parameters
    ----------
    place : Place
        The memory.
    unite : callable
        Union of ids, for complex numbers that are put together from parts.
    """

    __slots__ = ("_flat", "_ids", "_mine", "_ref", "_unit", "_unite", "place")

    def __init__(self, place: Place, unite: Unite) -> None:
        self.place = place
        self._unite = unite
        self._unit = place.itemsize
        self._ref: Ref | None = None
        self._ids: Tensor | None = None  # of the tensor self._ref; possibly repeated along dimensions
        self._flat: Tensor | None = None  # one id for each unit of memory
        self._mine = False  # nobody else holds a view of self._flat

    def read(self, ref: Ref) -> Tensor:
        """The ids of a tensor in this place."""
        if self._ids is not None and self._ref is not None and _same(ref, self._ref):
            return self._ids
        flat = self._memory(ref.dtype.itemsize)
        ids, *others = _parts(flat, ref, ref.dtype.itemsize // self._unit)
        for other in others:
            ids = self._unite(ids, other)
        if 4 * ids.numel() < flat.numel():
            return ids.clone()  # a little of much: a later write need not copy everything
        self._mine = False
        return ids

    def write(self, ref: Ref, ids: Tensor) -> None:
        """Set the ids of a tensor in this place."""
        ids = ids.expand(ref.size)
        if (self._ids is None and self._flat is None) or _covers(ref):
            self._ref, self._ids, self._flat, self._unit = ref, ids, None, ref.dtype.itemsize
            return
        flat = self._memory(ref.dtype.itemsize)
        if not self._mine:
            flat = self._flat = flat.clone()
            self._mine = True
        for part in _parts(flat, ref, ref.dtype.itemsize // self._unit):
            part.copy_(ids)

    def _memory(self, itemsize: int) -> Tensor:
        """One id for each unit of memory, units no larger than ``itemsize``."""
        if self._flat is None:
            count = self.place.nbytes // self._unit
            ref, ids = self._ref, self._ids
            if ref is not None and ids is not None and _covers(ref) and ids.is_contiguous():
                self._flat, self._mine = ids.reshape(-1), False
            else:
                self._flat, self._mine = torch.zeros(count, dtype=ID, device="cpu"), True
                if ref is not None and ids is not None:
                    self._flat.as_strided(ref.size, ref.stride, ref.offset).copy_(ids)
            self._ref = self._ids = None
        if itemsize < self._unit:
            self._flat = self._flat.repeat_interleave(self._unit // itemsize)
            self._unit, self._mine = itemsize, True
        return self._flat


def _parts(flat: Tensor, ref: Ref, ratio: int) -> list[Tensor]:
    """A tensor's view of one id for each unit of memory, ``ratio`` units to an element: one view for each."""
    # Offsets count from the start of the storage, where those of borrowed ids needn't begin.
    start = flat.storage_offset() + ref.offset * ratio
    stride = [step * ratio for step in ref.stride]
    return [flat.as_strided(ref.size, stride, start + part) for part in range(ratio)]


def _same(a: Ref, b: Ref) -> bool:
    return a.size == b.size and a.stride == b.stride and a.offset == b.offset and a.dtype == b.dtype


def _covers(ref: Ref) -> bool:
    """Whether a tensor is all of its memory, in order."""
    count = 1
    for size, step in zip(reversed(ref.size), reversed(ref.stride), strict=True):
        if size != 1 and step != count:
            return False
        count *= size
    return ref.offset == 0 and count * ref.dtype.itemsize == ref.place.nbytes
