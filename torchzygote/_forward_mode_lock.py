"""On whose behalf a thread runs: backward passes on a device run in threads of their own, and are waited for.

A lock that a waiting call holds counts as held by its backward threads; otherwise they would deadlock.
Knows nothing of what is computed.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

from ._torch_private import backward_pass, leave_forward_mode, pass_along, passed_along

__all__ = [
    "Behalf",
    "ForwardModeHold",
    "behalf",
    "behalf_from",
    "forget_other_threads",
    "forward_mode_lock",
    "on_behalf",
    "releasing",
    "take",
    "try_to_take",
    "update",
]

# PyTorch's forward-AD levels are process-wide: two threads in forward mode get errors or wrong numbers.
forward_mode_lock = threading.RLock()


def forget_other_threads() -> bool:
    """In a forked process, which has none: whether one of them was in forward mode, which is left then."""
    if forward_mode_lock.acquire(blocking=False):
        forward_mode_lock.release()
        return False
    # As the standard library does with its own locks; nothing public does it.
    forward_mode_lock._at_fork_reinit()  # type: ignore[attr-defined]
    leave_forward_mode()
    return True


class ForwardModeHold:
    """Forward mode, held by a call. What runs on its behalf takes ``lock`` in turn: one thread at a time.

    ``opened``: the call, or one around it, is in forward mode by this package.
    """

    __slots__ = ("ended", "lock", "opened", "outer")

    def __init__(self, outer: ForwardModeHold | None, opened: bool) -> None:
        self.outer = outer
        self.opened = opened
        self.lock = forward_mode_lock if outer is None else threading.RLock()
        self.ended = False


_NOBODYS = ForwardModeHold(None, False)


class Behalf(NamedTuple):
    """``threads``: this one last, before it those that wait for it. ``hold``: the innermost hold of them.

    ``updating``: in an eager update. That is asked of the pass and not of the threads that wait for it: these
    run other parts of it meanwhile, updates among them.
    """

    threads: tuple[int, ...]
    hold: ForwardModeHold
    updating: bool = False


def behalf() -> Behalf:
    """On whose behalf this thread runs."""
    return behalf_from(passed_along())


def behalf_from(found: object) -> Behalf:
    """The same from what :func:`passed_along` gave, and that itself if it belongs to this thread."""
    me = threading.get_ident()
    if not isinstance(found, Behalf):
        return Behalf((me,), _NOBODYS)
    if found.threads[-1] == me:
        return found
    if backward_pass() < 0:  # PyTorch passes it along to threads that nobody waits for, too
        return Behalf((me,), _NOBODYS)
    return Behalf((*found.threads, me), found.hold, found.updating)


def _innermost() -> ForwardModeHold:
    """The innermost hold that hasn't ended: where a backward pass fails, its other threads go on alone."""
    hold = behalf().hold
    while hold.ended and hold.outer is not None:
        hold = hold.outer
    return hold


def try_to_take() -> ForwardModeHold | None:
    """A hold of forward mode for the running call, if it is to be had at once."""
    outer = _innermost()
    if not outer.lock.acquire(blocking=False):
        return None
    if outer.ended:
        outer.lock.release()
        return None
    return ForwardModeHold(outer, outer.opened)


def take() -> ForwardModeHold:
    """A hold of forward mode for the running call."""
    while True:
        outer = _innermost()
        outer.lock.acquire()
        if not outer.ended:
            return ForwardModeHold(outer, outer.opened)
        outer.lock.release()


class releasing:
    """Around what a call does that has taken a hold; it ends when nobody who acts on its behalf has one.

    A class, as generators take longer: each small derivative in forward mode comes by here.
    """

    __slots__ = ("_before", "_hold")

    def __init__(self, hold: ForwardModeHold) -> None:
        self._hold = hold

    def __enter__(self) -> None:
        self._before = passed_along()
        try:
            pass_along(behalf_from(self._before)._replace(hold=self._hold))
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        hold = self._hold
        assert hold.outer is not None
        try:
            pass_along(self._before)
        finally:
            try:
                with hold.lock:
                    hold.ended = True
            finally:
                hold.outer.lock.release()


class update:
    """Around an eager update."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = passed_along()
        pass_along(behalf_from(self._before)._replace(updating=True))

    def __exit__(self, *error: object) -> None:
        pass_along(self._before)


class on_behalf:
    """Around what runs backward passes: threads of devices, where these may run, find out who waits."""

    __slots__ = ("_before", "_mine")

    def __enter__(self) -> None:
        self._before = passed_along()
        self._mine = behalf_from(self._before)
        if self._mine is not self._before:
            pass_along(self._mine)

    def __exit__(self, *error: object) -> None:
        if self._mine is not self._before:
            pass_along(self._before)
