"""Interned sets of indices: a tensor of set ids stands for a tensor of sets.

Set 0 is empty, set ``1 + i`` holds ``i`` alone; unions get new ids, equal ones the same. It must not know
what the indices or the tensors are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..native import index_sets

__all__ = ["ID", "IndexSets", "OverBudget", "broadcast_shapes", "collapsed"]

# Ids and members are int32: half the memory traffic. More than 2**31 sets would take 100 GB anyway.
ID = torch.int32
_LIMIT = 2**31 - 1


class OverBudget(Exception):
    """Detection would take more than it may."""


class IndexSets:
    """All sets of one detection, and the work that it may still do.

    Parameters
    ----------
    size : int
        Indices go from 0 to ``size - 1``.
    budget : int
        How many members may be stored in all sets together.
    nested : bool
        Remember for each set the last union that it went into.
    """

    __slots__ = ("_members", "_ptr", "_supersets", "budget", "count", "size", "used")

    def __init__(self, size: int, budget: int, *, nested: bool = False) -> None:
        if size >= _LIMIT:
            raise OverBudget
        self.size = size
        self.budget = budget
        self.count = size + 1
        self.used = size
        # Memory that isn't touched costs nothing.
        self._ptr = torch.empty(4 * size + 66, dtype=torch.int64, device="cpu")
        self._ptr[0] = 0
        torch.arange(size + 1, out=self._ptr[1 : size + 2], device="cpu")
        self._supersets = torch.zeros(size + 1, dtype=ID, device="cpu") if nested else None
        self._members = torch.empty(8 * size + 64, dtype=ID, device="cpu")
        torch.arange(size, out=self._members[:size], device="cpu")

    @property
    def ptr(self) -> Tensor:
        """Set ``s`` has the members from ``ptr[s]`` to ``ptr[s + 1]``."""
        return self._ptr[: self.count + 1]

    @property
    def members(self) -> Tensor:
        """Members of all sets, ascending within each."""
        return self._members[: self.used]

    def sizes(self, ids: Tensor) -> Tensor:
        """How many members each of these sets has."""
        ids = ids.long()
        return self._ptr[ids + 1] - self._ptr[ids]

    def spend(self, members: int) -> None:
        """Refuse what the budget doesn't allow."""
        if self.used + members > self.budget or self.used + members >= _LIMIT:
            raise OverBudget

    def _append(self, sizes: Tensor, members: Tensor) -> None:
        """Store new sets; the buffers double as they fill."""
        count, used = self.count + sizes.numel(), self.used + members.numel()
        self.spend(members.numel())
        if count + 1 > self._ptr.numel():
            self._ptr = _grown(self._ptr, self.count + 1, 2 * count + 2)
        if used > self._members.numel():
            self._members = _grown(self._members, self.used, 2 * used)
        torch.cumsum(sizes, 0, out=self._ptr[self.count + 1 : count + 1])
        self._ptr[self.count + 1 : count + 1] += self.used
        self._members[self.used : used] = members
        self.count, self.used = count, used

    def unite(self, *sets: Tensor) -> Tensor:
        """Elementwise union of tensors of ids that broadcast with each other."""
        united = sets[0]
        for other in sets[1:]:
            united = self._unite_two(united, other)
        return united

    def _unite_two(self, a: Tensor, b: Tensor) -> Tensor:
        if _is_zero(b):
            return a.expand(broadcast_shapes(a.shape, b.shape))
        if _is_zero(a):
            return b.expand(broadcast_shapes(a.shape, b.shape))
        (a, b), whole = collapsed(a, b)
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            return a.expand(whole)
        first, second = a.reshape(-1), b.reshape(-1)
        ids, sizes, members = index_sets.unite_pairs(
            self.ptr, self.members, first, second, self.budget - self.used
        )
        if ids.numel() != first.numel():
            raise OverBudget
        if sizes.numel():
            self._append(sizes, members)
        if self._supersets is not None:
            self._enclose(first, ids)
            self._enclose(second, ids)
        return ids.view(a.shape).expand(whole)

    def _enclose(self, sets: Tensor, unions: Tensor) -> None:
        """Remember that each of these sets is part of that union."""
        assert self._supersets is not None
        if self._supersets.numel() < self.count:
            longer = torch.zeros(2 * self.count, dtype=ID, device="cpu")
            longer[: self._supersets.numel()] = self._supersets
            self._supersets = longer
        self._supersets[sets.long()] = unions

    def outermost(self, among: Tensor) -> Tensor:
        """For each set the last of it and its known supersets that is ``among`` (a mask); 0 if none is."""
        assert self._supersets is not None
        among = among[: self.count]
        every = torch.arange(self.count, device="cpu")
        best = torch.where(among, every, 0)
        up = torch.zeros(self.count, dtype=torch.int64, device="cpu")
        known = min(self.count, self._supersets.numel())
        up[:known] = self._supersets[:known].long()
        sizes = self.ptr.diff()
        up[sizes[up] <= sizes] = 0  # two equal sets may have gone into each other
        up[0] = 0  # stands for none: it ends every chain
        while bool(up.any()):  # each round looks twice as far
            above = best[up]
            best = torch.where(above > 0, above, best)
            up = up[up]
        return best

    def unite_groups(self, group_ptr: Tensor, group_ids: Tensor) -> Tensor:
        """The union of each group ``group_ids[group_ptr[g]:group_ptr[g + 1]]``."""
        ids, sizes, members = index_sets.unite_groups(
            self.ptr, self.members, group_ptr, group_ids.to(ID), self.budget - self.used
        )
        if ids.numel() != group_ptr.numel() - 1:
            raise OverBudget
        if sizes.numel():
            self._append(sizes, members)
        if self._supersets is not None:
            self._enclose(group_ids, torch.repeat_interleave(ids, group_ptr.diff()))
        return ids

    def unite_dims(self, ids: Tensor, dims: Sequence[int] | None, keepdim: bool = False) -> Tensor:
        """Union along dimensions (all of them for ``None``)."""
        ndim = ids.dim()
        if ndim == 0:
            return ids
        chosen = sorted({d % ndim for d in (range(ndim) if dims is None else dims)})
        shape = [1 if d in chosen else n for d, n in enumerate(ids.shape)]
        kept = [d for d in range(ndim) if d not in chosen]
        (small,), _ = collapsed(ids)
        if 0 in ids.shape:
            united = torch.zeros((), dtype=ID, device="cpu").expand(shape)
        else:
            rows = small.permute(*kept, *chosen).reshape(
                [small.shape[d] for d in kept] + [-1] if chosen else list(small.shape) + [1]
            )
            outer, width = rows.shape[:-1], rows.shape[-1]
            if width == 1:
                found = rows[..., 0]
            else:
                count = outer.numel()
                pointers = torch.arange(count + 1, device="cpu") * width
                found = self.unite_groups(pointers, rows.reshape(-1)).view(outer)
            inner = [1 if d in chosen else small.shape[d] for d in range(ndim)]
            united = found.reshape(inner).expand(shape)
        return united if keepdim else united.reshape([ids.shape[d] for d in kept])

    def accumulate(self, base: Tensor, where: Tensor, source: Tensor) -> Tensor:
        """``base`` with ``source[k]`` united into the element ``where[k]``, counted row by row."""
        size = base.numel()
        places = torch.cat([torch.arange(size, device="cpu"), where.reshape(-1).long()])
        order = torch.sort(places, stable=True).indices
        ids = torch.cat([base.reshape(-1), source.reshape(-1)])[order]
        pointers = torch.zeros(size + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(torch.bincount(places, minlength=size), 0, out=pointers[1:])
        return self.unite_groups(pointers, ids).view(base.shape)


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """The shape that these broadcast to (PyTorch's own is slow to load, and slow)."""
    return torch.Size(np.broadcast_shapes(*map(tuple, shapes)))


def _grown(buffer: Tensor, used: int, capacity: int) -> Tensor:
    larger = torch.empty(capacity, dtype=buffer.dtype, device="cpu")
    larger[:used] = buffer[:used]
    return larger


def _is_zero(ids: Tensor) -> bool:
    """Whether all sets are known to be empty without looking at each of them."""
    if ids.numel() == 0:
        return True
    if all(stride == 0 or n == 1 for stride, n in zip(ids.stride(), ids.shape, strict=True)):
        return not ids[(0,) * ids.dim()].item()
    return False


def collapsed(*ids: Tensor) -> tuple[list[Tensor], torch.Size]:
    """Broadcast tensors with each dimension narrowed to 1 along which none of them varies, and their shape.

    What is repeated along a dimension (all hidden units of a layer) is then worked out once.
    """
    whole = broadcast_shapes(*(x.shape for x in ids))
    wide = [x.expand(whole) for x in ids]
    for d, n in enumerate(whole):
        if n > 1 and all(x.stride(d) == 0 for x in wide):
            wide = [x.narrow(d, 0, 1) for x in wide]
    return wide, whole
