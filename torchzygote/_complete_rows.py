"""Whether a pattern lists all that leads to an element: without what it lists, a plain product is zero there.

To the last digit, where the structure is right: what an element doesn't depend on isn't in its sums. What
differs from a plain product then is rounding of the entries that are listed.
Knows plain products, not what they are products of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._colored import Products, given_seeds, plain_products
from .coloring.recovery import Recovery

__all__ = ["are_complete"]

# So many elements are looked at one by one. Of more, some share a vector, which is zero in what is listed for
# any of them: what isn't listed for one is hidden by others in less than one of so many rounds.
_ALONE = 64
_HIDDEN = 4
_ROUNDS = 5
_AT_ONCE = 32


def are_complete(
    recovery: Recovery,
    doubted: Sequence[Tensor],
    probes: Tensor,
    like: Sequence[Tensor],
    multiply: Callable[[Callable[..., Any]], Products],
) -> bool:
    """Whether nothing is missing in the rows (pulled back: columns) of these elements.

    ``doubted``: masks of the elements of each kind that :func:`._certificate.compared` gives. ``probes``: no
    element of them is zero. ``like``: the products with them; ``multiply``: those of other seeds.
    """
    if recovery.mode == "diagonal":
        return False  # of a row, one entry is listed
    for kind, mask in enumerate(doubted):
        elements = mask.nonzero().flatten()
        into, of = _entries(recovery, kind, mask.device)
        if elements.numel() and not _are_zero(elements, into, of, probes, kind, like, multiply):
            return False
    return True


def _entries(recovery: Recovery, kind: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each entry, the element of a product that it leads to, and the seed's element that it leads from."""
    rows, columns = recovery.rows_on(device), recovery.columns_on(device)
    if recovery.mode == "reverse":
        return columns[kind].long(), rows[kind].long()
    start, shifted = 0, []
    for part, width in zip(columns, recovery.widths, strict=True):
        shifted.append(part.long() + start)
        start += width
    return torch.cat(rows).long(), torch.cat(shifted)


def _are_zero(
    elements: Tensor,
    into: Tensor,
    of: Tensor,
    probes: Tensor,
    kind: int,
    like: Sequence[Tensor],
    multiply: Callable[[Callable[..., Any]], Products],
) -> bool:
    """Whether the products are zero in these elements, by vectors that are so in what their entries list."""
    count = like[kind].shape[1:].numel()
    vector = probes[:1].to(elements.device)
    doubted = torch.zeros(count, dtype=torch.bool, device=elements.device)
    doubted[elements] = True
    hiding = int(torch.bincount(of[doubted[into]], minlength=1).max())
    groups = list(_groups(elements, elements.numel() // (_HIDDEN * max(1, hiding))))
    for lo in range(0, len(groups), _AT_ONCE):
        some = groups[lo : lo + _AT_ONCE]
        seeds = vector.repeat(len(some), 1)
        for row, group in zip(seeds, some, strict=True):
            wanted = torch.zeros(count, dtype=torch.bool, device=elements.device)
            wanted[group] = True
            row[of[wanted[into]]] = 0
        shapes = [one[:1].expand(len(some), *one.shape[1:]) for one in like]
        products = plain_products(multiply(given_seeds(seeds)), shapes)[kind].reshape(len(some), count)
        if any(bool((row[group] != 0).any()) for row, group in zip(products, some, strict=True)):
            return False
    return True


def _groups(elements: Tensor, size: int) -> Iterator[Tensor]:
    if elements.numel() <= _ALONE or size <= 1:
        yield from torch.split(elements, 1)
        return
    generator = torch.Generator().manual_seed(0)
    for _ in range(_ROUNDS):
        order = torch.randperm(elements.numel(), generator=generator, device="cpu")
        yield from torch.split(elements[order.to(elements.device)], size)
