"""What ``f`` is given besides its inputs: values that the next call may replace by others.

Knows arguments and memory, nothing of how a run is written down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._arguments import OPAQUE, Prepared
from .._torch_private import pytree

__all__ = ["addresses", "lies_in", "varying_of"]


def varying_of(prepared: Prepared) -> list[Tensor | np.ndarray[Any, Any]]:
    """Tensors and arrays among the arguments that ``f`` gets as they are, in structures and modules too."""
    found: list[Any] = []
    for slot in prepared.slots:
        if slot.kind is OPAQUE:
            for leaf in pytree.tree_leaves(slot.value):
                if isinstance(leaf, nn.Module):
                    found.extend((*leaf.parameters(), *leaf.buffers()))
                elif isinstance(leaf, (Tensor, np.ndarray)):
                    found.append(leaf)
    return found


def addresses(array: np.ndarray[Any, Any]) -> range:
    """Where an array's elements lie: a tensor that is made of it is known by this alone."""
    first = array.__array_interface__["data"][0]
    steps = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    low = first + sum(step for step in steps if step < 0)
    return range(low, first + sum(step for step in steps if step > 0) + array.itemsize if array.size else low)


def lies_in(x: Tensor, ranges: list[range]) -> bool:
    """Whether a tensor begins in one of these pieces of memory."""
    return x.device.type == "cpu" and x.layout == torch.strided and any(x.data_ptr() in r for r in ranges)
