"""Unions of interned index sets: compiled where that was possible, otherwise vectorized PyTorch.

What each function computes is said in :mod:`torchzygote.native.reference_sets`.
"""

from __future__ import annotations

from torch import Tensor

from . import _loading, reference_sets
from .reference_sets import expand_sets

__all__ = ["expand_pairs", "expand_sets", "unite_groups", "unite_pairs"]

_Sets = tuple[Tensor, Tensor, Tensor]
_compiled = "cpu" in _loading.loaded_devices
if _compiled:
    _unite_sets = _loading.operator("unite_sets")
    _unite_pairs = _loading.operator("unite_pairs")
    _expand_pairs = _loading.operator("expand_pairs")


def unite_pairs(ptr: Tensor, members: Tensor, a: Tensor, b: Tensor, most: int) -> _Sets:
    """The union of ``a[k]`` and ``b[k]`` for each ``k``; see :func:`unite_groups` for what is returned."""
    if not _compiled:
        return reference_sets.unite_pairs(ptr, members, a, b, most)
    first, second = a.to(members.dtype).contiguous(), b.to(members.dtype).contiguous()
    ids, sizes, new = _unite_pairs(ptr, members, first, second, most)
    return ids, sizes, new


def unite_groups(ptr: Tensor, members: Tensor, group_ptr: Tensor, group_ids: Tensor, most: int) -> _Sets:
    """The union of each group of sets, the ids of new ones counting on from the last of ``ptr``.

    Returns the id of each group's union, the sizes of the new sets and their members, ids and members in the
    dtype of ``members``. A union that equals one of its group's own sets keeps that id, equal new ones share
    one. With more than ``most`` new members, or if many times as many have to be read, all three are empty.
    """
    if not _compiled:
        return reference_sets.unite_groups(ptr, members, group_ptr, group_ids, most)
    ids, sizes, new = _unite_sets(
        ptr, members, group_ptr.contiguous(), group_ids.to(members.dtype).contiguous(), most
    )
    return ids, sizes, new


def expand_pairs(
    ptr: Tensor, members: Tensor, a: Tensor, b: Tensor, bounds: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """The symmetric pattern with the entries (i, j) and (j, i) for all i in set ``a[k]``, j in set ``b[k]``.

    Only entries within one of the diagonal blocks ``bounds[c]`` to ``bounds[c + 1]`` count. Row pointers and
    ascending columns, int64; both empty with more than ``most`` entries, or if many times as many have to be
    read.
    """
    if not _compiled:
        return reference_sets.expand_pairs(ptr, members, a, b, bounds, most)
    indptr, indices = _expand_pairs(ptr, members, a.contiguous(), b.contiguous(), bounds, most)
    return indptr, indices
