"""Rows by the weights of a convolution, each sample's by itself: products of the windows that it slides over.

Knows the recorded node of a convolution and tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import node_attribute

__all__ = ["rows_by_windows"]

# Windows of so many bytes are copied at a time.
_WINDOWS = 32 << 20


def rows_by_windows(node: Any, image: Tensor, given: Tensor, shape: Sequence[int]) -> Tensor:
    """From rows by what a convolution gives of the ``image`` to (samples, rows, *shape), its weight's.

    The only axis of samples is the first.
    """
    given = given.transpose(0, 1)  # (samples, rows, channels, *places)
    each = math.prod(shape[2:]) * image[0].numel() * image.element_size()
    if node_attribute(node, "_saved_transposed"):
        each *= given.shape[1] * given.shape[2]
    step = max(1, _WINDOWS // max(1, each))
    parts = [
        _of_some(node, shape, image[lo : lo + step], given[lo : lo + step])
        for lo in range(0, len(image), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _of_some(node: Any, shape: Sequence[int], image: Tensor, given: Tensor) -> Tensor:
    """Rows by the weights for each sample, (samples, rows, *the weight's)."""
    kernel = shape[2:]
    groups = int(node_attribute(node, "_saved_groups"))
    samples, rows = given.shape[:2]
    if not node_attribute(node, "_saved_transposed"):
        places = given.shape[3:]
        left = given.reshape(samples, rows, groups, -1, math.prod(places)).transpose(1, 2)
        left = left.reshape(samples, groups, -1, math.prod(places))  # rows and channels out
        right = _windows(node, image, kernel, places)
        right = right.reshape(samples, groups, -1, math.prod(places))  # channels in, and the window
        found = (left @ right.mT).view(samples, groups, rows, -1, right.shape[2]).transpose(1, 2)
    else:  # what comes back slides over what came in
        places = image.shape[2:]
        left = image.reshape(samples, groups, -1, math.prod(places))  # channels in
        right = _windows(node, given.flatten(0, 1), kernel, places).reshape(
            samples, rows, groups, -1, math.prod(places)
        )
        right = right.transpose(1, 2).flatten(2, 3)  # rows, channels out, and the window
        found = (left @ right.mT).view(samples, groups, left.shape[2], rows, -1).permute(0, 3, 1, 2, 4)
    return found.reshape(samples, rows, *shape)


def _windows(node: Any, image: Tensor, kernel: Sequence[int], places: Sequence[int]) -> Tensor:
    """What a convolution slides over an image: (samples, channels, *window, *places), copied last."""
    strides, paddings, dilations = (
        [int(n) for n in node_attribute(node, f"_saved_{name}")] for name in ("stride", "padding", "dilation")
    )
    around = [n for padding in reversed(paddings) for n in (padding, padding)]
    found = F.pad(image, around)
    for i, size in enumerate(kernel):
        found = found.unfold(2 + i, (size - 1) * dilations[i] + 1, strides[i])[..., :: dilations[i]]
        found = found.narrow(2 + i, 0, places[i])
    rank = len(kernel)
    order = (0, 1, *range(2 + rank, 2 + 2 * rank), *range(2, 2 + rank))
    return found.permute(order)  # windows outside: to copy them inside takes four times as long
