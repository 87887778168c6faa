"""On whose behalf a thread runs: backward passes on a device run in threads of their own, and are waited for.

A lock that a waiting call holds counts as held by its backward threads; otherwise they would deadlock.
Knows nothing of what is computed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ._torch_private import backward_pass, leave_forward_mode, pass_along, passed_along

__all__ = [
    "Behalf",
    "ForwardModeHold",
    "behalf",
    "behalf_from",
    "forget_other_threads",
    "forward_mode_lock",
    "held",
    "on_behalf",
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

    def __init__(self, outer: ForwardModeHold | None) -> None:
        self.outer = outer
        self.opened = False
        self.lock = forward_mode_lock if outer is None else threading.RLock()
        self.ended = False


_NOBODYS = ForwardModeHold(None)


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


def _innermost(mine: Behalf) -> ForwardModeHold:
    """The innermost hold that hasn't ended: where a backward pass fails, its other threads go on alone."""
    hold = mine.hold
    while hold.ended and hold.outer is not None:
        hold = hold.outer
    return hold


@contextlib.contextmanager
def held(waiting: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """Forward mode, held by the running call; ``waiting``: around what it does if it has to wait.

    It ends when nobody who acts on its behalf has it. A generator, of which an interrupt at the very ends
    makes one that is closed later, and releases the lock then.
    """
    before = passed_along()
    while True:
        mine = behalf_from(before)
        outer = _innermost(mine)
        hold = ForwardModeHold(outer)
        taken: list[bool] = []
        try:
            # Taken and noted in one call: after each a signal may be handled, whose handler may raise.
            taken.extend(map(outer.lock.acquire, (False,)))
            if True not in taken:
                with waiting():
                    taken.extend(map(outer.lock.acquire, (True,)))
            if not outer.ended:
                hold.opened = outer.opened
                pass_along(mine._replace(hold=hold))
                yield
                return
        finally:
            if True in taken:
                try:
                    pass_along(before)
                finally:
                    try:
                        with hold.lock:
                            hold.ended = True
                    finally:
                        outer.lock.release()


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
