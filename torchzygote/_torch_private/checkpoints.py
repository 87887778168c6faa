"""Whether a checkpoint is around what runs here, PyTorch's or ours; there is no public question for that."""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint as _checkpoint
from torch.utils.checkpoint import CheckpointFunction

from . import backward
from .levels import outside_functorch

__all__ = [
    "aside_of_checkpoint",
    "checkpoint_undebugged",
    "hooks_in_force",
    "inside_checkpoint",
    "is_of_checkpoint",
    "is_of_pytorchs",
    "runs_again",
]

Returned = TypeVar("Returned")

# The pack and unpack hooks, if there are any: others that call them can then be put on top. A function around
# it would be traced where a graph breaks.
hooks_in_force: Any = torch._C._autograd._top_saved_tensors_default_hooks

# The modules of the functions by which a checkpoint packs.
_PYTORCHS = "torch.utils.checkpoint"
_CHECKPOINTS = (_PYTORCHS, "torchzygote._checkpoint.tape")
# What a function that packs has from another one, whose errors it hands on.
_BENEATH = "torchzygote_beneath"
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


# What stands for False while a checkpoint of ours asks whether it is debugged.
_OFF: Any = []
_asking = threading.Lock()


def _as_it_is(x: Tensor) -> Tensor:
    return x


def checkpoint_undebugged(
    function: Callable[..., Any], *args: Any, context_fn: Callable[[], Any], **options: Any
) -> Any:
    """``torch.utils.checkpoint.checkpoint``, though its messages are to be long ones for all checkpoints.

    ``set_checkpoint_debug_enabled`` has PyTorch watch with contexts of its own, and refuses others; nothing
    public tells. Checkpoints inside of ``function`` are as the caller wants them.
    """
    wanted = _checkpoint._checkpoint_debug_enabled
    if not wanted and wanted is not _OFF:
        return _checkpoint.checkpoint(function, *args, context_fn=context_fn, **options)
    has_asked = contextlib.ExitStack()

    def contexts() -> Any:
        has_asked.close()
        return context_fn()

    with has_asked:
        has_asked.enter_context(_undebugged())
        return _checkpoint.checkpoint(function, *args, context_fn=contexts, **options)


@contextlib.contextmanager
def _undebugged() -> Iterator[None]:
    """One thread at a time."""
    with _asking:
        wanted = _checkpoint._checkpoint_debug_enabled
        _checkpoint._checkpoint_debug_enabled = _OFF
        try:
            yield
        finally:
            if _checkpoint._checkpoint_debug_enabled is _OFF:  # else somebody has set it meanwhile
                _checkpoint._checkpoint_debug_enabled = wanted


def is_of_checkpoint(hooks: tuple[Any, Any]) -> bool:
    """Whether what is recorded under these hooks is left to a checkpoint, which runs it again."""
    return getattr(hooks[0], "__module__", None) in _CHECKPOINTS or hasattr(hooks[0], _BENEATH)


def is_of_pytorchs(hooks: tuple[Any, Any]) -> bool:
    """Whether these are the hooks of ``torch.utils.checkpoint`` itself."""
    return getattr(hooks[0], "__module__", None) == _PYTORCHS


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
        pack = getattr(hooks[0], _BENEATH, hooks[0])
        inside = dict(zip(pack.__code__.co_freevars, pack.__closure__ or (), strict=True))
        if "frame" in inside:  # not so in ours, which restores what was
            _begun_in_passes.add(inside["frame"].cell_contents)
    return False


class _Ended(BaseException):
    """What a checkpoint raises to end a second run, in a form that ``except Exception`` doesn't catch."""

    def __init__(self, mark: object, error: Exception) -> None:
        self.mark = mark
        self.error = error


class _Through(saved_tensors_hooks):
    """The hooks of a checkpoint, while a derivative is taken in its function, and recorded.

    The checkpoint ends its second run by an exception, which says nothing about the way that the derivative
    is being taken. That one's backward passes run the function again, also under ``vmap``: out of it.
    """

    def __init__(self, hooks: tuple[Any, Any]) -> None:
        pack_beneath, unpack_beneath = hooks
        mark = self.mark = object()  # not self, which holds pack

        def pack(x: Tensor) -> Any:
            try:
                return pack_beneath(x)
            except Exception as error:
                raise _Ended(mark, error) from None

        def unpack(packed: Any) -> Tensor:
            with outside_functorch():
                return unpack_beneath(packed)  # type: ignore[no-any-return]

        setattr(pack, _BENEATH, pack_beneath)
        super().__init__(pack, unpack)


def inside_checkpoint(hooks: tuple[Any, Any], derivative: Callable[[], Returned]) -> Returned:
    """What ``derivative`` returns, recorded inside the function of a checkpoint, whose hooks these are."""
    through = _Through(hooks)
    try:
        with through:
            return derivative()
    except _Ended as ended:
        if ended.mark is not through.mark:
            raise
        held = [ended.error]
    # Out here, to keep its context; popped, so that no frame keeps it alive.
    raise held.pop()
