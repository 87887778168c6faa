"""Flags of tensors that ``f`` finds by identity: switched on for a call, given back after it.

And what the flags were of those that are exchanged for others. Knows nothing of what the flags are for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Hold", "held_again", "held_flags", "holds", "remembered", "requires_grad"]


class Hold:
    """The tensors whose flags one call holds, and whether it still does."""

    __slots__ = ("lapsed", "tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.lapsed = False


class _Mine(threading.local):
    """What calls of this thread hold."""

    def __init__(self) -> None:
        self.holds: list[Hold] = []


class _Flags:
    """``requires_grad`` switched on for as long as anybody needs it, counted over threads and calls."""

    def __init__(self) -> None:
        self.mine = _Mine()
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
        held = Hold(mine)
        holds = self.mine.holds  # of this thread; released, it may be, in another
        holds.append(held)

        def release() -> None:
            if not held.lapsed:
                held.lapsed = True
                holds.remove(held)
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


def holds() -> tuple[Hold, ...]:
    """What calls of this thread hold now; for :func:`held_again`."""
    return tuple(_flags.mine.holds)


def held_again(then: Sequence[Hold]) -> Callable[[], None]:
    """Hold what was held then and isn't any more, until the function returned is called."""
    lapsed = [tensor for hold in then if hold.lapsed for tensor in hold.tensors]
    return held_flags(lapsed) if lapsed else _nothing


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
