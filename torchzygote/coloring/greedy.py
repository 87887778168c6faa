"""Greedy colorings in plain Python: what the native operator computes, and the fallback without it.

Each vertex in turn takes the smallest color that the definition leaves it. Forbidden colors are sets of bits,
so that the work grows with the number of entries, also where a row is long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["KINDS", "ORDERS", "color_graph"]

KINDS = ("distance1", "distance2_rows", "distance2_columns", "star")
ORDERS = ("natural", "largest_first")


def color_graph(indptr: Tensor, indices: Tensor, ncols: int, kind: str, order: str) -> Tensor:
    """Colors of the rows or columns of a pattern, int64, from 0 on.

    Parameters
    ----------
    indptr, indices : torch.Tensor
        The pattern, row by row. It is symmetric for ``"distance1"`` and ``"star"``.
    ncols : int
        Number of columns.
    kind : {"distance1", "distance2_rows", "distance2_columns", "star"}
        distance1: neighbors differ. distance2_rows: rows that share a column differ. distance2_columns:
        columns that share a row differ. star: a proper coloring in which every path on four vertices has at
        least three colors.
    order : {"natural", "largest_first"}
        The order in which vertices are colored; among equals, the natural one.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(map(repr, ORDERS))}, got {order!r}")
    starts = indptr.tolist()
    members = indices.tolist()
    rows = [members[a:b] for a, b in itertools.pairwise(starts)]
    if kind in ("distance1", "star"):
        neighbors = [[j for j in row if j != i] for i, row in enumerate(rows)]
        sequence = _sequence([len(near) for near in neighbors], order)
        colors = _distance1(neighbors, sequence) if kind == "distance1" else _star(neighbors, sequence)
    else:
        if kind == "distance2_columns":
            rows, groups = _transposed(rows, ncols), len(rows)
        else:
            groups = ncols
        sizes = [0] * groups
        for row in rows:
            for group in row:
                sizes[group] += 1
        weights = [sum(sizes[group] - 1 for group in row) for row in rows] if order != "natural" else []
        colors = _distance2(rows, groups, _sequence(weights, order) if weights else range(len(rows)))
    return torch.tensor(colors, dtype=torch.int64, device="cpu")


def _transposed(rows: Sequence[Sequence[int]], ncols: int) -> list[list[int]]:
    columns: list[list[int]] = [[] for _ in range(ncols)]
    for i, row in enumerate(rows):
        for j in row:
            columns[j].append(i)
    return columns


def _sequence(weights: Sequence[int], order: str) -> Sequence[int]:
    if order == "natural":
        return range(len(weights))
    return sorted(range(len(weights)), key=lambda v: -weights[v])


def _smallest(forbidden: int) -> int:
    """Position of the lowest bit that is not set."""
    free = ~forbidden
    return (free & -free).bit_length() - 1


def _distance1(neighbors: Sequence[Sequence[int]], sequence: Sequence[int]) -> list[int]:
    taken = [0] * len(neighbors)
    colors = [-1] * len(neighbors)
    for v in sequence:
        colors[v] = color = _smallest(taken[v])
        for w in neighbors[v]:
            taken[w] |= 1 << color
    return colors


def _distance2(members: Sequence[Sequence[int]], groups: int, sequence: Sequence[int]) -> list[int]:
    """Vertices that are members of one group get different colors."""
    taken = [0] * groups
    colors = [-1] * len(members)
    for v in sequence:
        forbidden = 0
        for group in members[v]:
            forbidden |= taken[group]
        colors[v] = color = _smallest(forbidden)
        for group in members[v]:
            taken[group] |= 1 << color
    return colors


def _star(neighbors: Sequence[Sequence[int]], sequence: Sequence[int]) -> list[int]:
    """A proper coloring in which every path on four vertices has at least three colors.

    ``near[v]``: colors of v's neighbors; ``twice[v]``: those that at least two of them have; ``closed[v]``:
    colors of neighbors that have another neighbor of v's color. The next neighbor of v may have none of the
    latter: with it, the path new, v, neighbor, other would have two colors.
    """
    n = len(neighbors)
    near, twice, closed = [0] * n, [0] * n, [0] * n
    colors = [-1] * n
    for v in sequence:
        repeated = twice[v]
        forbidden = near[v]
        for w in neighbors[v]:
            if colors[w] >= 0:
                forbidden |= closed[w]
                if repeated >> colors[w] & 1:  # v lies between two of this color: none beyond them
                    forbidden |= near[w]
        colors[v] = color = _smallest(forbidden)
        bit = 1 << color
        for w in neighbors[v]:
            its = colors[w]
            if its >= 0 and repeated >> its & 1:
                closed[w] |= bit
            if not near[w] & bit:
                near[w] |= bit
                continue
            if not twice[w] & bit:
                twice[w] |= bit
                if its >= 0:
                    first = next(x for x in neighbors[w] if x != v and colors[x] == color)
                    closed[first] |= 1 << its
            if its >= 0:
                closed[v] |= 1 << its
    return colors
