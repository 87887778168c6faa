"""Whether products with what an affine map gives explain a plain product with what goes into it.

Knows maps, blocks and numbers; it must not know what was differentiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._block_layout import Layout, in_shape_of_x
from ._certificate import Comparison, all_finite, is_plain, wide
from ._engine import Linearization
from ._recorded.affine import AffineMap, Term
from ._repetition import Repetition
from ._separable import warn_mismatch

__all__ = ["Explained", "Summed", "are_explained", "numel_of"]


class Summed(NamedTuple):
    """A sum of terms, and the sum of their sizes, asked for only where the first isn't plainly right."""

    total: Tensor
    scale: Callable[[], Tensor]

    def through(self, move: Callable[[Tensor], Tensor]) -> Summed:
        """With all elements elsewhere."""
        return Summed(move(self.total), lambda: move(self.scale()))

    def plus(self, other: Summed) -> Summed:
        """The sum of both."""
        return Summed(self.total + other.total, lambda: self.scale() + other.scale())


def numel_of(term: Term) -> int:
    """Elements of its piece."""
    k, channels = term.shape
    return k * channels


class Explained:
    """What products by block explain of a plain one by each term's piece.

    ``weights``, of shape (block rows, blocks, 1): how often each row is in the plain product.
    """

    __slots__ = ("_affine", "_got", "_layout", "_scale", "_weights")

    def __init__(self, affine: AffineMap, layout: Layout, weights: Tensor) -> None:
        self._affine = affine
        self._layout = layout
        self._weights = weights
        self._got: Any = 0
        self._scale: Any = 0

    def add(self, lo: int, hi: int, blocks: Tensor) -> None:
        """Products with rows ``lo`` to ``hi`` of the blocks, shape (hi - lo, blocks, columns of a block)."""
        terms = wide(blocks.detach()) * self._weights[lo:hi]
        self._got = self._got + terms.sum(0)
        self._scale = self._scale + terms.abs_().sum(0)

    def pulled(self) -> list[Summed]:
        """For each term what is explained, as a matrix (k, channels)."""
        got = self._affine.as_matrix(in_shape_of_x(self._layout, self._got))
        found = []
        for term in self._affine.terms:
            factor = wide(term.factor.detach()).to(got.dtype)  # y may be finer
            found.append(Summed(factor.t() @ got, functools.partial(self._scale_of, factor)))
        return found

    def _scale_of(self, factor: Tensor) -> Tensor:
        scale = self._affine.as_matrix(in_shape_of_x(self._layout, self._scale))
        return factor.abs().t() @ scale


def are_explained(
    explained: Sequence[Summed],
    vector: Tensor,
    plain: Callable[[Tensor], list[Tensor]],
    eps: float,
    lin: Linearization,
) -> bool:
    """Whether ``plain(vector)`` is what is explained, up to rounding; a warning says so if not.

    ``eps``: the precision of the products, which come from ``lin``.
    """
    wanted = plain(vector)
    both = zip(explained, wanted, strict=True)
    left = [i for i, ((got, _), one) in enumerate(both) if not is_plain(got, one.to(got), eps)]
    if not left:
        return True
    if not all(all_finite(one) for one in wanted):
        return False
    compared = [
        Comparison(explained[i].total, explained[i].scale(), wanted[i].to(explained[i].total), eps)
        for i in left
    ]
    numbers = torch.arange(vector.numel(), device=vector.device)
    parts = lambda: [torch.where(numbers % 4 == k, vector, 0.0) for k in range(4)]

    def again(vector: Tensor) -> list[Tensor]:
        products = plain(vector)
        return [products[i] for i in left]

    repetition = Repetition(vector, parts, [wanted[i] for i in left], again)
    repetition.refute(compared)
    if all(bool(one.fine.all()) for one in compared):
        return True
    if repetition.are_rounding([one.difference for one in compared]):  # all of it cancels
        return True
    warn_mismatch(lin)
    return False
