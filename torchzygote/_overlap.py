"""Which tensors can be written into, and which would be changed by a write into others.

By addresses: a view, another view of the same base and a tensor that NumPy shares need no telling apart.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ._engine import non_overlapping

__all__ = ["Memory", "all_apart", "can_be_written", "detached_from", "is_unresolved", "writable"]

_STRIDED = torch.strided
_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def is_unresolved(x: Tensor) -> bool:
    """Whether ``x`` is a conjugate or a negative view, which multi-tensor calls don't write into."""
    return x.is_conj() or x.is_neg()


def can_be_written(x: Tensor) -> bool:
    """Whether ``x.copy_(y)`` works: not into sparse, expanded and inference tensors."""
    return (
        x.layout is _STRIDED
        and (x.is_contiguous() or non_overlapping(x))
        and (not x.is_inference() or torch.is_inference_mode_enabled())
    )


def _span(x: Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last; 0 for what has no memory."""
    if x.layout is torch.sparse_coo:
        x = x._values()
    elif x.layout in _COMPRESSED:
        x = x.values()
    if x.layout is not _STRIDED or x.numel() == 0 or x.device.type == "meta":
        return 0, 0
    try:
        start = x.data_ptr()
    except RuntimeError:  # a wrapper
        return 0, 0
    return start, start + _extent(x)


def _extent(x: Tensor) -> int:
    """How many bytes from the first element to behind the last."""
    if x.is_contiguous():
        return x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return (last + 1) * x.element_size()


class Memory:
    """What a set of tensors occupies."""

    def __init__(self, xs: Iterable[Tensor]) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in sorted(map(_span, xs)):
            if self._ends and start < self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(start)
                self._ends.append(end)

    def meets(self, x: Tensor) -> bool:
        """Whether a write into the tensors might change ``x``, or the other way round."""
        start, end = _span(x)
        first = bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] < end


def all_apart(xs: list[Tensor], ys: Sequence[Tensor] = ()) -> bool:
    """Whether a write into each of ``xs`` changes no other one, and none of ``ys`` at another position.

    Told fast for the common case, all dense; ``False`` where it takes a closer look. What is unresolved isn't
    seen.
    """
    ends: dict[int, int] = {}
    for x in xs:
        if x.is_inference() or not (x.is_contiguous() or non_overlapping(x)):
            return False
        ends[x.data_ptr()] = _extent(x)
    count = len(xs)
    for x, y in zip(xs, ys, strict=False):
        if y is not x:
            ends[y.data_ptr()] = _extent(y)
            count += 1
    return len(ends) == count and all(a + ends[a] <= b for a, b in pairwise(sorted(ends)))


def writable(xs: list[Tensor]) -> tuple[list[int], list[int]]:
    """Positions of the tensors that one call can write into, and of those that must be replaced instead.

    Those can't be written into, are unresolved, or lie over another one.
    """
    can = [i for i, x in enumerate(xs) if can_be_written(x) and not is_unresolved(x)]
    reached = 0
    apart = set()
    for start, end, i in sorted((*_span(xs[i]), i) for i in can):
        if end == 0 or start >= reached:
            apart.add(i)
            reached = end
    return sorted(apart), [i for i in range(len(xs)) if i not in apart]


def detached_from(xs: list[Tensor], written: list[int], ys: list[Tensor]) -> list[Tensor]:
    """``ys``, cloned where a write into one of ``written`` would change it before it is read.

    What is combined with the very value that it is may stay.
    """
    memory = Memory(xs[i] for i in written)
    inside = set(written)
    return [
        y.clone() if memory.meets(y) and not (i in inside and _same_view(xs[i], y)) else y
        for i, y in enumerate(ys)
    ]


def _same_view(x: Tensor, y: Tensor) -> bool:
    return x is y or (
        y.layout is _STRIDED
        and x.data_ptr() == y.data_ptr()
        and x.dtype is y.dtype
        and x.shape == y.shape
        and x.stride() == y.stride()
        and not is_unresolved(y)
    )
