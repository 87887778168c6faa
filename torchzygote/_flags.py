"""Flags of tensors that ``f`` finds by identity: switched on for a call, given back after it.

And what the flags were of those that are exchanged for others. Knows nothing of what the flags are for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["held_flags", "remembered", "requires_grad"]


class _Flags:
    """``requires_grad`` switched on for as long as anybody needs it, counted over threads and calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[int, list[Any]] = {}
        self._begun = 0  # how often anything was switched on; counted before it is

    def hold(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Switch the flags on; the function returned gives them back (once)."""
        mine: list[Tensor] = []
        with self._lock:
            self._begun += 1
            for tensor in tensors:
                entry = self._held.get(id(tensor))
                if entry is not None:
                    entry[1] += 1
                elif not tensor.requires_grad:
                    self._held[id(tensor)] = [tensor, 1]  # first: from here on nobody trusts the flag
                    try:
                        tensor.requires_grad_(True)
                    except BaseException:
                        del self._held[id(tensor)]
                        raise
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
                        if tensor.is_leaf:
                            tensor.requires_grad_(False)
                        del self._held[id(tensor)]  # last: while it is there, nobody trusts the flag

        return release

    def are_needless(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all flags are on, and not because somebody else holds them for a while; takes no lock."""
        begun = self._begun
        if self._held or False in [tensor.requires_grad for tensor in tensors]:
            return False
        return begun == self._begun


_flags = _Flags()


def _nothing() -> None:
    return None


def held_flags(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Make ``tensors`` require grad until the function returned is called."""
    return _nothing if _flags.are_needless(tensors) else _flags.hold(tensors)


# Required grad when they were exchanged for what doesn't; they are alive, so nothing else has their ids.
_exchanged: set[int] = set()


@contextlib.contextmanager
def remembered(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Around an exchange of ``tensors``: :func:`requires_grad` answers as before it.

    A dual number doesn't require grad, and ``torch.func`` doesn't let it.
    """
    mine = {id(x) for x in tensors if x.requires_grad} - _exchanged
    _exchanged.update(mine)
    try:
        yield
    finally:
        _exchanged.difference_update(mine)


def requires_grad(x: Tensor) -> bool:
    """Whether ``x`` requires grad, or did before it was exchanged for a dual number."""
    return x.requires_grad or id(x) in _exchanged
