"""Which axes of a value tell samples apart, and sums over the others.

Knows axes; it must not know what is summed up.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from torch import Tensor

from .._recorded.alignment_rules import Alignment

__all__ = ["Samples", "Sizes", "samples_of"]

Sizes = tuple[tuple[int, int], ...]  # axes of the inputs that tell samples apart, and how long each is


class Samples(NamedTuple):
    """Of rows of values, one more axis before theirs: the axes within a sample, and the order of the others.

    ``number``: how many samples there are. ``are_first``: the axes that tell them apart come first, in order.
    """

    within: list[int]
    order: list[int]
    number: int
    are_first: bool

    def summed(self, given: Tensor) -> Tensor:
        """For each row and sample the sum; shape (rows, samples)."""
        if self.within:
            given = given.sum(self.within)
        if self.order != sorted(self.order):
            given = given.permute(self.order)
        return given.reshape(len(given), self.number)


@functools.lru_cache(maxsize=1 << 10)
def samples_of(alignment: Alignment, sizes: Sizes) -> Samples | None:
    """``None`` where a value doesn't have one axis for each of those that tell samples apart."""
    axes = [axis for axis, _ in sizes]
    where = [axis for axis in alignment if axis in axes]
    if len(where) != len(axes) or set(where) != set(axes):
        return None
    within = [1 + i for i, axis in enumerate(alignment) if axis not in axes]
    order = [0, *(1 + where.index(axis) for axis in axes)]
    first = order == sorted(order) and within == list(range(len(order), len(order) + len(within)))
    return Samples(within, order, math.prod(size for _, size in sizes), first)
