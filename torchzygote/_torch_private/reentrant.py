"""Reentrant checkpoints of PyTorch's, recorded as the others are while this package takes a derivative.

``torch.utils.checkpoint`` with ``use_reentrant=True`` runs its function with the tape off, and hands the tape
the arguments alone: by what the function closes over the derivative would be zero, silently. There is no
hook for that, and what the caller has imported is ``checkpoint`` itself: what that calls is exchanged, once
and for all. Whether anybody differentiates is asked where a reentrant checkpoint runs, and nowhere else.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from .levels import in_functorch

__all__ = ["record_reentrant_checkpoints"]


class _ReentrantState(threading.local):
    """Per thread: whether the function of such a checkpoint runs, maybe again, after the derivative ended."""

    recorded = False


_here = _ReentrantState()


def _recorded(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``; checkpoints inside of it are the same kind in each run."""
    before, _here.recorded = _here.recorded, True
    try:
        return function(*args)
    finally:
        _here.recorded = before


_asks: Callable[[], bool] = lambda: False


def apply(cls: Any, function: Any = None, preserve_rng_state: Any = None, *args: Any, **kwargs: Any) -> Any:
    """``CheckpointFunction.apply``, whose name it has, so that it can be pickled as that could."""
    if (
        cls is not CheckpointFunction
        or in_functorch()
        or not torch.is_grad_enabled()
        or not (_here.recorded or _asks())
    ):
        return super(CheckpointFunction, cls).apply(function, preserve_rng_state, *args, **kwargs)
    again = functools.partial(_recorded, function)
    # To its end, as that runs: torch.rrelu draws its noise after it has saved it.
    options = {"use_reentrant": False, "early_stop": False, "preserve_rng_state": preserve_rng_state}
    return checkpoint(again, *args, **options)


def record_reentrant_checkpoints(while_: Callable[[], bool]) -> None:
    """From now on, ``while_()``: the checkpoint is the other kind, which sees what its function closes over.

    Not inside ``torch.func``, which refuses both, nor where the tape is off; and no class made of it is.
    """
    global _asks
    _asks = while_
    CheckpointFunction.apply = classmethod(apply)  # type: ignore[assignment]
