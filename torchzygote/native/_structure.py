"""Index sets and graphs: what is found out before anything is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from . import index_sets, reference
from ._choice import compiled, on_cpu
from ._loading import operator

__all__ = ["color_graph", "unite_sets"]

_NO_LIMIT = 2**62
if on_cpu:
    _color_graph = operator("color_graph")


def unite_sets(
    set_ptr: Tensor, set_members: Tensor, group_ptr: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Unions of index sets, each union once.

    Set ``s`` has the members ``set_members[set_ptr[s]:set_ptr[s + 1]]``, sorted; group ``g`` unites the sets
    ``group_ids[group_ptr[g]:group_ptr[g + 1]]``. All int64, on the CPU.

    Parameters
    ----------
    set_ptr, set_members, group_ptr, group_ids : torch.Tensor
        Sets and groups as above.

    Returns
    -------
    ids, set_ptr, set_members : torch.Tensor
        The id of each group's union, and all sets, the new ones appended. A union that equals one of its
        group's own sets keeps that id, and equal unions share one.

    Raises
    ------
    ValueError
        An array isn't int64 on the CPU, or its pointers or ids are out of range.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import unite_sets
    >>> ptr, members = torch.tensor([0, 1, 2]), torch.tensor([3, 5])
    >>> unite_sets(ptr, members, torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]))
    (tensor([2, 1]), tensor([0, 1, 2, 4]), tensor([3, 5, 3, 5]))
    """
    if not compiled(set_ptr, set_members, group_ptr, group_ids):
        return reference.unite_sets(set_ptr, set_members, group_ptr, group_ids)
    ids, sizes, new = index_sets.unite_groups(set_ptr, set_members, group_ptr, group_ids, _NO_LIMIT)
    return ids, torch.cat([set_ptr, set_ptr[-1:] + sizes.cumsum(0)]), torch.cat([set_members, new])


def color_graph(indptr: Tensor, indices: Tensor, ncols: int, kind: str, order: str) -> Tensor | None:
    """Greedy coloring of a sparse pattern, for graphs of tens of millions of entries.

    Parameters
    ----------
    indptr, indices : torch.Tensor
        The pattern, row by row: int64, and int64 or int32; symmetric for ``"distance1"`` and ``"star"``.
    ncols : int
        Number of columns.
    kind : {"distance1", "distance2_rows", "distance2_columns", "star"}
        distance1: neighbors differ. distance2_rows: rows that share a column differ. distance2_columns:
        columns that share a row differ. star: a proper coloring in which every path on four vertices has at
        least three colors.
    order : {"natural", "largest_first"}
        The order in which vertices take the smallest color that is left to them.

    Returns
    -------
    torch.Tensor or None
        A color for each row or column, int64, from 0 on. ``None`` where the native library isn't loaded: the
        same in Python is :func:`torchzygote.coloring.greedy.color_graph`.

    Raises
    ------
    ValueError
        ``kind`` or ``order`` is another word, or the pattern is none.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import color_graph
    >>> indptr, columns = torch.tensor([0, 2, 4, 6]), torch.tensor([0, 1, 1, 2, 2, 3])  # x[1:] - x[:-1]
    >>> colors = color_graph(indptr, columns, 4, "distance2_columns", "natural")
    >>> colors is None or colors.tolist() == [0, 1, 0, 1]
    True
    """
    if not compiled(indptr, indices):
        return None
    colors: Tensor = _color_graph(indptr.contiguous(), indices.contiguous(), ncols, kind, order)
    return colors
