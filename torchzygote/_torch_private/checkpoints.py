"""Whether a checkpoint is around what runs here, PyTorch's or ours; there is no public question for that."""

from __future__ import annotations

import sys
import weakref
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction

from . import backward

__all__ = ["aside_of_checkpoint", "hooks_in_force", "is_of_checkpoint", "runs_again"]

# The pack and unpack hooks, if there are any: others that call them can then be put on top. A function around
# it would be traced where a graph breaks.
hooks_in_force: Any = torch._C._autograd._top_saved_tensors_default_hooks

# The modules of the functions by which a checkpoint packs.
_CHECKPOINTS = ("torch.utils.checkpoint", "torchzygote._checkpoint.tape")
# What runs a function again: the backward of a reentrant checkpoint, the hook that unpacks of another one.
_REENTRANT = CheckpointFunction.backward.__code__
_UNPACKS = (_REENTRANT.co_filename, "unpack_hook")
# Checkpoints of PyTorch's whose functions ran first in a backward pass.
_begun_in_passes: weakref.WeakSet[Any] = weakref.WeakSet()
_BEGIN_PASSES = {
    function.__code__
    for function in (getattr(graph, "_engine_run_backward", None), backward._run)
    if function is not None
}


def _as_it_is(x: Tensor) -> Tensor:
    return x


def is_of_checkpoint(hooks: tuple[Any, Any]) -> bool:
    """Whether what is recorded under these hooks is left to a checkpoint, which runs it again."""
    return getattr(hooks[0], "__module__", None) in _CHECKPOINTS


def aside_of_checkpoint() -> saved_tensors_hooks:
    """Around what is recorded to be pulled back at once, and need not be left to a checkpoint."""
    return saved_tensors_hooks(_as_it_is, _as_it_is)


def runs_again() -> bool:
    """Whether what runs here in a backward pass is what a checkpoint of PyTorch's has run outside of any.

    It is recorded, whether the pass is or not. What runs for the first time, in the backward of a custom
    function, is remembered by its checkpoint: it is in a pass when it runs again, too.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (code := frame.f_code) not in _BEGIN_PASSES:
        if code is _REENTRANT:
            return True
        if (code.co_filename, code.co_name) == _UNPACKS and "frame" in frame.f_locals:
            return frame.f_locals["frame"] not in _begun_in_passes
        frame = frame.f_back
    hooks = hooks_in_force(False)
    if hooks is not None and is_of_checkpoint(hooks):
        inside = dict(zip(hooks[0].__code__.co_freevars, hooks[0].__closure__ or (), strict=True))
        if "frame" in inside:  # not so in ours, which restores what was
            _begun_in_passes.add(inside["frame"].cell_contents)
    return False
