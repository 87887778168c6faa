"""Whether the compiled operator is there for the tensors at hand, and right.

Knows nothing of what the operators compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import has_tangent, in_forward_ad, in_functorch
from ._loading import loaded_devices

__all__ = ["as_stored", "compiled", "mark_written", "on_cpu", "on_cuda"]

on_cpu = "cpu" in loaded_devices
on_cuda = "cuda" in loaded_devices
_PLAIN = (Tensor, torch.nn.Parameter)


def compiled(*tensors: Tensor | None) -> bool:
    """Whether the compiled operator is there for these tensors, and right: nothing differentiates them."""
    if torch.compiler.is_compiling() or not on_cpu or in_functorch():
        return False
    recording, pushing = torch.is_grad_enabled(), in_forward_ad()  # by any thread
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or not (x.is_cpu or (on_cuda and x.is_cuda)):
            return False
        if (recording and x.requires_grad) or (pushing and has_tangent(x)):
            return False
    return True


def as_stored(x: Tensor) -> bool:
    """Whether memory has its numbers as they are, not for a view that conjugates or negates them.

    PyTorch resolves such views where an operator reads them, but not where one without a result writes.
    """
    return not (x.is_conj() or x.is_neg())


def mark_written(tensors: Sequence[Tensor]) -> None:
    """Let autograd know, which the call went past, in case one of them was saved for a backward pass."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])
