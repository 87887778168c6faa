"""Calls that exchange tensors for their twins, and calls that find tensors by identity: not at the same time.

An exchange (of parameters, inside ``torch.func``) is seen by all threads of the process. Who exchanges holds
the lock of forward mode too, so that nobody waits for the one while holding the other. Knows nothing of what
the calls compute.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from . import _forward_mode_lock
from ._flags import remembered
from ._torch_private import (
    keeps_tensors_from_swapping,
    passes_leave_their_thread,
    scripts_kept_from,
    swap_tensors,
)

__all__ = [
    "exchanged",
    "exchanging",
    "finding",
    "finds_by_identity",
    "forget_other_threads",
    "forward_mode_held",
    "swapped",
]

# How long an exchange waits for the others, in seconds: for ever could be for ever, if one waits for us.
_PATIENCE = 300.0
# How long those who come later let a waiting exchange go first.
_COURTESY = 0.5

_lock = threading.Lock()
_changed = threading.Condition(_lock)
_finding: dict[int, int] = {}  # by thread: how many calls, one inside the other
_exchanging: list[int] = []  # the thread that does, once for each exchange
_waiting: set[int] = set()

_HELD_BY_ARGUMENT = (Tensor, int, float, complex, str, np.ndarray, np.generic, type(None))


def finds_by_identity(args: Sequence[Any]) -> bool:
    """Whether ``args`` may hold something else than tensors and numbers: modules, ``Params``."""
    return any(not isinstance(x, _HELD_BY_ARGUMENT) for x in args)


def forget_other_threads() -> None:
    """In a forked process, which has none."""
    _lock._at_fork_reinit()  # type: ignore[attr-defined]
    _changed._waiters.clear()  # type: ignore[attr-defined]
    me = threading.get_ident()
    for thread in set(_finding) - {me}:
        del _finding[thread]
    _exchanging[:] = [thread for thread in _exchanging if thread == me]
    _waiting.clear()


# ``us``: a thread, and those that wait for its backward pass.


def _free_for(us: Collection[int]) -> bool:
    return all(thread in us for thread in _exchanging)


def _alone(us: Collection[int]) -> bool:
    return _free_for(us) and all(thread in us for thread in _finding)


class finding:
    """Around a call that finds tensors by identity; any number at a time.

    A class, and the lock itself: small calls wait for this.
    """

    __slots__ = ("_along", "_me")

    def __enter__(self) -> None:
        me = self._me = threading.get_ident()
        self._along: _forward_mode_lock.on_behalf | None = None
        counted = False
        try:
            with _lock:
                if (_waiting or _exchanging) and me not in _finding:
                    _wait_for_exchanges()
                _finding[me] = _finding.get(me, 0) + 1
                counted = True
            if passes_leave_their_thread():  # else nobody acts on our behalf
                along = _forward_mode_lock.on_behalf()
                along.__enter__()
                self._along = along
        except BaseException:  # an interrupt, too
            if counted:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            if self._along is not None:
                self._along.__exit__()
        finally:
            me = self._me
            with _lock:
                # Nothing is called before: an interrupt would leave the count, for which exchanges wait.
                if me in _finding:  # unless one has come while this thread was _absent
                    _finding[me] -= 1
                    if not _finding[me]:
                        del _finding[me]
                        if _waiting:
                            _changed.notify_all()


def _wait_for_exchanges() -> None:
    """Let those that wait go first, and those that run come to an end. ``_lock`` is held."""
    us = _forward_mode_lock.behalf().threads
    if not (_exchanging or any(thread in _finding for thread in us)):
        _changed.wait_for(lambda: not _waiting, _COURTESY)
    _changed.wait_for(lambda: _free_for(us))


class _absent:
    """While a thread waits, it doesn't count as being in a call: it does nothing meanwhile.

    A class, as a generator that an interrupt leaves behind would count it again when it is closed.
    """

    __slots__ = ("_me", "_mine")

    def __enter__(self) -> None:
        self._me = threading.get_ident()
        self._mine = 0
        try:
            with _lock:
                self._mine = _finding.get(self._me, 0)
                if self._mine:
                    del _finding[self._me]
                    _changed.notify_all()
        except BaseException:  # an interrupt, too
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        if self._mine:
            with _lock:
                _finding[self._me] = self._mine


def forward_mode_held() -> contextlib.AbstractContextManager[None]:
    """While it is entered, this call has the lock of forward mode."""
    return _forward_mode_lock.held(_absent)


def _wait_until_alone(us: Collection[int], me: int) -> None:
    """Wait for the other calls; whatever interrupts that leaves nothing behind. ``_lock`` is held."""
    try:
        _waiting.add(me)
        alone = _changed.wait_for(lambda: _alone(us), _PATIENCE)
    finally:
        _waiting.discard(me)
        _changed.notify_all()  # of those who let us go first
    if not alone:
        raise RuntimeError(
            "a derivative by Params inside a torch.func transform exchanges them for all threads. It has "
            f"waited for {_PATIENCE:g} seconds for other threads to leave derivatives that find tensors "
            "by identity, and one of them may be waiting for this thread. Pass the tensors as arguments, or "
            "take the derivatives one after the other"
        )


@contextlib.contextmanager
def exchanging() -> Iterator[None]:
    """Around an exchange: no other thread exchanges, or is in a call that finds tensors by identity."""
    us = _forward_mode_lock.behalf().threads
    me = us[-1]
    with forward_mode_held():
        counted = False
        try:
            with _absent(), _lock:
                _wait_until_alone(us, me)
                counted = True  # before: after a call an interrupt may come
                _exchanging.append(me)
            yield
        finally:
            if counted:
                with _lock:
                    _exchanging.remove(me)
                    _changed.notify_all()


def _swap_back(done: Sequence[tuple[Tensor, Tensor]]) -> None:
    """All of them, also if one is refused."""
    left: list[Tensor] = []
    failed: Exception | None = None
    for mine, twin in reversed(done):
        try:
            swap_tensors(mine, twin)
        except Exception as error:
            left.append(mine)
            failed = error
    if failed is None:
        return
    try:
        raise RuntimeError(
            f"{len(left)} of {len(done)} tensors that f finds by identity couldn't be exchanged back, and "
            "hold nothing any more: something has referred to them while f ran, as a torch.profiler with "
            "record_shapes=True inside of f does; make them anew, and profile without shapes"
        ) from failed
    finally:
        failed = None  # whose traceback holds this frame


def _swap(mine: Tensor, twin: Tensor) -> None:
    try:
        swap_tensors(mine, twin)
    except RuntimeError as error:
        raise _refusal() from error


def _refusal() -> RuntimeError:
    return RuntimeError(
        "what a function finds by identity (parameters, what a checkpointed function closes over) can't be "
        "exchanged, as forward mode and torch.func transforms need it, while others refer to it: "
        "torch.profiler does as it records shapes, and what it has recorded; profile with "
        "record_shapes=False, let go of that profile, or pass the tensors as arguments"
    )


@contextlib.contextmanager
def swapped(inputs: Sequence[Tensor], twins: Sequence[Tensor]) -> Iterator[None]:
    """Every holder of ``inputs[i]`` sees ``twins[i]`` meanwhile; of one that is given twice, the first."""
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for mine, twin in zip(inputs, twins, strict=True):
        pairs.setdefault(id(mine), (mine, twin))
    if pairs and keeps_tensors_from_swapping():
        raise _refusal()
    done: list[tuple[Tensor, Tensor]] = []
    with remembered(inputs), scripts_kept_from(twins):
        try:
            for mine, twin in pairs.values():
                _swap(mine, twin)
                done.append((mine, twin))
            yield
        finally:
            _swap_back(done)


@contextlib.contextmanager
def exchanged(inputs: Sequence[Tensor], twins: Sequence[Tensor]) -> Iterator[None]:
    """:func:`swapped`, while no other thread is in a call that finds tensors by identity."""
    with exchanging(), swapped(inputs, twins):
        yield
