"""Numbers on a device: filled in there, as the CPU would wait for the device to copy them.

Knows nothing of what they are for.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["filled_in"]


def filled_in(number: Tensor, device: torch.device) -> Tensor:
    """A tensor without dimensions, which is on the CPU, on another device."""
    if torch.compiler.is_compiling():  # which can't follow item()
        return number.to(device)
    return torch.full((), number.item(), dtype=number.dtype, device=device)
