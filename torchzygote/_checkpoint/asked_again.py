"""Tensors that the backward of a custom function asks for again: a checkpoint hands each out once.

Each look at ``ctx.saved_tensors`` unpacks all of them. They are kept with the function that looked last,
until another one does, or the backward pass ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import at_end_of_pass, backward_pass, running_node

__all__ = ["handed_out"]

_PythonNode = torch.autograd.function.BackwardCFunction
_FOUND = "torchzygote_handed_out"  # an attribute of the node: in which pass, and what


class _Last(threading.local):
    """Per thread: who looked last. Nobody holds it, as a pass may fail."""

    node: Callable[[], Any] = staticmethod(lambda: None)

    def forget(self) -> None:
        node, self.node = self.node(), staticmethod(lambda: None)
        if node is not None:
            vars(node).pop(_FOUND, None)


_last = _Last()


def handed_out(key: Any, unpack: Callable[[Any], Tensor], packed: Any) -> Tensor:
    """``unpack(packed)``, once for each ``key`` and backward of a custom function."""
    node = running_node()
    if not isinstance(node, _PythonNode):
        return unpack(packed)
    if _last.node() is not node:
        _last.forget()
        _last.node = weakref.ref(node)
        at_end_of_pass(_last.forget)
    now = backward_pass()
    in_pass, found = vars(node).get(_FOUND, (None, {}))
    if in_pass != now:  # an earlier one has failed
        found = {}
        setattr(node, _FOUND, (now, found))
    if key not in found:
        found[key] = unpack(packed)
    return found[key]  # type: ignore[no-any-return]
