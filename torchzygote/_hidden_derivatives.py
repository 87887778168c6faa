"""Derivatives that operators don't show: utilities say so here, and whoever reads operators asks.

Knows nothing of how they are computed, nor of structure.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from torch import Tensor

__all__ = ["cut", "cutting", "out_of_sight", "watching"]


class _HiddenState(threading.local):
    def __init__(self) -> None:
        self.notes: list[str] | None = None
        self.cut: Callable[[Tensor], Tensor] | None = None


_watched = _HiddenState()


def out_of_sight(what: str) -> None:
    """Say that the derivative from here on isn't that of the operators (a gradient is bent)."""
    if _watched.notes is not None:
        _watched.notes.append(what)


def cut(x: Tensor) -> Tensor:
    """``x`` without its derivative, and so that whoever reads operators sees it: they know memory alone."""
    return x.detach() if _watched.cut is None else _watched.cut(x)


@contextlib.contextmanager
def cutting(how: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Around a run of a function: how values are cut off their derivatives there."""
    before, _watched.cut = _watched.cut, how
    try:
        yield
    finally:
        _watched.cut = before


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """Around a run of a function: the list fills with what is out of sight."""
    before, _watched.notes = _watched.notes, []
    try:
        yield _watched.notes
    finally:
        _watched.notes = before
