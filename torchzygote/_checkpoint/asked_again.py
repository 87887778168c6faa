"""Tensors that the backward of a custom function asks for again: a checkpoint hands each out once.

Each look at ``ctx.saved_tensors`` unpacks all of them. They are kept for the function that looked last, until
another one does, or the backward pass ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import at_end_of_pass, backward_pass, running_node

__all__ = ["handed_out"]

_PythonNode = torch.autograd.function.BackwardCFunction


class _Asked(threading.local):
    """Per thread: whose backward runs, and what it has got."""

    node: Any = None

    def __init__(self) -> None:
        self.found: dict[Any, Tensor] = {}

    def forget(self) -> None:
        self.node, self.found = None, {}


_asked = _Asked()


def handed_out(key: Any, unpack: Callable[[], Tensor]) -> Tensor:
    """What ``unpack`` gives, once for each ``key`` and backward of a custom function."""
    node = running_node()
    if not isinstance(node, _PythonNode) or backward_pass() < 0:
        return unpack()
    if _asked.node is not node:
        _asked.forget()
        _asked.node = node
        at_end_of_pass(_asked.forget)
    if key not in _asked.found:
        _asked.found[key] = unpack()
    return _asked.found[key]
