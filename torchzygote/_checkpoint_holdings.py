"""What a function holds besides its arguments, and what of that has become something else as it runs again.

Variables that it closes over, and lists and dicts in them, are put back for the time of the rerun: the
variable of a loop was another then. What can't be put back without others seeing it is told: another value of
a global variable or an attribute, a tensor written in place. Knows nothing of derivatives.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import operator
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._torch_private import is_wrapped

__all__ = ["Holdings"]

_SIMPLE = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
_CALLABLES = frozenset({types.FunctionType, types.MethodType, functools.partial})
_TENSORS = frozenset({Tensor, nn.Parameter})
_CONTAINERS = frozenset({list, dict})
_NOT_COMPARED = frozenset({types.ModuleType, type, types.BuiltinFunctionType, *_CONTAINERS})
_MANY = 256  # a larger list isn't looked into: that would take longer than f
_DEEP = 8  # functions that f closes over, and so on
_NOTHING = object()

# A cell or a namespace and a name in it, what was there, and of that the version or a copy.
_Place = tuple[Any, str, Any, Any]

_global_names: dict[int, tuple[weakref.ref[types.CodeType], tuple[str, ...]]] = {}


def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names that ``code`` looks up among the globals; ``co_names`` has those of attributes too."""
    known = _global_names.get(id(code))
    if known is None or known[0]() is not code:
        names = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
        if len(_global_names) > 10_000:
            _global_names.clear()
        _global_names[id(code)] = known = weakref.ref(code), tuple(sorted(names))
    return known[1]


def _state(value: Any) -> Any:
    """What may change while ``value`` stays the same object: how often a tensor was written, entries."""
    kind = type(value)
    if kind in _TENSORS:
        return None if value.is_inference() or is_wrapped(value) else value._version
    return kind(value) if (kind is list or kind is dict) and len(value) <= _MANY else None


def _code_of(f: Any) -> tuple[types.FunctionType | None, Any]:
    """The function behind a callable, and what it is bound to."""
    if type(f) is types.FunctionType:
        return f, None
    function: Any
    if type(f) is types.MethodType:
        function, bound = f.__func__, f.__self__
    else:
        function, bound = getattr(type(f), "forward" if isinstance(f, nn.Module) else "__call__", None), f
    return (function if type(function) is types.FunctionType else None), bound


def _look(f: Any) -> tuple[list[_Place], list[_Place]]:
    """What ``f`` finds in cells, and what in namespaces."""
    cells: list[_Place] = []
    names: list[_Place] = []
    waiting: list[Any] = [f]
    for f in waiting:
        if type(f) is functools.partial:
            waiting.append(f.func)
            continue
        function, bound = _code_of(f)
        if function is None:
            continue
        code = function.__code__
        objects = [] if bound is None else [bound]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # not assigned yet
                continue
            cells.append((cell, name, value, _state(value)))
            kind = type(value)
            if kind in _CALLABLES:
                if len(waiting) < _DEEP and not any(value is known for known in waiting):
                    waiting.append(value)
            elif kind not in _SIMPLE and kind not in _TENSORS:
                objects.append(value)
        if code.co_names:
            _look_up(names, function.__globals__, _globals_of(code))
            for thing in objects:
                _look_up(names, getattr(thing, "__dict__", {}), code.co_names)
    return cells, names


def _look_up(places: list[_Place], namespace: Any, names: Sequence[str]) -> None:
    for name in names:
        value = namespace.get(name, _NOTHING)
        if value is not _NOTHING and type(value) not in _NOT_COMPARED:
            places.append((namespace, name, value, _state(value)))


def _are_same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and type(a) in _SIMPLE and bool(a == b))


def _is_as_it_was(then: Any, now: Any) -> bool:
    """Whether a state is what it was, as far as that is known."""
    if then is None or now is None:
        return True
    if type(then) is not type(now):
        return False
    if type(then) is dict:
        return len(then) == len(now) and all(now.get(key, _NOTHING) is x for key, x in then.items())
    if type(then) is list:
        return len(then) == len(now) and all(map(operator.is_, then, now))
    return bool(then == now)


def _lasting(before: list[_Place], after: list[_Place]) -> list[_Place]:
    """Places where ``f`` changed nothing itself."""
    return [
        place
        for place, (holder, _, value, state) in zip(before, after, strict=False)
        if place[0] is holder and _are_same(place[2], value) and _is_as_it_was(place[3], state)
    ]


def _weakly(value: Any) -> Callable[[], Any]:
    """What gives ``value`` back, without keeping it alive if that can be."""
    if type(value) not in _SIMPLE:
        with contextlib.suppress(TypeError):  # has no room for weak references
            return weakref.ref(value)
    return lambda: value


class Holdings:
    """What ``f`` holds as it runs first: made before that, and settled after it.

    Until then nothing is known to last; ``f`` may run again that early, for a derivative inside of it.
    """

    __slots__ = ("_before", "_cells", "_f", "_names")

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f
        self._before = _look(f)
        self._cells: list[_Place] = []
        self._names: list[_Place] = []

    def settle(self) -> None:
        """``f`` has run; what it changed itself isn't looked after."""
        (cells_before, names_before), self._before = self._before, ([], [])
        cells, names = _look(self._f)
        self._cells = [
            # of a list or dict only what was in it: the thing itself may hold what f returned, for ever
            (cell, name, None if type(state) in _CONTAINERS else value, state)
            for cell, name, value, state in _lasting(cells_before, cells)
        ]
        self._names = [
            (namespace, name, _weakly(value), state)
            for namespace, name, value, state in _lasting(names_before, names)
        ]

    def changes(self) -> tuple[str, str] | None:
        """What can't be put back, and what to do about it."""
        for namespace, name, kept, state in self._names:
            now = namespace.get(name, _NOTHING)
            if not _are_same(kept(), now):
                return (
                    f"{name}, a global variable or an attribute that it uses, is something else now",
                    "pass it as an argument",
                )
            if not _is_as_it_was(state, _state(now)):
                return _written(name)
        for _, name, value, state in self._cells:
            if type(state) is int and not _is_as_it_was(state, _state(value)):
                return _written(name)
        return None

    def put_back(self) -> list[tuple[types.CellType, Any]]:
        """Give variables that ``f`` closes over the values that they had; for :meth:`undo`."""
        changed: list[tuple[types.CellType, Any]] = []
        for cell, _, then, state in self._cells:
            try:
                now = cell.cell_contents
            except ValueError:
                now = _NOTHING
            contained = type(state) in _CONTAINERS
            if not (_is_as_it_was(state, now) if contained else _are_same(then, now)):
                changed.append((cell, now))
                cell.cell_contents = state.copy() if contained else then
        return changed

    @staticmethod
    def undo(changed: list[tuple[types.CellType, Any]]) -> None:
        """Give them the values that they have."""
        for cell, value in changed:
            if value is _NOTHING:
                del cell.cell_contents
            else:
                cell.cell_contents = value


def _written(name: str) -> tuple[str, str]:
    return f"{name}, which it uses, has been written in place since", "write into a clone() of it"
