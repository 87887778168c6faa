"""What recorded graphs hold of the caller's, and let go of as they are dropped.

Knows nothing of derivatives.
"""

from __future__ import annotations

import weakref
from typing import Protocol

__all__ = ["Held", "Owner", "Released"]


class Released(Protocol):
    """What a recorded graph holds of the caller's, whose functions may hold that graph in turn."""

    def release(self) -> None:
        """Let go of it: the graph has been pulled back, and nobody is going to do so again."""


class Held:
    """What is released as a graph is dropped, ``is_dropped`` once that is sure.

    Python's collector doesn't see what autograd's nodes hold: a closure that refers to a tensor computed with
    it would stay for good, and so would the graph.
    """

    __slots__ = ("_refs", "is_dropped")

    def __init__(self) -> None:
        self._refs: set[weakref.ref[Released]] = set()
        self.is_dropped = False

    def add(self, one: Released) -> None:
        """Have ``one`` released, which a pullback has come to."""
        self._refs.add(weakref.ref(one, self._refs.discard))

    def release(self) -> None:
        if not self.is_dropped:
            return
        for one in list(self._refs):
            if (there := one()) is not None:
                there.release()
        self._refs.clear()


class Owner:
    """The graph is dropped with this one."""

    __slots__ = ("_held",)

    def __init__(self, held: Held) -> None:
        self._held = held

    def __del__(self) -> None:
        self._held.release()
