"""Which product holds which entry: from a pattern and its coloring to positions among colored products.

Index arithmetic alone; it must not know how a product is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._cost_model import FORWARD_COST
from ..sparsity.pattern import Pattern, indptr_of
from .choice import Coloring, color, least_colors, refined

__all__ = ["Recovery", "jacobian_recovery", "joined", "symmetric_recovery"]

# Entries of dense matrices that are listed beside a sparse one; beyond, all counts as dense.
_MOST_LISTED = 1 << 26


class Recovery:
    """Positions of the entries of one or more matrices side by side among colored products.

    ``mode`` says what is colored: ``"forward"`` columns, and a product has ``rows`` elements; ``"reverse"``
    rows, and there is a product for each matrix; ``"symmetric"`` both at once, and ``"diagonal"``, of
    which only the diagonal is recovered.

    Positions are made as they are asked for: what lists everything needs none (:meth:`is_full`).
    """

    __slots__ = (
        "_colors",
        "_columns",
        "_flat",
        "_rows",
        "_slots",
        "coloring",
        "mode",
        "patterns",
        "rows",
        "widths",
    )

    def __init__(self, mode: str, patterns: Sequence[Pattern], coloring: Coloring) -> None:
        self.mode = mode
        self.patterns = tuple(patterns)
        self.coloring = coloring
        self.rows = self.patterns[0].shape[0]
        self.widths = [pattern.shape[1] for pattern in self.patterns]
        self._colors: dict[tuple[int, torch.device], Tensor] = {}
        self._slots: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}
        self._flat: dict[tuple[int, torch.device], Tensor] = {}
        self._rows: dict[tuple[int, torch.device], Tensor] = {}
        self._columns: dict[tuple[int, torch.device], Tensor] = {}

    @property
    def ncolors(self) -> int:
        """Products that are needed."""
        return self.coloring.ncolors

    def lengths(self) -> list[int]:
        """Elements of each of the products of one color."""
        return self.widths if self.mode == "reverse" else [self.rows]

    def is_compact(self) -> bool:
        """Whether the products hold little else than entries."""
        entries = sum(self.entries(i) for i in range(len(self.patterns)))
        return self.ncolors * sum(self.lengths()) <= 4 * entries + 65536

    def product_of(self, matrix: int) -> int:
        """Which of the products of one color holds the entries of this matrix."""
        return matrix if self.mode == "reverse" else 0

    def entries(self, matrix: int) -> int:
        """How many entries are recovered."""
        return self.widths[matrix] if self.mode == "diagonal" else self.patterns[matrix].nnz

    def is_full(self, matrix: int) -> bool:
        """Whether products hold all of this matrix: each row (column) has a color of its own."""
        pattern = self.patterns[matrix]
        return self.mode != "diagonal" and pattern.nnz > 0 and pattern.lists_all

    def colors_of(self, matrix: int, device: torch.device) -> Tensor:
        """The colors of this matrix's rows in mode ``"reverse"``, otherwise of its columns, on a device."""
        key = matrix, device
        if key not in self._colors:
            colors = self.coloring.colors
            part = colors if self.mode == "reverse" else torch.split(colors, self.widths)[matrix]
            self._colors[key] = part.to(device)
        return self._colors[key]

    def is_valid(self) -> bool:
        """Whether the coloring separates the entries, so that each can be read off its product."""
        if self.mode == "reverse":
            return all(map(self._is_apart, range(len(self.patterns))))
        colors, width = self.coloring.colors, max(1, self.ncolors)
        whole = joined(self.patterns)
        if whole.lists_all and self.mode != "diagonal":
            return whole.nnz == 0 or _are_distinct(colors)
        i, j = whole.rows(), whole.indices
        if self.mode == "forward":
            return bool(_occurs_once(i * width + colors[j], whole.shape[0] * width).all())
        if bool(((colors[i] == colors[j]) & (i != j)).any()):
            return False
        if self.mode == "diagonal":
            return True
        # Each entry is alone in its row, or its mirror image is.
        mirrored = _occurs_once(j * width + colors[i], whole.shape[0] * width)
        return bool((_occurs_once(i * width + colors[j], whole.shape[0] * width) | mirrored).all())

    def _is_apart(self, matrix: int) -> bool:
        """Whether entries of a column of this matrix have different colors."""
        if self.is_full(matrix):
            return _are_distinct(self.coloring.colors)
        color, column = self.slots(matrix, _CPU)
        width = max(1, self.ncolors)
        return bool(_occurs_once(column * width + color, self.widths[matrix] * width).all())

    def slots(self, matrix: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each entry of a matrix, row by row, the color and the position in its product."""
        key = matrix, device
        if key not in self._slots:
            if device.type == "cpu":
                colors = self.colors_of(matrix, _CPU)
                self._slots[key] = _SLOTS[self.mode](self.patterns[matrix], colors, max(1, self.ncolors))
            else:
                color, position = self.slots(matrix, _CPU)
                self._slots[key] = color.to(device), position.to(device)
        return self._slots[key]

    def rows_of(self, matrix: int, device: torch.device) -> Tensor:
        """The row of each entry of a matrix, on a device."""
        key = matrix, device
        if key not in self._rows:
            self._rows[key] = self.patterns[matrix].rows().to(device)
        return self._rows[key]

    def columns_of(self, matrix: int, device: torch.device) -> Tensor:
        """The column of each entry of a matrix, on a device."""
        if device.type == "cpu":
            return self.patterns[matrix].indices
        key = matrix, device
        if key not in self._columns:
            self._columns[key] = self.patterns[matrix].indices.to(device)
        return self._columns[key]

    def flat_slots(self, matrix: int, device: torch.device) -> Tensor:
        """The slots of a matrix as positions among all of its products, one color after the other.

        int32 where that suffices: positions are what most of a gather's memory traffic is.
        """
        key = matrix, device
        if key not in self._flat:
            lengths = self.lengths()
            dtype = torch.int32 if self.ncolors * max(lengths) < 1 << 31 else torch.int64
            color, position = self.slots(matrix, _CPU)
            flat = color * lengths[self.product_of(matrix)] + position
            self._flat[key] = flat.to(device=device, dtype=dtype)
        return self._flat[key]


_CPU = torch.device("cpu")


def _forward_slots(pattern: Pattern, colors: Tensor, _: int) -> tuple[Tensor, Tensor]:
    return colors[pattern.indices], pattern.rows()


def _reverse_slots(pattern: Pattern, colors: Tensor, _: int) -> tuple[Tensor, Tensor]:
    return colors[pattern.rows()], pattern.indices


def _symmetric_slots(pattern: Pattern, colors: Tensor, ncolors: int) -> tuple[Tensor, Tensor]:
    """Entry (i, j) is alone in row i of color(j)'s product, or (j, i) alone in row j of color(i)'s."""
    i, j = pattern.rows(), pattern.indices
    own = colors[j]
    alone = _occurs_once(i * ncolors + own, pattern.shape[0] * ncolors)
    return torch.where(alone, own, colors[i]), torch.where(alone, i, j)


def _occurs_once(keys: Tensor, bound: int) -> Tensor:
    """Whether a key from 0 to ``bound`` is the only one of its value."""
    if bound <= 8 * keys.numel() + 1024:
        found: Tensor = torch.bincount(keys, minlength=bound)[keys] == 1
        return found
    _, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    alone: Tensor = counts[inverse] == 1
    return alone


def _are_distinct(colors: Tensor) -> bool:
    return int(torch.unique(colors).numel()) == colors.numel()


def _diagonal_slots(pattern: Pattern, colors: Tensor, _: int) -> tuple[Tensor, Tensor]:
    return colors, torch.arange(pattern.shape[1], device="cpu")


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
    full = rows * width > 0 and all(pattern.lists_all or pattern.shape[1] == 0 for pattern in patterns)
    if full or sum(pattern.nnz for pattern in patterns if pattern.dense) > _MOST_LISTED:
        return Pattern.full((rows, width))
    counts = torch.zeros(rows, dtype=torch.int64, device="cpu")
    for pattern in patterns:
        counts += pattern.indptr.diff()
    indptr = indptr_of(counts)
    indices = torch.empty(int(indptr[-1]), dtype=torch.int64, device="cpu")
    start, offset = indptr[:-1].clone(), 0
    for pattern in patterns:
        count = pattern.indptr.diff()
        shift = torch.repeat_interleave(start - pattern.indptr[:-1], count)
        indices[torch.arange(pattern.nnz, device="cpu") + shift] = pattern.indices + offset
        start += count
        offset += pattern.shape[1]
    return Pattern((rows, width), indptr, indices)


def jacobian_recovery(
    patterns: Sequence[Pattern],
    mode: str = "auto",
    most: float = math.inf,
    forward_cost: float = FORWARD_COST,
    forward_once: float = 0.0,
    refine: bool = False,
) -> Recovery | None:
    """Forward with column colors or reverse with row colors, whichever costs less.

    ``mode`` other than ``"auto"`` decides beforehand. ``None`` where the cost is above that of ``most``
    pullbacks in any case; ``forward_cost`` is that of a pushforward, ``forward_once`` of what forward mode
    takes besides. ``refine``: spend more on few colors.
    """

    def cost_of(way: str, ncolors: int) -> float:
        return ncolors * forward_cost + forward_once if way == "forward" else float(ncolors)

    whole = joined(patterns)
    bounds = {}
    if mode in ("auto", "forward"):
        bounds["forward"] = cost_of("forward", least_colors(whole, "distance2_columns"))
    if mode in ("auto", "reverse"):
        bounds["reverse"] = cost_of("reverse", least_colors(whole, "distance2_rows"))
    best: tuple[float, str, Coloring] | None = None
    for way in sorted(bounds, key=lambda way: bounds[way]):
        if bounds[way] > most or (best is not None and bounds[way] >= best[0]):
            continue
        coloring = color(whole, "distance2_columns" if way == "forward" else "distance2_rows")
        cost = cost_of(way, coloring.ncolors)
        if best is None or cost < best[0]:
            best = (cost, way, coloring)
    if best is None:
        return None
    _, way, coloring = best
    if refine:
        coloring = refined(whole, coloring)
    cost = cost_of(way, coloring.ncolors)
    return None if cost > most else Recovery(way, patterns, coloring)


def symmetrized(pattern: Pattern) -> Pattern:
    """The pattern with the mirror image of each entry."""
    if pattern.lists_all:
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


def symmetric_recovery(pattern: Pattern, *, diagonal: bool = False, refine: bool = False) -> Recovery:
    """A star coloring with direct recovery, or neighbors' colors where only the diagonal is wanted.

    ``refine``: spend more on a coloring that is easily evaluated.
    """
    if diagonal:
        return Recovery("diagonal", [pattern], color(pattern, "distance1"))
    coloring = color(pattern, "star")
    if refine and not pattern.lists_all and least_colors(pattern, "distance2_columns") <= coloring.ncolors:
        coloring = _apart(pattern, coloring)
    return Recovery("symmetric", [pattern], coloring)


def _apart(pattern: Pattern, star: Coloring) -> Coloring:
    """A star coloring in which no row meets a color twice, where that takes no more colors.

    Every entry is then read from its own row, none from its mirror image.
    """
    found = color(pattern, "distance2_columns")
    i, j = pattern.rows(), pattern.indices
    if found.ncolors > star.ncolors or bool(((found.colors[i] == found.colors[j]) & (i != j)).any()):
        return star
    return Coloring(found.colors, found.ncolors, "star", found.order)
