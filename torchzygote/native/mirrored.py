"""Diagonals of symmetric blocks whose other entries are there twice: compiled where that was possible.

Knows nothing of how the products were computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import below_autograd
from ._choice import compiled, on_cpu
from ._loading import operator

__all__ = ["mirrored_blocks", "mirrored_blocks_plainly", "read_blocks"]

_READ = (torch.float32, torch.float64)
_COLUMNS = range(2, 5)
if on_cpu:
    _mirrored_blocks = operator("mirrored_blocks")


def mirrored_blocks(
    products: Sequence[Tensor], shifts: Tensor, scales: Tensor, widths: Sequence[int], slack: float
) -> tuple[list[Tensor], Tensor]:
    """The diagonals of symmetric blocks with ``k`` columns, and whether all entries are finite and symmetric.

    ``products``: ``k * len(widths)``, one product after the other, each with the rows of one input after the
    other, ``(blocks, width)`` elements in row-major order. Product ``c`` holds of block ``b`` column
    ``(c + shifts[b]) % k``, divided by ``scales[c, b]``. Entries mirror each other where they differ by no
    more than ``slack`` times the sum of their sizes and of those of the diagonal in their rows and columns.

    ``shifts``: uint8, shape (blocks,), below ``k``; ``scales``: shape (k, blocks); ``widths`` sum up to
    ``k``. Returns a vector for each input, with memory of its own, and a bool of shape ().
    """
    first = products[0]
    if first.is_cpu and first.dtype in _READ and len(scales) in _COLUMNS and compiled(*products):
        with below_autograd():
            diagonals, agree = _mirrored_blocks(
                [p if p.dim() == 1 else p.contiguous() for p in products], shifts, scales, widths, slack
            )
        return diagonals, agree
    return mirrored_blocks_plainly(products, shifts, scales, widths, slack)


def mirrored_blocks_plainly(
    products: Sequence[Tensor], shifts: Tensor, scales: Tensor, widths: Sequence[int], slack: float
) -> tuple[list[Tensor], Tensor]:
    """The same in PyTorch, which differentiates it."""
    entries = read_blocks(products, shifts, scales, widths)
    diagonal = entries.diagonal(dim1=1, dim2=2)
    values, sizes = entries.detach(), diagonal.detach().abs()
    scale = values.abs() + values.abs().mT + sizes.unsqueeze(1) + sizes.unsqueeze(2)
    agree = ((values - values.mT).abs() <= slack * scale).all() & values.isfinite().all()
    return [part.reshape(-1).clone() for part in torch.split(diagonal, list(widths), 1)], agree


def read_blocks(products: Sequence[Tensor], shifts: Tensor, scales: Tensor, widths: Sequence[int]) -> Tensor:
    """All entries, shape (blocks, k, k). No operation lets blocks meet."""
    count, k = len(widths), len(scales)
    by_product = [
        torch.cat(
            [
                p.reshape(len(shifts), w)
                for p, w in zip(products[c * count : (c + 1) * count], widths, strict=True)
            ],
            1,
        )
        for c in range(k)
    ]
    scaled = torch.stack(by_product, 2) * scales.t().unsqueeze(1)  # (blocks, rows, products)
    product_of = (torch.arange(k, device=shifts.device) - shifts.unsqueeze(1)) % k
    return scaled.gather(2, product_of.unsqueeze(1).expand(-1, k, -1))
