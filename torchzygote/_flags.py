"""Flags of tensors that ``f`` finds by identity: switched on for a call, given back after it.

Knows nothing of what the flags are for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["held_flags"]


class _Flags:
    """``requires_grad`` switched on for as long as anybody needs it, counted over threads and calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, list[Any]] = {}

    def hold(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Switch the flags on; the function returned gives them back (once)."""
        mine: list[Tensor] = []
        with self._lock:
            for tensor in tensors:
                entry = self._held.get(id(tensor))
                if entry is not None:
                    entry[1] += 1
                elif not tensor.requires_grad:
                    tensor.requires_grad_(True)
                    self._held[id(tensor)] = [tensor, 1]
                else:
                    continue
                mine.append(tensor)

        def release() -> None:
            with self._lock:
                while mine:
                    tensor = mine.pop()
                    entry = self._held[id(tensor)]
                    entry[1] -= 1
                    if entry[1] == 0:
                        del self._held[id(tensor)]
                        if tensor.is_leaf:
                            tensor.requires_grad_(False)

        return release


_flags = _Flags()


def _nothing() -> None:
    return None


def held_flags(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Make ``tensors`` require grad until the function returned is called."""
    if not _flags._held and False not in [tensor.requires_grad for tensor in tensors]:
        return _nothing
    return _flags.hold(tensors)
