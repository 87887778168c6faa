"""A mismatch beside far larger elements: rounding, or wrong? Plain products are repeated to tell.

An error of structure is linear in the vector: scaling the vector scales it, to the last digit, and parts of
the vector have parts of it. Rounding errors aren't: other digits are lost.
Knows plain products, not what they are products of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._certificate import Comparison, compared, probe_parts
from ._colored import Products, given_seeds, plain_products
from ._complete_rows import are_complete
from .coloring.recovery import Recovery

__all__ = ["Repetition", "may_be_lost", "settle_colored"]

# Fractions of the way to the next power of two, which loses none: digits are lost at other places for each.
_FACTORS = (2**0.25, 2**0.5, 2**0.75)


# Times the largest that was seen to be lost in a few products.
_LOST = 64
_Pull = Callable[[Tensor], "list[Tensor]"]


def may_be_lost(products: Sequence[Tensor], again: _Pull, probes: Tensor) -> list[Tensor]:
    """How much of each element of ``products`` may be rounding, by what a few repetitions show.

    ``again``: the products with other vectors than ``probes``.
    """
    noise = [torch.zeros_like(part).abs() for part in products]
    for factor in _FACTORS:
        noise = [
            torch.maximum(n, ((b / factor).to(a) - a).abs())
            for n, a, b in zip(noise, products, again(probes * factor), strict=True)
        ]
    return [_LOST * n for n in noise]


class Repetition:
    """Plain products with other vectors than a check was made with.

    ``probes``: its vectors, and ``parts`` that sum up to them. ``compared``: the elements that were compared,
    of each kind. ``again``: the same for other vectors.
    """

    __slots__ = ("_again", "_compared", "_parts", "_probes")

    def __init__(
        self,
        probes: Tensor,
        parts: Callable[[], Iterable[Tensor]],
        compared: Sequence[Tensor],
        again: Callable[[Tensor], list[Tensor]],
    ) -> None:
        self._probes = probes
        self._parts = parts
        self._compared = compared
        self._again = again

    def refute(self, comparisons: Sequence[Comparison]) -> None:
        """Take back what passed beside the largest element only, and is no rounding."""
        with torch.no_grad():
            if not any(bool(one.faint.any()) for one in comparisons):
                return
            wrong = []
            for noise in self._noise():
                wrong = [one.beyond(part) for one, part in zip(comparisons, noise, strict=True)]
                if not any(bool(mask.any()) for mask in wrong):
                    return
            for one, mask in zip(comparisons, wrong, strict=True):
                one.refute(mask)

    def excuse(self, comparisons: Sequence[Comparison]) -> None:
        """Let pass what is no more than these elements lose, where a function loses digits in some.

        Only for products that are linear, as for :meth:`are_rounding`, and of one run of ``f``.
        """
        with torch.no_grad():
            allowed = may_be_lost(self._compared, self._again, self._probes)
            for one, lost in zip(comparisons, allowed, strict=True):
                one.excuse(lost)

    def are_rounding(self, differences: Sequence[Tensor]) -> bool:
        """Whether so little is lost in the products anyway, as where all of a derivative cancels.

        Only for products that are linear: no hooks bend them.
        """
        with torch.no_grad():
            *_, noise = self._noise()
            return all(
                bool((difference <= _LOST * n.max()).all())
                for difference, n in zip(differences, noise, strict=True)
                if difference.numel() > 0
            )

    def _noise(self) -> Iterator[list[Tensor]]:
        """The largest differences seen in each element compared, after each repetition."""
        noise = [torch.zeros_like(part).abs() for part in self._compared]
        for repeated in self._repeated():
            noise = [
                torch.maximum(n, (b.to(a) - a).abs())
                for n, a, b in zip(noise, self._compared, repeated, strict=True)
            ]
            yield noise

    def _repeated(self) -> Iterator[list[Tensor]]:
        """What would be the same without rounding, the cheapest first."""
        for factor in _FACTORS:
            yield [product / factor for product in self._again(self._probes * factor)]
        total: list[Tensor] | None = None
        for part in self._parts():
            found = self._again(part)
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        if total is not None:
            yield total


def settle_colored(
    comparisons: Sequence[Comparison],
    recovery: Recovery,
    probes: Tensor,
    probed: Sequence[Tensor],
    multiply: Callable[[Callable[..., Any]], Products],
    linear: Callable[[], bool],
) -> bool:
    """Whether all is fine, after looking again with a coloring's ``probes``; ``probed``: products with them.

    ``multiply``: the products of other seeds. ``linear()``: whether they are as :meth:`Repetition.excuse`
    needs them.
    """
    if not comparisons:
        return True
    plain = [one.detach() for one in probed]

    def again(rows: Tensor) -> list[Tensor]:
        return [compared(recovery, one) for one in plain_products(multiply(given_seeds(rows)), plain)]

    elements = [compared(recovery, one) for one in plain]
    repetition = Repetition(probes, lambda: probe_parts(recovery, probes), elements, again)
    repetition.refute(comparisons)
    if _are_fine(comparisons):
        return True
    if not linear():
        return False
    doubted = [one.doubted for one in comparisons]
    present = [mask for mask in doubted if mask is not None]
    with torch.no_grad():
        if len(present) == len(doubted) and are_complete(recovery, present, probes, plain, multiply):
            for one in comparisons:
                one.acquit()
    if not _are_fine(comparisons):
        repetition.excuse(comparisons)
    return _are_fine(comparisons)


def _are_fine(comparisons: Sequence[Comparison]) -> bool:
    return all(bool(one.fine.all()) for one in comparisons)
