"""Entries of symmetric blocks, each beside the diagonal read twice: compiled where that was possible.

Knows nothing of how they were computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import below_autograd
from ._choice import compiled, on_cpu
from ._loading import operator

__all__ = ["mirrored_entries", "mirrored_entries_plainly"]

_READ = (torch.float32, torch.float64)
if on_cpu:
    _mirrored_entries = operator("mirrored_entries")


def mirrored_entries(
    products: Sequence[Tensor],
    places: Tensor,
    scales: Tensor,
    rows: Tensor,
    columns: Tensor,
    widths: Sequence[int],
    slack: float,
) -> tuple[list[Tensor], Tensor]:
    """``scales[e] * products[places[e]]`` in parts, and whether they are finite and mirror each other.

    Places count through all products, one behind the other, in row-major order. First comes the diagonal, in
    parts of these ``widths``, then ``m`` entries above it, at ``rows`` and ``columns`` of the matrix, then
    the same below. They mirror each other where they differ by no more than ``slack`` times the sum of their
    sizes and of those of the diagonal in their rows and columns.

    ``places``, ``rows``, ``columns``: int64 or int32, contiguous. Returns the parts, vectors with memory of
    their own, and a bool of shape ().
    """
    if products[0].is_cpu and products[0].dtype in _READ and compiled(*products):
        with below_autograd():
            parts, agree = _mirrored_entries(
                [product.contiguous() for product in products], places, scales, rows, columns, widths, slack
            )
        return parts, agree
    return mirrored_entries_plainly(products, places, scales, rows, columns, widths, slack)


def mirrored_entries_plainly(
    products: Sequence[Tensor],
    places: Tensor,
    scales: Tensor,
    rows: Tensor,
    columns: Tensor,
    widths: Sequence[int],
    slack: float,
) -> tuple[list[Tensor], Tensor]:
    """The same in PyTorch, which differentiates it."""
    entries = torch.cat([product.reshape(-1) for product in products]).index_select(0, places) * scales
    values, pairs = entries.detach(), rows.numel()
    diagonal, above, below = torch.split(values, [values.numel() - 2 * pairs, pairs, pairs])
    sizes = diagonal.abs()
    scale = above.abs() + below.abs() + sizes[rows] + sizes[columns]
    agree = ((above - below).abs() <= slack * scale).all() & values.isfinite().all()
    return [part.clone() for part in torch.split(entries, [*widths, pairs, pairs])], agree
