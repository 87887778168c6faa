"""Who wants formulas in place of the functions that are exchanged for them.

These are exchanged process-wide, so that it is asked as they run: the derivatives of the thread that runs
them decide, and no value depends on what other threads do. What runs under hooks on saved tensors may run
again, as ``torch.utils.checkpoint`` does, and must do the same then.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .checkpoints import hooks_in_force

__all__ = [
    "forget_wants",
    "norms_are_wanted",
    "runs_fused_here",
    "under_hooks",
    "want",
    "wanted_here",
    "wanted_here_as",
]


class _WantedState(threading.local):
    """Per thread: how many derivatives want formulas, and how many of them want those of norms, too.

    ``told``: by :func:`wanted_here_as`, so that it is right in a thread of PyTorch's, too.
    """

    def __init__(self) -> None:
        self.users = 0
        self.of_norms = 0
        self.told = False


_here = _WantedState()
# In all threads.
_of_norms = 0


def want(users: int, of_norms: int) -> None:
    """Change the numbers of users by these, which may be negative; one thread at a time."""
    global _of_norms
    _of_norms += of_norms
    here = _here
    here.users += users
    here.of_norms += of_norms


def forget_wants(of_this_thread: bool) -> tuple[int, int]:
    """Of other threads, and of this one, too; how many users are left, and how many of norms."""
    global _of_norms
    if of_this_thread:
        _here.__init__()  # type: ignore[misc]
    _of_norms = _here.of_norms
    return _here.users, _here.of_norms


def norms_are_wanted() -> bool:
    """Whether this thread wants the formulas of norms; one of PyTorch's own, whether anybody does."""
    here = _here
    if here.of_norms > 0 or _of_norms == 0:
        return here.of_norms > 0
    return not here.told and _is_pytorchs()


def wanted_here() -> int:
    """By this thread: 0 for nothing, 1 for formulas, 2 for those of norms, too."""
    here = _here
    return 0 if here.users == 0 else 2 if here.of_norms else 1


@contextlib.contextmanager
def wanted_here_as(before: int) -> Iterator[None]:
    """Around running something again that ran when :func:`wanted_here` said this."""
    here = _here
    kept = here.users, here.of_norms, here.told
    here.users, here.of_norms, here.told = int(before > 0), int(before > 1), True
    try:
        yield
    finally:
        here.users, here.of_norms, here.told = kept


def under_hooks() -> bool:
    """Whether hooks on saved tensors are in force."""
    return hooks_in_force(False) is not None


def runs_fused_here() -> bool:
    """Whether the operators themselves run: no derivative of this thread wants formulas."""
    here = _here
    if here.users > 0:
        return False
    return here.told or not _is_pytorchs()


def _is_pytorchs() -> bool:
    """Whether this thread is one that backward passes on a device have, which doesn't tell whose it is."""
    return isinstance(threading.current_thread(), threading._DummyThread)
