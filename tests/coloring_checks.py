"""What makes a coloring valid, straight from the definitions; shares no code with the package."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def columns_are_apart(matrix: np.ndarray, colors: Sequence[int]) -> bool:
    """No row has two entries in columns of one color."""
    return all(
        len({colors[j] for j in np.flatnonzero(row)}) == np.count_nonzero(row) for row in np.asarray(matrix)
    )


def rows_are_apart(matrix: np.ndarray, colors: Sequence[int]) -> bool:
    """No column has two entries in rows of one color."""
    return columns_are_apart(np.asarray(matrix).T, colors)


def neighbors_differ(matrix: np.ndarray, colors: Sequence[int]) -> bool:
    """Off the diagonal, an entry is in a row and a column of different colors."""
    return all(i == j or colors[i] != colors[j] for i, j in np.argwhere(matrix))


def is_star(matrix: np.ndarray, colors: Sequence[int]) -> bool:
    """Neighbors differ, and a path a-b-c-d never has the colors x-y-x-y."""
    if not neighbors_differ(matrix, colors):
        return False
    near = [[int(j) for j in np.flatnonzero(row) if j != i] for i, row in enumerate(np.asarray(matrix))]
    for b, start in enumerate(near):
        for a, c in itertools.permutations(start, 2):
            if colors[a] != colors[c]:
                continue
            if any(d != b and colors[d] == colors[b] for d in near[c]):
                return False
    return True


VALID = {
    "distance1": neighbors_differ,
    "distance2_rows": rows_are_apart,
    "distance2_columns": columns_are_apart,
    "star": is_star,
}


def greedy(matrix: np.ndarray, kind: str, sequence: Sequence[int]) -> list[int]:
    """First fit by trial: the smallest color that leaves what is colored so far valid."""
    matrix = np.asarray(matrix)
    count = matrix.shape[0] if kind == "distance2_rows" else matrix.shape[1]
    colors = [-1] * count
    done: list[int] = []
    for v in sequence:
        done.append(v)
        if kind == "distance2_columns":
            part = matrix[:, done]
        elif kind == "distance2_rows":
            part = matrix[done, :]
        else:
            part = matrix[np.ix_(done, done)]
        for c in itertools.count():
            colors[v] = c
            if VALID[kind](part, [colors[u] for u in done]):
                break
    return colors
