"""Directions for block diagonal Hessians: one for each column of a block, in all blocks at once.

Each block has a random weight in them, so that what couples blocks doesn't pass for what is within them.
Knows layouts; it must not know what is pushed along the directions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._block_layout import Layout, by_block, in_shape_of_x, rows_in_shape_of_x
from .._cached_draws import MOST_KEPT, generator_for, kept

__all__ = ["Directions", "directions"]

# They change no digit, and their squares are near 1.
_WEIGHTS = (1.0, -1.0, 0.5, -0.5)


class Directions(NamedTuple):
    """``weights``: of the blocks; ``undone``: one over their squares. ``kept``: all seeds, if they are few.

    ``layouts``: of the Hessian by each input, the same blocks for all.
    """

    layouts: tuple[Layout, ...]
    weights: Tensor
    undone: Tensor
    kept: list[Tensor] | None

    @property
    def total(self) -> int:
        """One for each column of a block, by all inputs."""
        return sum(layout.block_columns for layout in self.layouts)

    def seeds(self, lo: int, hi: int) -> list[Tensor]:
        """Directions ``lo`` to ``hi``, for each input (hi - lo, *its shape); not to be written into."""
        if self.kept is not None:
            return self.kept if hi - lo == self.total else [seeds[lo:hi] for seeds in self.kept]
        return self.made(lo, hi)

    def made(self, lo: int, hi: int) -> list[Tensor]:
        """:meth:`seeds`, made anew."""
        found, first = [], 0
        for layout in self.layouts:
            rows = self.weights.new_zeros(hi - lo, len(self.weights), layout.block_columns)
            rows.diagonal(lo - first, 0, 2).copy_(self.weights.unsqueeze(1))
            found.append(rows_in_shape_of_x(layout, rows))
            first += layout.block_columns
        return found

    def along(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Directional derivatives from gradients, by block; shape (directions, blocks)."""
        parts = [
            self.weights.new_zeros(layout.block_columns, len(self.weights))
            if g is None
            else by_block(layout, g.unsqueeze(0))[0].t()
            for layout, g in zip(self.layouts, gradients, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)) * self.weights

    def diagonals(self, curvature: Tensor) -> list[Tensor]:
        """From (directions, blocks) to the diagonal by each input, each with memory of its own."""
        parts = torch.split(curvature, [layout.block_columns for layout in self.layouts])
        return [
            in_shape_of_x(layout, (part * self.undone).t().contiguous())
            for layout, part in zip(self.layouts, parts, strict=True)
        ]


def directions(layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device) -> Directions:
    """The same ones for the same layouts."""
    columns = sum(layout.block_columns for layout in layouts)
    few = columns * sum(math.prod(layout.x_shape) for layout in layouts) <= MOST_KEPT
    return (_kept if few and device.type == "cpu" else _drawn)(tuple(layouts), dtype, device, few)


def _drawn(layouts: tuple[Layout, ...], dtype: torch.dtype, device: torch.device, keep: bool) -> Directions:
    blocks = math.prod(layouts[0].x_shape[q] for _, q in layouts[0].pairs)
    drawn = torch.randint(len(_WEIGHTS), (blocks,), generator=generator_for(blocks), device="cpu")
    weights = torch.tensor(_WEIGHTS, dtype=dtype, device=device)[drawn.to(device)]
    found = Directions(layouts, weights, 1 / (weights * weights), None)
    return found._replace(kept=found.made(0, found.total)) if keep else found


_kept = kept(_drawn)
