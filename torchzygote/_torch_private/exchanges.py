"""Functions of PyTorch's that have no switch, exchanged for others and back, in a row.

Small second derivatives wait for this, and code that has left the caches is what they wait for: one loop for
all. Knows nothing of who asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

__all__ = ["Exchange", "exchange"]


class Exchange(NamedTuple):
    """``holder.name`` is ``own``, and ``written`` while formulas are wanted."""

    holder: Any
    name: str
    own: Any
    written: Any


def exchange(table: Iterable[Exchange], back: bool = False) -> None:
    """Put the formulas in place, or what was there before ``back``; what others have put there stays."""
    for holder, name, own, written in table:
        before, after = (written, own) if back else (own, written)
        if getattr(holder, name) is before:
            setattr(holder, name, after)
