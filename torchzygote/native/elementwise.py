"""Tangents through a function of each element, and its curvature: compiled where that was possible.

Knows nothing of the function, nor of where the tangents come from.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch_private import below_autograd
from ._choice import compiled, mark_written, on_cpu
from ._loading import operator

__all__ = ["push_elementwise", "push_elementwise_plainly", "slope_and_weight"]

_PUSHED = (torch.float32, torch.float64)
if on_cpu:
    _push_elementwise_ = operator("push_elementwise_")


def push_elementwise(
    tangents: Tensor,
    slope: Tensor,
    weight: Tensor,
    *,
    squared: bool,
    function: str = "",
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """``tangents * slope``, and for each direction and sample the sum of what its elements are curved by.

    ``tangents``: shape (directions, samples, elements); ``slope`` and ``weight``: shape (samples, elements).
    An element is curved by ``weight * tangent**2`` if ``squared``, else by ``weight * tangent * pushed``.
    ``function``: ``"tanh"`` or ``"sigmoid"``, whose result and its cotangent are given in their place.
    ``overwrite``: nobody else reads the memory of ``tangents``, which the result may take. Returns a tensor
    of the tangents' shape, and one of shape (directions, samples).
    """
    like = tangents.is_cpu and tangents.dtype in _PUSHED and slope.dtype == weight.dtype == tangents.dtype
    if like and compiled(tangents, slope, weight):
        written = overwrite and tangents.is_contiguous()
        pushed = tangents if written else tangents.clone(memory_format=torch.contiguous_format)
        with below_autograd():
            terms: Tensor = _push_elementwise_(
                pushed, slope.contiguous(), weight.contiguous(), squared, function
            )
        if written:
            mark_written([pushed])
        return pushed, terms
    return push_elementwise_plainly(tangents, slope, weight, squared=squared, function=function)


def push_elementwise_plainly(
    tangents: Tensor, slope: Tensor, weight: Tensor, *, squared: bool, function: str = ""
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch, which differentiates it."""
    slope, weight = slope_and_weight(function, slope, weight)
    pushed = tangents * slope
    terms = (tangents * (tangents if squared else pushed)).mul_(weight)
    return pushed, terms.sum(2)


def slope_and_weight(function: str, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Of a function that gave ``z``, which has the cotangent ``c``; without one, what they are already."""
    if function == "tanh":
        return torch.addcmul(z.new_ones(()), z, z, value=-1), z * c
    if function == "sigmoid":
        return torch.addcmul(z, z, z, value=-1), (1 - 2 * z) * c
    return z, c
