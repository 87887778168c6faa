"""Calls that exchange tensors for their twins, and calls that find tensors by identity: not at the same time.

An exchange (of parameters, inside ``torch.func``) is seen by all threads of the process. Who exchanges holds
the lock of forward mode too, so that nobody waits for the one while holding the other. Knows nothing of what
the calls compute.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from . import _state
from ._flags import remembered
from ._torch_private import swap_tensors

__all__ = ["exchanged", "exchanging", "finding", "finds_by_identity", "forward_mode_held", "swapped"]

# How long an exchange waits for the others: for ever could be for ever, if one of them waits for us.
_PATIENCE = 10.0
# How long those who come later let a waiting exchange go first.
_COURTESY = 0.5

_changed = threading.Condition(threading.Lock())
_finding: dict[int, int] = {}  # by thread: how many calls, one inside the other
_exchanging: list[int] = []  # the thread that does, once for each exchange
_waiting: set[int] = set()

_HELD_BY_ARGUMENT = (Tensor, int, float, complex, str, np.ndarray, np.generic, type(None))


def finds_by_identity(args: Sequence[Any]) -> bool:
    """Whether ``args`` may hold something else than tensors and numbers: modules, ``Params``."""
    return any(not isinstance(x, _HELD_BY_ARGUMENT) for x in args)


def _free_for(me: int) -> bool:
    return not _exchanging or _exchanging[0] == me


def _alone(me: int) -> bool:
    return _free_for(me) and all(thread == me for thread in _finding)


@contextlib.contextmanager
def finding() -> Iterator[None]:
    """Around a call that finds tensors by identity; any number at a time."""
    me = threading.get_ident()
    with _changed:
        if me not in _finding:
            if _waiting and not _exchanging:
                _changed.wait_for(lambda: not _waiting, _COURTESY)
            _changed.wait_for(lambda: _free_for(me))
        _finding[me] = _finding.get(me, 0) + 1
    try:
        yield
    finally:
        with _changed:
            _leave(me)


def _leave(me: int) -> None:
    _finding[me] -= 1
    if not _finding[me]:
        del _finding[me]
        if _waiting:
            _changed.notify_all()


@contextlib.contextmanager
def forward_mode_held() -> Iterator[None]:
    """The lock of forward mode; who waits for it doesn't count as being in a call."""
    lock = _state.forward_mode_lock
    if not lock.acquire(blocking=False):
        me = threading.get_ident()
        with _changed:
            mine = _finding.pop(me, 0)
            _changed.notify_all()
        lock.acquire()
        if mine:
            with _changed:
                _finding[me] = mine
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """Around an exchange: no other thread exchanges, or is in a call that finds tensors by identity.

    One that waits here itself doesn't count as being in such a call: it does nothing meanwhile.
    """
    me = threading.get_ident()
    with forward_mode_held():
        with _changed:
            mine = _finding.pop(me, 0)
            _waiting.add(me)
            _changed.notify_all()
            _changed.wait_for(lambda: _alone(me), _PATIENCE)
            _waiting.discard(me)
            _exchanging.append(me)
            if mine:
                _finding[me] = mine
        try:
            yield
        finally:
            with _changed:
                _exchanging.remove(me)
                _changed.notify_all()


@contextlib.contextmanager
def swapped(inputs: Sequence[Tensor], twins: Sequence[Tensor]) -> Iterator[None]:
    """Every holder of ``inputs[i]`` sees ``twins[i]`` meanwhile; of one that is given twice, the first."""
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for mine, twin in zip(inputs, twins, strict=True):
        pairs.setdefault(id(mine), (mine, twin))
    done: list[tuple[Tensor, Tensor]] = []
    with remembered(inputs):
        try:
            for mine, twin in pairs.values():
                swap_tensors(mine, twin)
                done.append((mine, twin))
            yield
        finally:
            for mine, twin in reversed(done):
                swap_tensors(mine, twin)


@contextlib.contextmanager
def exchanged(inputs: Sequence[Tensor], twins: Sequence[Tensor]) -> Iterator[None]:
    """:func:`swapped`, while no other thread is in a call that finds tensors by identity."""
    with exchanging(), swapped(inputs, twins):
        yield
