"""Whether a pattern lists all that leads to an element: without what it lists, a plain product is zero there.

To the last digit, where the structure is right: what an element doesn't depend on isn't in its sums. What
differs from a plain product then is rounding of the entries that are listed. Only for products that are
linear. Knows plain products, not what they are products of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._colored import Products, given_seeds, plain_products
from .coloring.recovery import Recovery

__all__ = ["are_complete"]

# More are not asked for, nor more than the dense way takes products.
_MOST = 256
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
    if all(pattern.lists_all for pattern in recovery.patterns):
        return True
    dense = min(recovery.rows, sum(recovery.widths))
    for kind, mask in enumerate(doubted):
        into, of = _entries(recovery, kind, mask.device)
        if recovery.mode == "symmetric":  # entries are read from the rows of their mirror images, too
            mask = mask.clone().index_fill_(0, of[mask[into]], True)
        elements = mask.nonzero().flatten()
        if elements.numel() > min(_MOST, dense):
            return False
        if elements.numel() and not _are_zero(elements, into, of, probes, kind, like, multiply):
            return False
    return True


def _entries(recovery: Recovery, kind: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each entry, the element of a product that it leads to, and the seed's element that it leads from."""
    if recovery.mode == "reverse":
        return recovery.columns_of(kind, device).long(), recovery.rows_of(kind, device).long()
    start, rows, columns = 0, [], []
    for i, width in enumerate(recovery.widths):
        rows.append(recovery.rows_of(i, device).long())
        columns.append(recovery.columns_of(i, device).long() + start)
        start += width
    return torch.cat(rows), torch.cat(columns)


def _are_zero(
    elements: Tensor,
    into: Tensor,
    of: Tensor,
    probes: Tensor,
    kind: int,
    like: Sequence[Tensor],
    multiply: Callable[[Callable[..., Any]], Products],
) -> bool:
    """Whether the product is zero in each of these elements, by a vector that is so in what is listed."""
    count = like[kind].shape[1:].numel()
    vector = probes[:1].to(elements.device)
    for some in torch.split(elements, _AT_ONCE):
        place = torch.full((count,), -1, device=elements.device)
        place[some] = torch.arange(len(some), device=elements.device)
        at = place[into]
        listed = at >= 0
        seeds = vector.repeat(len(some), 1)
        seeds[at[listed], of[listed]] = 0
        shapes = [one[:1].expand(len(some), *one.shape[1:]) for one in like]
        products = plain_products(multiply(given_seeds(seeds)), shapes)[kind].reshape(len(some), count)
        if bool((products.gather(1, some.unsqueeze(1)) != 0).any()):
            return False
    return True
