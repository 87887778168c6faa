"""Flags of tensors that ``f`` finds by identity: switched on for a call, given back after it.

And what the flags were of those that are exchanged for others. Knows nothing of what the flags are for.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ._forward_mode_lock import behalf
from ._torch_private import base_of, in_functorch, outside_functorch

__all__ = [
    "FlagHold",
    "flags_on",
    "held",
    "held_again",
    "held_by_others",
    "held_flags",
    "holds",
    "remembered",
    "requires_grad",
]


class FlagHold:
    """The tensors whose flags one call holds, and whether it still does."""

    __slots__ = ("lapsed", "tensors")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tuple(tensors)
        self.lapsed = False


class _Mine:
    """What calls of a thread hold, and how often one began to."""

    def __init__(self) -> None:
        self.begun = 0
        self.holds: list[FlagHold] = []


def _records(x: Tensor) -> bool:
    """Whether ``x`` requires grad by itself; a view says that it does, too, where only its base does."""
    if not x.requires_grad:
        return False
    base = base_of(x)
    if base is None or not x.is_leaf or not base.requires_grad:
        return True
    with torch.enable_grad():
        node = x.view_as(x).grad_fn
    return node is None or node.next_functions[0][0] is not None


class _Flags:
    """``requires_grad`` switched on for as long as anybody needs it, counted over threads and calls."""

    def __init__(self) -> None:
        self._of: dict[int, _Mine] = {}  # by thread
        # Reentrant: what the garbage collector runs while it is held may come here as well.
        self._lock = threading.RLock()
        self._held: dict[int, list[Any]] = {}
        self._begun = 0  # how often anything was switched on; counted before it is
        self._lasting = 0  # how many of these last

    @property
    def mine(self) -> _Mine:
        me = threading.get_ident()
        found = self._of.get(me)
        if found is None:
            found = self._of[me] = _Mine()
        return found

    def hold(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Switch the flags on; the function returned gives them back (once)."""
        mine: list[Tensor] = []
        self.mine.begun += 1
        try:
            self._switch_on(tensors, mine)
        except BaseException:
            self._switch_off(mine)
            raise
        held = FlagHold(mine)
        holds = self.mine.holds
        holds.append(held)
        with self._lock:
            self._lasting += 1

        def release() -> None:
            if not held.lapsed:
                held.lapsed = True
                holds.remove(held)
                with self._lock:
                    self._lasting -= 1
            self._switch_off(mine)

        return release

    def _switch_on(self, tensors: Sequence[Tensor], mine: list[Tensor]) -> None:
        with self._lock:
            self._begun += 1
            # All are asked before any is switched on: views seem to follow their bases.
            for tensor in [x for x in tensors if id(x) in self._held or not _records(x)]:
                entry = self._held.setdefault(id(tensor), [tensor, 0])  # from here on nobody trusts the flag
                entry[1] += 1
                mine.append(tensor)
                if entry[1] == 1 or not tensor.requires_grad:
                    tensor.requires_grad_(True)

    def _switch_off(self, mine: list[Tensor]) -> None:
        """Give back what of ``mine`` nobody else holds; ``mine`` is emptied."""
        with self._lock:
            switched = False
            while mine:
                tensor = mine.pop()
                entry = self._held[id(tensor)]
                entry[1] -= 1
                if entry[1] == 0:
                    if tensor.is_leaf:
                        tensor.requires_grad_(False)
                        switched = True
                    del self._held[id(tensor)]  # last: while it is there, nobody trusts the flag
            if switched:
                torch.clear_autocast_cache()  # which has casts of leaves that require grad, and would go on

    def suspend(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Switch flags off that are held once; the function returned switches those on that still are."""
        off: list[Tensor] = []
        with self._lock:
            for tensor in tensors:
                entry = self._held.get(id(tensor))
                if entry is not None and entry[1] == 1 and tensor.is_leaf and tensor.requires_grad:
                    off.append(tensor)
                    tensor.requires_grad_(False)

        def resume() -> None:
            with self._lock:
                for tensor in off:
                    if id(tensor) in self._held:
                        tensor.requires_grad_(True)

        return resume

    def by_others(self) -> tuple[int, bool]:
        """How often other threads have switched flags on, and whether any of that lasts.

        Those that wait for the backward pass that runs here, in a thread of a device, are none of them.
        """
        ours = [self._of[thread] for thread in behalf().threads if thread in self._of]
        begun = sum(mine.begun for mine in ours)
        return self._begun - begun, self._lasting > sum(len(mine.holds) for mine in ours)

    def are_needless(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all flags are on, and not because somebody else holds them for a while; takes no lock."""
        begun = self._begun
        if self._held or False in [x.requires_grad and base_of(x) is None for x in tensors]:
            return False
        return begun == self._begun

    def is_own(self, x: Tensor) -> bool:
        """Whether ``x`` requires grad, and not because somebody holds it for a while."""
        if self.are_needless((x,)):
            return True
        with self._lock:
            return x.requires_grad and id(x) not in self._held


_flags = _Flags()


def _nothing() -> None:
    return None


def held_flags(tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Make ``tensors`` require grad until the function returned is called."""
    return _nothing if _flags.are_needless(tensors) else _flags.hold(tensors)


class held:
    """While it is entered, ``tensors`` require grad; not in ``torch.func``, which lets no flags be set.

    A class, because a generator takes two microseconds, and every call comes by here.
    """

    __slots__ = ("_release", "_tensors")

    def __init__(self, tensors: Iterable[Tensor] | None) -> None:
        self._tensors = tensors

    def __enter__(self) -> None:
        if self._tensors is not None:
            self._release = _nothing if in_functorch() else held_flags(list(self._tensors))

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._tensors is not None:
            self._release()


@contextlib.contextmanager
def flags_on(tensors: Sequence[Tensor]) -> Iterator[None]:
    """While it is entered, ``tensors`` require grad; in ``torch.func`` transforms, too."""
    with outside_functorch():  # which don't let flags be set
        release = held_flags(tensors)
    try:
        yield
    finally:
        with outside_functorch():
            release()


def holds() -> tuple[FlagHold, ...]:
    """What calls of this thread hold now; for :func:`held_again`."""
    return tuple(_flags.mine.holds)


def held_by_others() -> tuple[int, bool]:
    """How often other threads have switched flags on, and whether any of that lasts."""
    return _flags.by_others()


def held_again(then: Sequence[FlagHold]) -> Callable[[], None]:
    """Hold what was held then and isn't any more, until the function returned is called."""
    lapsed = [tensor for hold in then if hold.lapsed for tensor in hold.tensors]
    return held_flags(lapsed) if lapsed else _nothing


def not_held_since(then: Sequence[FlagHold], tensors: Sequence[Tensor]) -> Callable[[], None]:
    """Let go of those that this thread holds now and didn't then, until what is returned is called."""
    now = {id(tensor) for hold in _flags.mine.holds for tensor in hold.tensors}
    before = {id(tensor) for hold in then for tensor in hold.tensors} if now else now
    since = [x for x in tensors if id(x) in now and id(x) not in before]
    return _flags.suspend(since) if since else _nothing


# Of tensors that are exchanged for others: whether they required grad. They are alive, so that nothing else
# has their ids.
_exchanged: dict[int, bool] = {}


@contextlib.contextmanager
def remembered(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Around an exchange of ``tensors``: :func:`requires_grad` answers as before it.

    A dual number doesn't require grad, and ``torch.func`` doesn't let it; the input of a derivative does.
    """
    mine = {id(x): _flags.is_own(x) for x in tensors if id(x) not in _exchanged}
    _exchanged.update(mine)
    try:
        yield
    finally:
        for key in mine:
            del _exchanged[key]


def requires_grad(x: Tensor) -> bool:
    """Whether the caller's ``x`` requires grad: apart from who holds it, or has exchanged it for another."""
    before = _exchanged.get(id(x)) if _exchanged else None
    return _flags.is_own(x) if before is None else before
