"""Which differentiation by this package is running in this thread.

Knows nothing of how derivatives are computed: the engine enters and leaves, utilities ask.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ._dropped_graphs import Held
from ._forward_mode_lock import behalf, on_behalf
from ._torch_private import (
    backward_pass,
    functorch_depth,
    in_forward_ad,
    in_functorch,
    innermost_level,
    only_pushed,
    passes_leave_their_thread,
    record_reentrant_checkpoints,
    runs_again,
    transform_stack,
)

__all__ = [
    "at_depth",
    "at_end",
    "call_all",
    "depth",
    "deriving",
    "differentiated",
    "differentiation",
    "drop_graph",
    "forget_all",
    "forget_forward_mode",
    "forget_other_threads",
    "forward_mode_opened",
    "held",
    "ignoring",
    "in_outer_forward_mode",
    "in_recorded_pass",
    "in_transform",
    "is_only_pushed",
    "kept_aside",
    "pushing",
    "session",
]

Callback = Callable[[], None]
# With how many differentiations of this thread ran when it was left: whose it is.
Waiting = tuple[Callback, int]

# How many calls have opened forward mode by this package, one inside the other; nobody tells of the others.
_opened = 0
_counting = threading.Lock()


class Session(list[Waiting]):
    """What is to be done as one outermost differentiation ends.

    ``forward``: see :func:`pushing`. ``warned``: what has been warned of, and need not be again.
    ``recomputes``: each pullback runs something again. ``held``: what is released with its graph, ``None``
    while one is recorded that somebody may keep.
    """

    forward = False
    warned: tuple[object, ...] = ()
    recomputes = False
    held: Held | None

    def __init__(self) -> None:
        super().__init__()
        self.held = Held()


# Of each thread, for those that run a backward pass on its behalf.
_by_thread: dict[int, dict[str, Any]] = {}


class _State(threading.local):
    """Per thread: how deep we are, and what is to be done as the outermost differentiation ends."""

    def __init__(self) -> None:
        _by_thread[threading.get_ident()] = self.__dict__
        self.depth = 0
        # The same, whatever is hidden by ignoring() or as it was before.
        self.inside = 0
        self.callbacks: list[Waiting] | None = None
        # How many torch.func levels, counted from the outermost, are hidden by ignoring().
        self.hidden = 0
        # What in_recorded_pass() says in which backward pass, as it said before.
        self.told: tuple[int, bool] = (-1, False)


_state = _State()


def forget_other_threads() -> None:
    """In a forked process, which has none: their numbers may be given again."""
    me = threading.get_ident()
    for thread in set(_by_thread) - {me}:
        del _by_thread[thread]


def forget_forward_mode() -> None:
    """In a forked process, where forward mode was that of a thread that it doesn't have."""
    global _opened
    _counting._at_fork_reinit()  # type: ignore[attr-defined]
    _opened = 0


def forget_all() -> None:
    """In a process that begins anew: nothing is being differentiated here."""
    _state.__init__()  # type: ignore[misc]


def deriving() -> bool:
    """Whether code running now is being differentiated by this package (``ignoring`` hides it)."""
    return _state.depth > 0 or any(state["depth"] > 0 for state in _waiting())


record_reentrant_checkpoints(deriving)


def _waiting() -> list[dict[str, Any]]:
    """The states of threads that wait for the backward pass that runs here, in one of a device's."""
    if backward_pass() < 0:
        return []
    return [_by_thread[thread] for thread in reversed(behalf().threads[:-1]) if thread in _by_thread]


def in_recorded_pass() -> bool:
    """Whether a backward pass runs here, which is recorded where anything is.

    One on a device doesn't know by whom: it has a thread of its own. What a checkpoint runs again in a pass
    is to do what it did outside.
    """
    now = backward_pass()
    if now < 0:
        return False
    in_pass, said = _state.told
    return said if in_pass == now else not runs_again()


def differentiated() -> bool:
    """Like :func:`deriving`, but by ``torch.func`` too, in any mode."""
    if deriving():
        return True
    return any(name in ("grad", "jvp") for name in transform_stack()[_state.hidden :])


class forward_mode_opened:
    """Around forward mode of this package, where its lock is held."""

    __slots__ = ("_before", "_hold")

    def __enter__(self) -> None:
        global _opened
        self._hold = hold = behalf().hold
        self._before, hold.opened = hold.opened, True
        counted = False
        try:
            with _counting:
                _opened += 1
                counted = True
        except BaseException:  # an interrupt, too
            if counted:
                self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        global _opened
        with _counting:
            _opened -= 1
        self._hold.opened = self._before


def in_outer_forward_mode() -> bool:
    """Whether dual numbers may be about: forward mode runs, and not by a call in another thread.

    Plain ``torch.autograd.forward_ad`` counts, which is what ``torch.func.linearize`` runs; so does what the
    thread has opened that waits for the backward pass running here.
    """
    return in_forward_ad() and (_opened == 0 or behalf().hold.opened)


def is_only_pushed() -> bool:
    """Whether what runs here is differentiated in forward mode alone, and not by this package."""
    return _state.depth == 0 and (only_pushed() or (in_outer_forward_mode() and not in_functorch()))


def in_transform() -> bool:
    """Whether what runs here may be seen through other tensors: by ``torch.func``, or as dual numbers."""
    # in_functorch(), written out: small calls ask this time and again
    return innermost_level() is not None or (in_forward_ad() and in_outer_forward_mode())


def session() -> Session | None:
    """The outermost differentiation that runs in this thread."""
    found = _state.callbacks
    return found if isinstance(found, Session) else None


def held() -> Held | None:
    """What is released with the graph that is recorded here."""
    here = session()
    return None if here is None else here.held


def drop_graph() -> None:
    """What is going to be recorded is dropped as the outermost differentiation ends, if that is this one."""
    here = held()
    if here is not None and _state.inside == 1:
        here.is_dropped = True


class kept_aside:
    """Around recording what may be kept longer than the outermost differentiation takes."""

    __slots__ = ("_before", "_session")

    def __enter__(self) -> None:
        self._session = None if torch.compiler.is_compiling() else session()
        if self._session is not None:
            self._before, self._session.held = self._session.held, None

    def __exit__(self, *error: object) -> None:
        if self._session is not None:
            self._session.held = self._before


@contextlib.contextmanager
def pushing() -> Iterator[None]:
    """Around a pullback that is only recorded to be pulled back itself: together they push forward.

    Told to the session, not to the thread: backward passes on a device run in threads of their own.
    """
    here = session()
    if here is None or here.forward:
        yield
        return
    here.forward = True
    try:
        yield
    finally:
        here.forward = False


def at_end(callback: Callback) -> bool:
    """Call ``callback`` once as the outermost differentiation ends; ``False`` if none runs.

    That is the one of this thread, or of those that wait for the backward pass that runs here.
    """
    callbacks, depth = _callbacks()
    if callbacks is None:
        return False
    callbacks.append((callback, depth))
    return True


def _callbacks() -> tuple[list[Waiting] | None, int]:
    """What is to be called as the outermost differentiation ends, and how deep its thread is."""
    if _state.callbacks is None:
        for state in _waiting():
            if state["callbacks"] is not None:
                return state["callbacks"], state["depth"]
    return _state.callbacks, _state.depth


def mark() -> int:
    """How many callbacks wait; for :func:`forget_since`."""
    return 0 if torch.compiler.is_compiling() else len(_callbacks()[0] or ())


def forget_since(position: int, *, but_inner: bool = False) -> list[Callback]:
    """Drop the callbacks registered since ``position``: the run that registered them is not pulled back.

    ``but_inner``: keep those of nested differentiations, which have pulled back already.
    """
    callbacks, here = (None, 0) if torch.compiler.is_compiling() else _callbacks()
    if callbacks is None:
        return []
    dropped = callbacks[position:]
    callbacks[position:] = [waiting for waiting in dropped if but_inner and waiting[1] > here]
    return [callback for callback, depth in dropped if not (but_inner and depth > here)]


def call_all(callbacks: Sequence[Callback]) -> None:
    """Each of them, also if one before has failed; the first error goes on."""
    failed: Exception | None = None
    for callback in callbacks:
        try:
            callback()
        except Exception as error:
            if failed is None:
                failed = error
    if failed is None:
        return
    try:
        raise failed
    finally:
        failed = None  # whose traceback holds this frame


class differentiation:
    """Around running a function that is being differentiated, and around pulling back through it.

    ``waiting``, where given, holds callbacks that an earlier block left (a pullback's ``f`` ran then, its
    ``back`` runs now); ``defer=True`` leaves the callbacks in ``waiting`` instead of calling them.
    """

    __slots__ = ("along", "before", "defer", "entered", "inside", "outermost", "waiting")

    def __init__(self, waiting: list[Waiting] | None = None, defer: bool = False) -> None:
        self.waiting = waiting
        self.defer = defer
        self.entered = False
        self.outermost = False
        self.before = self.inside = 0

    def __enter__(self) -> None:
        if torch.compiler.is_compiling():
            return  # Dynamo can't follow thread-local state, and traces nothing that asks for it
        self.entered = True
        self.outermost = _state.callbacks is None
        if self.outermost:
            self.along = on_behalf() if passes_leave_their_thread() else None
            if self.along is not None:  # else nobody acts on our behalf
                self.along.__enter__()
            _state.callbacks = Session() if self.waiting is None else self.waiting
        self.before, self.inside = _state.depth, _state.inside
        _state.depth += 1
        _state.inside += 1

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if not self.entered:  # where a graph breaks in between, what is around may be traced, and this not
            return
        _state.depth, _state.inside = self.before, self.inside  # whatever an interrupt has left inside
        if not self.outermost:
            return
        callbacks, _state.callbacks = _state.callbacks, None
        if self.along is not None:
            self.along.__exit__()
        try:
            if callbacks and not self.defer:
                due = callbacks[:]
                callbacks.clear()
                if kind is None:
                    call_all([callback for callback, _ in due])
        finally:
            if self.waiting is None and isinstance(callbacks, Session) and callbacks.held is not None:
                callbacks.held.release()


def depth() -> tuple[int, bool]:
    """How many differentiations by this package run here, and whether :func:`in_recorded_pass`."""
    return _state.depth, in_recorded_pass()


class at_depth:
    """Around code that is to see as many differentiations as ran when :func:`depth` was asked.

    A class, as a generator that an interrupt leaves behind is closed later, and restores this then.
    """

    __slots__ = ("_before", "_depth")

    def __init__(self, depth: tuple[int, bool]) -> None:
        self._depth = depth

    def __enter__(self) -> None:
        self._before = _state.depth, _state.told
        _state.depth, _state.told = self._depth[0], (backward_pass(), self._depth[1])

    def __exit__(self, *error: object) -> None:
        _state.depth, _state.told = self._before


class ignoring:
    """Around code whose derivative is to be ignored: :func:`differentiated` is ``False`` inside."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = _state.depth, _state.hidden
        _state.depth, _state.hidden = 0, functorch_depth()

    def __exit__(self, *error: object) -> None:
        _state.depth, _state.hidden = self._before
