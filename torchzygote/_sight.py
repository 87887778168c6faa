"""What operators don't show: utilities say so here, and whoever reads a function off its operators asks.

Knows nothing of derivatives or structure.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["out_of_sight", "watching"]


class _Watched(threading.local):
    def __init__(self) -> None:
        self.notes: list[str] | None = None


_watched = _Watched()


def out_of_sight(what: str) -> None:
    """Say that the derivative from here on isn't that of the operators (a gradient is bent)."""
    if _watched.notes is not None:
        _watched.notes.append(what)


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """Around a run of a function: the list fills with what is out of sight."""
    before, _watched.notes = _watched.notes, []
    try:
        yield _watched.notes
    finally:
        _watched.notes = before
