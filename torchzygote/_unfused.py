"""Formulas in place of operators, while a second or a forward derivative is taken that they lack.

Fused attention has neither a forward derivative nor (on the CPU) a double backward, and the inference fast
path of PyTorch's transformer layers has no derivative at all; the double backward of fused weight norm is
wrong (2.13), and so is what comes of differentiating that of layer, batch and instance norm: these stay fused
where nobody will. Distances by matrix products have NaN for second derivatives where points are equal. What
TorchScript has optimized loses derivatives inside ``torch.func``, and runs as it was written there. The
switches are process-wide, so they are counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ._torch_private import (
    ATTENTION,
    DISTANCES,
    NORMS,
    RECURRENT,
    TRACED_LACKING,
    TRACED_NORMS,
    TRACED_RUNNING,
    WEIGHT_NORM,
    WRITTEN,
    Exchanges,
    enable_optimized_scripts,
    exchange,
    forget_exchanged,
    forget_wants,
    fuse_attention_again,
    fused_weight_norm_enabled,
    unfuse_attention,
    want,
    wanted_here,
    wanted_here_as,
)

__all__ = ["forget_threads", "unfused", "unfused_as_before", "unfused_but_norms", "unfused_for"]

_ALWAYS = Exchanges(*ATTENTION, *RECURRENT, *WEIGHT_NORM, *NORMS, *DISTANCES)
_WITH_NORMS = Exchanges(*WRITTEN)
_TRACED = (*WEIGHT_NORM, *TRACED_NORMS, *TRACED_LACKING, *TRACED_RUNNING)

_lock = threading.Lock()
_users = 0
# Users that don't count while something runs again as it ran before them. Functions stay exchanged for them:
# these ask for whom they run.
_set_aside = 0
_users_of_norms = 0
_are_off = False
_are_exchanged = False
_attention: Any = None  # what was allowed before


def _count(users: int, set_aside: int = 0) -> None:
    """Change the numbers of users by these, which may be negative, and switch. The caller holds the lock."""
    global _are_exchanged, _are_off, _attention, _set_aside, _users
    _users += users
    _set_aside += set_aside
    if (_users > 0) is not _are_off:
        _are_off = not _are_off
        if _are_off:
            _attention = unfuse_attention()
        else:
            fuse_attention_again(_attention)
        enable_optimized_scripts(not _are_off)
    if (_users + _set_aside > 0) is not _are_exchanged:
        _are_exchanged = not _are_exchanged
        _ALWAYS.exchange(back=not _are_exchanged)
        if not _are_exchanged:
            forget_exchanged()


def _count_norms(users: int) -> None:
    """Those who want the formulas of norms want them of what PyTorch can't differentiate twice, too."""
    global _users_of_norms
    before, _users_of_norms = _users_of_norms, _users_of_norms + users
    if (before > 0) is not (_users_of_norms > 0):
        _WITH_NORMS.exchange(back=before > 0)


def _enter(norms: int) -> None:
    with _lock:
        want(1, norms)
        if norms:
            _count_norms(norms)
        _count(1)


def _leave(norms: int) -> None:
    with _lock:
        want(-1, -norms)
        if norms:
            _count_norms(-norms)
        if _users > 0:
            _count(-1)
        else:  # another thread has set this one aside
            _count(0, -1)


def forget_threads(*, this_one: bool) -> None:
    """In a forked process, which has no others; ``this_one``: nor does this thread want anything."""
    _lock._at_fork_reinit()  # type: ignore[attr-defined]
    users, norms = forget_wants(this_one)
    with _lock:
        _count_norms(norms - _users_of_norms)
        _count(users - _users, -_set_aside)


def unfused_for() -> tuple[bool, int]:
    """Whether fused kernels are off, and what formulas run for in this thread.

    0: no formulas, 1: for second derivatives, 2: for differentiating those again.
    """
    return _users > 0, wanted_here()


@contextlib.contextmanager
def unfused_as_before(before: tuple[bool, int]) -> Iterator[None]:
    """Around running something again that ran when :func:`unfused_for` said this."""
    are_off, here = before
    with _kernels_off(int(here > 1)) if are_off else _kernels_on(), wanted_here_as(here):
        yield


@contextlib.contextmanager
def _kernels_off(norms: int) -> Iterator[None]:
    _enter(norms)
    try:
        yield
    finally:
        _leave(norms)


@contextlib.contextmanager
def _kernels_on() -> Iterator[None]:
    with _lock:
        count = _users
        _count(-count, count)
    try:
        yield
    finally:
        with _lock:
            count = min(count, _set_aside)
            _count(count, -count)


class unfused:
    """Around running a function whose derivative the fused kernels lack, or have wrong."""

    __slots__ = ("_leave",)

    norms = 1

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self._leave: Callable[[int], None] | None = _leave
            _enter(self.norms)
        elif fused_weight_norm_enabled():
            # The tracer undoes this at once, and can't follow the rest.
            self._leave = _fuse_traced
            exchange(_TRACED)
        else:
            self._leave = None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._leave is not None:
            self._leave(self.norms)


class unfused_but_norms(unfused):
    """The same for a second derivative that nobody is going to differentiate: norms have that right."""

    __slots__ = ()

    norms = 0


def _fuse_traced(_: int) -> None:
    exchange(_TRACED, back=True)
