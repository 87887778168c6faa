"""Unions of interned index sets in vectorized PyTorch: specification, test oracle and fallback.

Set ``s`` has the members ``members[ptr[s]:ptr[s + 1]]``, ascending; set 0 is empty. Knows nothing of
derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expand_pairs", "expand_sets", "unite_groups", "unite_pairs"]

# A fixed odd multiplier spreads members over 64 bits; sums of them tell sets apart, collisions are checked.
_SPREAD = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64))
# A set that has so many times as many members as the others of its group is asked whether it contains them.
_FEW = 16


def unite_pairs(
    ptr: Tensor, members: Tensor, a: Tensor, b: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The union of ``a[k]`` and ``b[k]`` for each ``k``; see :func:`unite_groups` for what is returned."""
    keys, inverse = torch.unique((a.long() << 32) | b.long(), return_inverse=True)
    group_ids = torch.stack([keys >> 32, keys & 0xFFFFFFFF], dim=1).reshape(-1)
    ids, sizes, new = unite_groups(
        ptr, members, torch.arange(keys.numel() + 1, device="cpu") * 2, group_ids, most
    )
    if ids.numel() != keys.numel():
        return ids, sizes, new
    return ids[inverse.reshape(-1)], sizes, new


def unite_groups(
    ptr: Tensor, members: Tensor, group_ptr: Tensor, group_ids: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The union of each group of sets, the ids of new ones counting on from the last of ``ptr``.

    Returns the id of each group's union, the sizes of the new sets and their members, ids and members in the
    dtype of ``members``. A union that equals one of its group's own sets keeps that id, equal new ones share
    one. With more than ``most`` new members, or if many times as many have to be read, all three are empty.
    """
    groups = group_ptr.numel() - 1
    ids = group_ids.long()
    owners = torch.repeat_interleave(torch.arange(groups, device="cpu"), group_ptr.diff())
    # Repeated sets within a group are dropped first; the empty set adds nothing.
    count = ptr.numel() - 1
    keys = torch.unique(owners[ids > 0] * count + ids[ids > 0])
    owners, ids = torch.div(keys, count, rounding_mode="floor"), keys % count
    known = _containing(ptr, members, owners, ids, groups)
    owners, ids = owners[known[owners] < 0], ids[known[owners] < 0]
    if int((ptr[ids + 1] - ptr[ids]).sum()) > 8 * most + (1 << 24):
        return _too_much(members.dtype)
    which, found = expand_sets(ptr, members, ids)
    width = int(members.max()) + 1 if members.numel() else 1
    keys = torch.unique(owners[which] * width + found)
    owner, member = torch.div(keys, width, rounding_mode="floor"), keys % width
    sizes = torch.bincount(owner, minlength=groups)
    # The set among its own that is as large as the union is the union.
    result = torch.full((groups,), -1, dtype=torch.int64, device="cpu")
    same = (ptr[ids + 1] - ptr[ids]) == sizes[owners]
    result[owners[same]] = ids[same]
    result[sizes == 0] = 0
    result = torch.where(known < 0, result, known)
    fresh = result < 0
    starts = torch.cumsum(sizes, 0) - sizes
    index = torch.nonzero(fresh).squeeze(1)
    if index.numel() == 0:
        return result.to(members.dtype), sizes[:0], members[:0]
    representative = _representatives(index, starts, sizes, owner, member, groups)
    kept = torch.unique(representative)
    numbers = torch.zeros(groups, dtype=torch.int64, device="cpu")
    numbers[kept] = count + torch.arange(kept.numel(), device="cpu")
    result[index] = numbers[representative]
    chosen = torch.zeros(groups, dtype=torch.bool, device="cpu")
    chosen[kept] = True
    new = member[chosen[owner]].to(members.dtype)
    if new.numel() > most:
        return _too_much(members.dtype)
    return result.to(members.dtype), sizes[kept], new


def _containing(ptr: Tensor, members: Tensor, owners: Tensor, ids: Tensor, groups: int) -> Tensor:
    """For each group the set of its own that is far larger than the others and contains them; -1 for none."""
    sizes = ptr[ids + 1] - ptr[ids]
    best = torch.zeros(groups, dtype=torch.int64, device="cpu")
    best.scatter_reduce_(0, owners, (sizes << 32) | ids, "amax")
    total = torch.zeros(groups, dtype=torch.int64, device="cpu").index_add_(0, owners, sizes)
    largest, size = best & 0xFFFFFFFF, best >> 32
    asked = (size > 0) & ((total - size) * _FEW <= size)
    small = asked[owners] & (ids != largest[owners])
    which, found = expand_sets(ptr, members, ids[small])
    # Members of the large sets, each set's above those of the set before: one ascending list to look in.
    sets = torch.unique(largest[asked])
    width = int(members.max()) + 1 if members.numel() else 1
    number, inside = expand_sets(ptr, members, sets)
    there = number * width + inside
    wanted = torch.searchsorted(sets, largest[owners[small]])[which] * width + found
    place = torch.searchsorted(there, wanted).clamp(max=max(there.numel() - 1, 0))
    asked[owners[small][which[there[place] != wanted]]] = False
    return torch.where(asked, largest, -1)


def _representatives(
    index: Tensor, starts: Tensor, sizes: Tensor, owner: Tensor, member: Tensor, groups: int
) -> Tensor:
    """For each of these groups the first one with an equal union."""
    mixed = (member + 1) * _SPREAD[0]
    mixed = (mixed ^ (mixed >> 29)) * _SPREAD[1]
    mixed = mixed ^ (mixed >> 32)
    sums = torch.zeros(groups, dtype=torch.int64, device="cpu").index_add_(0, owner, mixed)
    _, inverse = torch.unique(sums[index], return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), index.numel(), dtype=torch.int64, device="cpu")
    first.scatter_reduce_(0, inverse, torch.arange(index.numel(), device="cpu"), "amin")
    representative = index[first[inverse]]
    other = torch.nonzero(representative != index).squeeze(1)
    mine, theirs = index[other], representative[other]
    equal = sizes[mine] == sizes[theirs]
    # Equal sums are no proof: compare the members themselves.
    length = torch.where(equal, sizes[mine], 0)
    step = torch.arange(int(length.sum()), device="cpu") - torch.repeat_interleave(
        length.cumsum(0) - length, length
    )
    left = member[torch.repeat_interleave(starts[mine], length) + step]
    right = member[torch.repeat_interleave(starts[theirs], length) + step]
    line = torch.repeat_interleave(torch.arange(other.numel(), device="cpu"), length)
    equal[line[left != right]] = False
    representative[other[~equal]] = index[other[~equal]]
    return representative


def _too_much(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    nothing = torch.empty(0, dtype=dtype, device="cpu")
    return nothing, torch.empty(0, dtype=torch.int64, device="cpu"), nothing


def expand_sets(ptr: Tensor, members: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """All members of these sets, one set after the other (int64): the position in ``ids``, the member."""
    ids = ids.long()
    begin = ptr[ids]
    sizes = ptr[ids + 1] - begin
    which = torch.repeat_interleave(torch.arange(ids.numel(), device="cpu"), sizes)
    offsets = begin - (torch.cumsum(sizes, 0) - sizes)
    return which, members[offsets[which] + torch.arange(which.numel(), device="cpu")].long()


def expand_pairs(
    ptr: Tensor, members: Tensor, a: Tensor, b: Tensor, bounds: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The symmetric pattern with the entries (i, j) and (j, i) for all i in set ``a[k]``, j in set ``b[k]``.

    Only entries within one of the diagonal blocks ``bounds[c]`` to ``bounds[c + 1]`` count. Row pointers and
    ascending columns, int64; both empty with more than ``most`` entries, repeated ones counted here.
    """
    a, b = a.long(), b.long()
    size = int(bounds[-1])
    first, second = ptr[a + 1] - ptr[a], ptr[b + 1] - ptr[b]
    if int((first * second).sum()) > most:
        return torch.empty(0, dtype=torch.int64, device="cpu"), torch.empty(
            0, dtype=torch.int64, device="cpu"
        )
    which, rows = expand_sets(ptr, members, a)
    line, columns = expand_sets(ptr, members, b[which])
    rows = rows[line]
    if bounds.numel() > 2:
        inside = torch.bucketize(rows, bounds, right=True) == torch.bucketize(columns, bounds, right=True)
        rows, columns = rows[inside], columns[inside]
    keys = torch.unique(torch.cat([rows * size + columns, columns * size + rows]))
    indptr = torch.zeros(size + 1, dtype=torch.int64, device="cpu")
    width = max(size, 1)
    torch.cumsum(
        torch.bincount(torch.div(keys, width, rounding_mode="floor"), minlength=size), 0, out=indptr[1:]
    )
    return indptr, keys % width
