"""What a forked process must forget: locks and counts of threads that it doesn't have.

A worker of a ``DataLoader`` may be forked while another thread is in the middle of a derivative. Knows who
keeps such things, not what they are for.
"""

from __future__ import annotations

import os
from multiprocessing import util

from . import _exchange, _forward_mode_lock, _state, _unfused
from ._torch_private import forget_recorded

__all__: list[str] = []


def _forget_other_threads() -> None:
    if _forward_mode_lock.forget_other_threads():
        _state.forget_forward_mode()
    _state.forget_other_threads()
    _exchange.forget_other_threads()
    _unfused.forget_threads(this_one=False)
    forget_recorded()


def _begin_anew(_: object) -> None:
    """In a process of ``multiprocessing``, which goes on with no derivative that ran where it was forked.

    But with the levels of ``torch.func`` that were open there.
    """
    _state.forget_all()
    _unfused.forget_threads(this_one=True)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_other_threads)
util.register_after_fork(_begin_anew, _begin_anew)
