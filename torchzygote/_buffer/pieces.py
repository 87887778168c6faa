"""Values of a log, in parts: joined to be gathered from, and split where they are often read in small parts.

A value that is often read in small parts is split, once, into a tree of chunks: otherwise each part's
backward pass would cost the whole value. Knows nothing of who reads.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .values import recorded

__all__ = ["Pieces", "Positions", "cover", "flat", "gather", "groups"]

_BRANCHES = 64  # chunks that a value is split into
_WHOLE = 16  # values of up to this many elements are never split
_WASTE = 4  # a value is taken whole if at least one in so many of its elements is wanted
# Elements that pass by, there and back, in the time that a chunk takes to be made and read by itself. (Each
# takes a nanosecond or two; splitting takes 200 microseconds, and as much again in each chunk.)
_WORTH_A_CHUNK = 1 << 17

Positions = np.ndarray[Any, np.dtype[np.int64]]


class _Chunks:
    """A value that is read in parts: as a whole, until chunks of ``size`` elements are worth making.

    ``parts``: the chunks, tensors or chunks again. ``wasted``: elements that were read with others.
    """

    __slots__ = ("parts", "size", "wasted", "whole")

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole
        self.size = max(-(-whole.numel() // _BRANCHES), 1)
        self.wasted = 0
        self.parts: list[Any] | None = None

    def split_for(self, chunks: int) -> list[Any] | None:
        """The chunks, for a read in so many of them; ``None`` where the whole is cheaper still."""
        if self.parts is None:
            self.wasted += self.whole.numel()
            if self.wasted <= _WORTH_A_CHUNK * chunks:
                return None
            with recorded():
                self.parts = list(torch.split(self.whole, self.size))
        return self.parts


class Pieces:
    """Parts of the log in ascending order: where each begins, its elements as a flat tensor or a number."""

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.tensors: list[Tensor] = []

    def add(self, start: int, tensor: Tensor) -> None:
        self.starts.append(start)
        self.tensors.append(tensor)

    def joined(self) -> Tensor:
        """All elements, flat; of a single piece the piece itself, in its shape."""
        parts: list[Tensor] = []
        for numbers, tensors in groupby(self.tensors, _is_number):  # to flatten each takes longer
            if numbers:
                parts.append(torch.stack(list(tensors)))
            else:
                parts.extend(tensors)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def locate(self, wanted: Positions) -> Positions:
        """Where the positions ``wanted`` of the log are in :meth:`joined`."""
        starts = np.array(self.starts, dtype=np.int64)
        sizes = np.array([tensor.numel() for tensor in self.tensors], dtype=np.int64)
        shifts = starts - (np.cumsum(sizes) - sizes)
        if len(starts) == 1:
            shift: Positions = shifts[:1]
            return wanted - shift
        located: Positions = wanted - shifts[np.searchsorted(starts, wanted, "right") - 1]
        return located


def _is_number(tensor: Tensor) -> bool:
    return tensor.ndim == 0


def flat(node: Any) -> Tensor:
    """Flat, or a number as it is."""
    tensor: Tensor = node.whole if isinstance(node, _Chunks) else node
    return tensor if tensor.ndim <= 1 else tensor.reshape(tensor.numel())  # -1 could be anything if empty


def groups(ids: Positions, ascending: Positions) -> Any:
    """For each of the ascending ``ids`` the part of ``ascending`` that belongs to it."""
    cuts = np.flatnonzero(np.diff(ids)) + 1
    firsts = [0, *cuts.tolist()]
    lasts = [*cuts.tolist(), len(ids)]
    for a, b in zip(firsts, lasts, strict=True):
        yield int(ids[a]), ascending[a:b]


def cover(node: Any, size: int, lo: int, hi: int, base: int, pieces: Pieces) -> Any:
    """Add elements ``lo`` to ``hi`` of a node, exactly; returns the node, split if that was needed."""
    if lo == 0 and hi == size:
        pieces.add(base, flat(node))
    elif size <= _WHOLE or (hi - lo) * _WASTE >= size:
        pieces.add(base + lo, flat(node)[lo:hi])
    else:
        if not isinstance(node, _Chunks):
            node = _chunks_of(node)
        step = node.size
        first, last = lo // step, (hi - 1) // step
        parts = node.split_for(last + 1 - first)
        if parts is None:
            pieces.add(base + lo, node.whole[lo:hi])
            return node
        for c in range(first, last + 1):
            start, end = c * step, min((c + 1) * step, size)
            parts[c] = cover(
                parts[c], end - start, max(lo - start, 0), min(hi, end) - start, base + start, pieces
            )
    return node


def _chunks_of(node: Tensor) -> _Chunks:
    with recorded():
        return _Chunks(flat(node))


def gather(node: Any, size: int, wanted: Positions, base: int, pieces: Pieces) -> Any:
    """Add what holds the ascending positions ``wanted`` of a node; returns it, split if that was needed."""
    if size <= _WHOLE or wanted.size * _WASTE >= size:
        pieces.add(base, flat(node))
        return node
    if not isinstance(node, _Chunks):
        node = _chunks_of(node)
    step = node.size
    wanted_of = list(groups(wanted // step, wanted))
    parts = node.split_for(len(wanted_of))
    if parts is None:
        pieces.add(base, node.whole)
        return node
    for c, part in wanted_of:
        start, end = c * step, min((c + 1) * step, size)
        parts[c] = gather(parts[c], end - start, part - start, base + start, pieces)
    return node
