"""Which differentiation by this package is running in this thread.

Knows nothing of how derivatives are computed: the engine enters and leaves, utilities ask.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

__all__ = ["at_end", "deriving", "differentiation", "ignoring"]


class _State(threading.local):
    """Per thread: how deep we are, and what is to be done as the outermost differentiation ends."""

    def __init__(self) -> None:
        self.depth = 0
        self.callbacks: list[Callable[[], None]] | None = None


_state = _State()


def deriving() -> bool:
    """Whether code running now is being differentiated by this package (``ignoring`` hides it)."""
    return _state.depth > 0


def at_end(callback: Callable[[], None]) -> bool:
    """Call ``callback`` once as the outermost differentiation in this thread ends; ``False`` if none runs."""
    if _state.callbacks is None:
        return False
    _state.callbacks.append(callback)
    return True


@contextlib.contextmanager
def differentiation() -> Iterator[None]:
    """Around running a function that is being differentiated, and around pulling back through it."""
    outermost = _state.callbacks is None
    if outermost:
        _state.callbacks = []
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1
        if outermost:
            callbacks, _state.callbacks = _state.callbacks, None
            for callback in callbacks or ():
                callback()


@contextlib.contextmanager
def ignoring() -> Iterator[None]:
    """Around code whose derivative is to be ignored: ``deriving()`` is ``False`` inside."""
    depth, _state.depth = _state.depth, 0
    try:
        yield
    finally:
        _state.depth = depth
