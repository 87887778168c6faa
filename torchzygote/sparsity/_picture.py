"""A matrix's entries as a few lines of text. Knows nothing of where they come from."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["picture"]

# Bits of the dots of a braille character: four rows of two.
_DOTS = torch.tensor([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]], device="cpu")
_BLANK = 0x2800


def picture(rows: Tensor, columns: Tensor, shape: tuple[int, int], width: int, height: int) -> list[str]:
    """Braille characters, each two columns by four rows of cells; a cell is dark if any entry is in it."""
    if shape[0] == 0 or shape[1] == 0:
        return []
    scale = max(1.0, shape[0] / (4 * height), shape[1] / (2 * width))
    down, across = (max(1, round(n / scale)) for n in shape)
    cells = torch.zeros(-(-down // 4) * 4, -(-across // 2) * 2, dtype=torch.int64, device="cpu")
    cells[rows * down // shape[0], columns * across // shape[1]] = 1
    blocks = cells.view(cells.shape[0] // 4, 4, cells.shape[1] // 2, 2)
    codes = (blocks * _DOTS[:, None, :]).sum((1, 3)) + _BLANK
    return ["".join(map(chr, line)) for line in codes.tolist()]
