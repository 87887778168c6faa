"""Which product holds which entry: from a pattern and its coloring to positions among colored products.

Index arithmetic alone; it must not know how a product is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..sparsity.pattern import Pattern, indptr_of
from .choice import Coloring, color, least_colors

__all__ = ["Recovery", "jacobian_recovery", "joined", "symmetric_recovery"]

# A pushforward costs about this many pullbacks, and a forward coloring has to save two products besides.
_FORWARD_COST = 1.5


class Recovery:
    """Positions of the entries of one or more matrices side by side among colored products.

    ``mode`` says what is colored: ``"forward"`` columns, and a product has ``rows`` elements; ``"reverse"``
    rows, and there is a product for each matrix; ``"symmetric"`` both at once, and ``"diagonal"``, of
    which only the diagonal is recovered. ``slots[i]`` gives for each entry of matrix ``i``, row by row, the
    color and the position in its product.
    """

    __slots__ = ("coloring", "mode", "patterns", "rows", "slots", "widths")

    def __init__(self, mode: str, patterns: Sequence[Pattern], coloring: Coloring) -> None:
        self.mode = mode
        self.patterns = tuple(patterns)
        self.coloring = coloring
        self.rows = self.patterns[0].shape[0]
        self.widths = [pattern.shape[1] for pattern in self.patterns]
        self.slots = _SLOTS[mode](self.patterns, coloring)

    @property
    def ncolors(self) -> int:
        """Products that are needed."""
        return self.coloring.ncolors

    def lengths(self) -> list[int]:
        """Elements of each of the products of one color."""
        return self.widths if self.mode == "reverse" else [self.rows]

    def product_of(self, matrix: int) -> int:
        """Which of the products of one color holds the entries of this matrix."""
        return matrix if self.mode == "reverse" else 0


def _forward_slots(patterns: Sequence[Pattern], coloring: Coloring) -> list[tuple[Tensor, Tensor]]:
    parts = coloring.colors.split([pattern.shape[1] for pattern in patterns])
    return [(part[pattern.indices], pattern.rows()) for part, pattern in zip(parts, patterns, strict=True)]


def _reverse_slots(patterns: Sequence[Pattern], coloring: Coloring) -> list[tuple[Tensor, Tensor]]:
    return [(coloring.colors[pattern.rows()], pattern.indices) for pattern in patterns]


def _symmetric_slots(patterns: Sequence[Pattern], coloring: Coloring) -> list[tuple[Tensor, Tensor]]:
    """Entry (i, j) is alone in row i of color(j)'s product, or (j, i) alone in row j of color(i)'s."""
    (pattern,) = patterns
    i, j = pattern.rows(), pattern.indices
    colors = coloring.colors
    own = colors[j]
    alone = _occurs_once(i * max(1, coloring.ncolors) + own, pattern.shape[0] * max(1, coloring.ncolors))
    return [(torch.where(alone, own, colors[i]), torch.where(alone, i, j))]


def _occurs_once(keys: Tensor, bound: int) -> Tensor:
    """Whether a key from 0 to ``bound`` is the only one of its value."""
    if bound <= 8 * keys.numel() + 1024:
        return torch.bincount(keys, minlength=bound)[keys] == 1
    _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    return counts[inverse] == 1


def _diagonal_slots(patterns: Sequence[Pattern], coloring: Coloring) -> list[tuple[Tensor, Tensor]]:
    return [(coloring.colors, torch.arange(pattern.shape[1])) for pattern in patterns]


_SLOTS = {
    "forward": _forward_slots,
    "reverse": _reverse_slots,
    "symmetric": _symmetric_slots,
    "diagonal": _diagonal_slots,
}


def joined(patterns: Sequence[Pattern]) -> Pattern:
    """The pattern of matrices side by side."""
    if len(patterns) == 1:
        return patterns[0]
    rows = patterns[0].shape[0]
    width = sum(pattern.shape[1] for pattern in patterns)
    if any(pattern.dense for pattern in patterns):
        return Pattern.full((rows, width))
    counts = torch.zeros(rows, dtype=torch.int64)
    for pattern in patterns:
        counts += pattern.indptr.diff()
    indptr = indptr_of(counts)
    indices = torch.empty(int(indptr[-1]), dtype=torch.int64)
    start, offset = indptr[:-1].clone(), 0
    for pattern in patterns:
        count = pattern.indptr.diff()
        shift = torch.repeat_interleave(start - pattern.indptr[:-1], count)
        indices[torch.arange(pattern.nnz) + shift] = pattern.indices + offset
        start += count
        offset += pattern.shape[1]
    return Pattern((rows, width), indptr, indices)


def jacobian_recovery(
    patterns: Sequence[Pattern], mode: str = "auto", most: float = float("inf")
) -> Recovery | None:
    """Forward with column colors or reverse with row colors, whichever needs fewer products.

    ``mode`` other than ``"auto"`` decides beforehand. ``None`` where more than ``most`` products are needed
    in any case.
    """
    whole = joined(patterns)
    bounds = {}
    if mode in ("auto", "reverse"):
        bounds["reverse"] = float(least_colors(whole, "distance2_rows"))
    if mode in ("auto", "forward"):
        bounds["forward"] = _FORWARD_COST * least_colors(whole, "distance2_columns") + (
            2 if len(bounds) else 0
        )
    best: tuple[float, str, Coloring] | None = None
    for way in sorted(bounds, key=lambda way: bounds[way]):
        if bounds[way] > most or (best is not None and bounds[way] >= best[0]):
            continue
        if way == "reverse":
            coloring = color(whole, "distance2_rows")
            cost = float(coloring.ncolors)
        else:
            coloring = color(whole, "distance2_columns")
            cost = _FORWARD_COST * coloring.ncolors + (2 if len(bounds) > 1 else 0)
        if best is None or cost < best[0]:
            best = (cost, way, coloring)
    return None if best is None or best[0] > most else Recovery(best[1], patterns, best[2])


def symmetrized(pattern: Pattern) -> Pattern:
    """The pattern with the mirror image of each entry."""
    if pattern.dense:
        return pattern
    mirrored = pattern.transpose()
    if pattern == mirrored:
        return pattern
    both = Pattern.from_coo(
        torch.cat([pattern.rows(), mirrored.rows()]),
        torch.cat([pattern.indices, mirrored.indices]),
        pattern.shape,
        is_local=pattern.is_local,
    )
    both.unknown, both.operators = pattern.unknown, pattern.operators
    return both


def symmetric_recovery(pattern: Pattern, *, diagonal: bool = False) -> Recovery:
    """A star coloring with direct recovery, or neighbors' colors where only the diagonal is wanted."""
    if diagonal:
        return Recovery("diagonal", [pattern], color(pattern, "distance1"))
    return Recovery("symmetric", [pattern], color(pattern, "star"))
