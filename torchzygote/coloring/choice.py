"""The coloring of a pattern: which order of the vertices gives fewer colors.

Knows nothing of what the colors are for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..sparsity.pattern import Pattern
from . import greedy

__all__ = ["Coloring", "color", "refined"]


# Rounds of iterated greedy, at most.
_ROUNDS = 7


class Coloring(NamedTuple):
    """Colors of the rows or columns of a pattern, from 0 to ``ncolors - 1``."""

    colors: Tensor
    ncolors: int
    kind: str
    order: str


def color(pattern: Pattern, kind: str) -> Coloring:
    """The better of the colorings in natural and in largest-first order.

    Parameters
    ----------
    pattern : Pattern
        Symmetric for the kinds ``"distance1"`` and ``"star"``.
    kind : {"distance1", "distance2_rows", "distance2_columns", "star"}
        As for :func:`torchzygote.coloring.greedy.color_graph`.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.coloring import color
    >>> from torchzygote.sparsity.pattern import Pattern
    >>> color(Pattern.from_dense(torch.eye(4)), "distance2_columns").colors
    tensor([0, 0, 0, 0])
    """
    count = pattern.shape[0] if kind == "distance2_rows" else pattern.shape[1]
    if pattern.lists_all:
        return Coloring(torch.arange(count, device="cpu"), count, kind, "natural")
    first, second = greedy.ORDERS
    found = _in_order(pattern, kind, first)
    if is_least(pattern, found):
        return found
    other = _in_order(pattern, kind, second)
    return other if other.ncolors < found.ncolors else found


def _in_order(pattern: Pattern, kind: str, order: str) -> Coloring:
    colors = _color_graph(pattern.indptr, pattern.indices, pattern.shape[1], kind, order)
    return Coloring(colors, int(colors.max()) + 1 if colors.numel() > 0 else 0, kind, order)


def refined(pattern: Pattern, coloring: Coloring) -> Coloring:
    """A distance-2 coloring, perhaps with fewer colors: vertices take part anew, one color after the other.

    With all of one color in a row, first fit never needs more colors than before (iterated greedy). The
    colors come in reverse, by their number of vertices, and at random by turns.
    """
    if pattern.lists_all or coloring.ncolors <= least_colors(pattern, coloring.kind):
        return coloring
    columns = pattern.transpose() if coloring.kind == "distance2_rows" else pattern
    least = least_colors(columns, "distance2_columns")
    colors, ncolors, idle = coloring.colors, coloring.ncolors, 0
    generator = torch.Generator("cpu").manual_seed(0)
    for turn in range(_ROUNDS):
        rank = torch.arange(ncolors, 0, -1, device="cpu")
        if turn % 3 == 1:
            rank = rank - torch.bincount(colors, minlength=ncolors) * ncolors
        elif turn % 3 == 2:
            rank = torch.randperm(ncolors, generator=generator, device="cpu")
        sequence = torch.sort(rank[colors], stable=True).indices
        place = torch.empty_like(sequence)
        place[sequence] = torch.arange(sequence.numel(), device="cpu")
        again = _color_graph(
            columns.indptr, place[columns.indices], columns.shape[1], "distance2_columns", "natural"
        )
        colors = again[place]
        found = int(colors.max()) + 1
        idle = 0 if found < ncolors else idle + 1
        ncolors = found
        if ncolors <= least or idle == 4:
            break
    if ncolors == coloring.ncolors:
        return coloring
    return Coloring(colors, ncolors, coloring.kind, "iterated")


def least_colors(pattern: Pattern, kind: str) -> int:
    """Colors that no coloring does without: at distance 2, entries of the longest row (column)."""
    if pattern.nnz == 0:
        return min(1, pattern.shape[1])
    if pattern.lists_all and kind.startswith("distance2"):
        return pattern.shape[kind == "distance2_columns"]
    if kind == "distance2_rows":
        return int(torch.bincount(pattern.indices).max())
    if kind == "distance2_columns":
        return int(pattern.indptr.diff().max())
    return 2 if pattern.nnz > pattern.shape[0] else 1


def is_least(pattern: Pattern, coloring: Coloring) -> bool:
    """Whether it is plain to see that no coloring has fewer colors.

    For stars by a count: two colors together leave no cycle, so that of ``n`` vertices ``c`` colors join
    ``(c - 1) n - c (c - 1) / 2`` pairs at most. The vertices counted are those that a clique could be of.
    """
    colors = coloring.ncolors
    if colors <= least_colors(pattern, coloring.kind):
        return True
    lengths = pattern.indptr.diff()
    long = lengths >= colors - 1
    count = int(long.sum())
    if coloring.kind != "star" or count < colors:
        return False
    near = pattern.indices[torch.repeat_interleave(long, lengths, output_size=pattern.nnz)]
    pairs = (int(long[near].sum()) - count) // 2  # as if the diagonal were full
    return pairs > (colors - 2) * count - (colors - 1) * (colors - 2) // 2


def _color_graph(indptr: Tensor, indices: Tensor, ncols: int, kind: str, order: str) -> Tensor:
    colors = native.color_graph(indptr, indices, ncols, kind, order)
    return greedy.color_graph(indptr, indices, ncols, kind, order) if colors is None else colors
