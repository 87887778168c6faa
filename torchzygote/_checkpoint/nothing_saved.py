"""A checkpoint whose function saved nothing: it is linear, and no backward pass asks for anything of it.

Runs something before a backward pass; it must not know what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import backward_pass, outside_functorch, pytree, recorded_since
from .surroundings import outside_inference

__all__ = ["run_before_backward"]


def run_before_backward(rerun: Callable[[], Any], y: Any, start: int) -> Any:
    """``y``, whose backward passes call ``rerun`` first: what a run does besides would be missed.

    ``start``: the number from which nodes of the graph are of the first run; others are not to be hooked.
    """
    ran_in = -1

    def again(_: Any) -> None:
        nonlocal ran_in
        now = backward_pass()
        if now != ran_in:
            ran_in = now
            with outside_functorch(), outside_inference(), torch.enable_grad():
                rerun()

    def watched(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.requires_grad:
            return x
        if x.grad_fn is None or not recorded_since(x.grad_fn, start):
            x = x.view_as(x)
        assert x.grad_fn is not None
        x.grad_fn.register_prehook(again)
        return x

    return pytree.tree_map(watched, y)
