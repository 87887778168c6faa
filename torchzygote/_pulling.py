"""Rows of seeds pulled back as a call wants it: so many at a time, recorded or not, with a bar or without.

Knows nothing of what the rows are rows of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import _cost_model, _engine, _products
from ._cost_model import RowCost
from ._engine import Linearization

__all__ = ["Options", "chunk_for", "pulled_rows"]


class Options(NamedTuple):
    """How the products of one call are computed."""

    chunk_size: int | None
    keep: bool
    progress: bool

    @property
    def once(self) -> Options:
        """For products that only a check looks at."""
        return self._replace(keep=False, progress=False)


def chunk_for(options: Options, rows: int, cost: RowCost, device: torch.device) -> int:
    """How many of ``rows`` products are computed at a time; ``cost``: what one takes."""
    if options.chunk_size is not None or rows <= 1 or _engine.compiling():
        return options.chunk_size or max(rows, 1)
    return _cost_model.choose_chunk(None, rows, cost, device)


def pulled_rows(
    lin: Linearization,
    seeds: _products.Seeds,
    rows: int,
    cost: RowCost,
    options: Options,
    *,
    root: int = 0,
) -> Iterator[_products.Chunk]:
    """Pull ``rows`` seeds back from one of the roots; ``cost``: what one takes."""
    return _products.vjps(
        lin,
        root,
        seeds,
        rows,
        chunk_for(options, rows, cost, lin.roots[root].device),
        create_graph=options.keep,
        progress=options.progress,
        misbatched=cost.misbatched,
        looped=cost.looped,
    )
