"""What a function holds besides its arguments, and what of that has become something else as it runs again.

Variables that it closes over, lists and dicts in them, what it reads of Buffers, and the buffers of modules
that it changes, are put back for the time of the rerun: the variable of a loop was another then. What can't
be put back without others seeing it is told: another value of a global variable or an attribute, a tensor
written in place. Knows nothing of derivatives.
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
from torch.overrides import TorchFunctionMode

from .._torch_private import insides_of, is_wrapped, parameters_in, pytree, version_of
from .buffers import Reads, is_buffer
from .modules import ModuleBuffers, modules_among

__all__ = ["Holdings", "Uses", "written_since"]

_SIMPLE = frozenset({int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device})
_CALLABLES = frozenset({types.FunctionType, types.MethodType, functools.partial})
_TENSORS = frozenset({Tensor, nn.Parameter})
_CONTAINERS = frozenset({list, dict})
_NOT_COMPARED = frozenset({types.ModuleType, type, types.BuiltinFunctionType, *_CONTAINERS})
_MANY = 256  # a larger list isn't looked into: that would take longer than f
_DEEP = 8  # functions that f closes over, and so on
# Attributes of a tensor that have its elements; methods that haven't.
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag", "data"})
_QUESTIONS = frozenset({"size", "dim", "numel", "nelement", "stride", "is_floating_point", "is_complex"})
_NOTHING = object()

# A cell or a namespace and a name in it, what was there, and of that the version or a copy.
_Variable = tuple[Any, str, Any, Any]

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
        return None if value.is_inference() or is_wrapped(value) else version_of(value)
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


def _look(f: Any, bound_to: list[Any]) -> tuple[list[_Variable], list[_Variable]]:
    """What ``f`` finds in cells, and what in namespaces; ``bound_to`` gets what methods are bound to."""
    cells: list[_Variable] = []
    names: list[_Variable] = []
    waiting: list[Any] = [f]
    for f in waiting:
        if type(f) is functools.partial:
            waiting.append(f.func)
            continue
        function, bound = _code_of(f)
        bound_to.append(bound)
        if function is None:
            continue
        code = function.__code__
        objects = [] if bound is None else [bound]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            value = _content(cell)
            if value is _NOTHING:
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


def _look_up(places: list[_Variable], namespace: Any, names: Sequence[str]) -> None:
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


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet, or not any more
        return _NOTHING


def _fill(cell: types.CellType, value: Any) -> None:
    if value is _NOTHING:
        del cell.cell_contents
    else:
        cell.cell_contents = value


def _lasts(place: _Variable, now: Any) -> bool:
    """Whether ``now`` is what was there, as it was."""
    _, _, value, state = place
    return _are_same(value, now) and (state is None or _is_as_it_was(state, _state(now)))


def _weakly(value: Any) -> Callable[[], Any]:
    """What gives ``value`` back, without keeping it alive if that can be."""
    if type(value) not in _SIMPLE:
        try:
            return weakref.ref(value)
        except TypeError:  # has no room for weak references
            pass
    return lambda: value


class Holdings:
    """What ``f`` holds as it runs first, and what it reads of Buffers: a context around that run.

    Until that is over nothing is known to last; ``f`` may run again so early, for a derivative inside of it.
    ``given``: its arguments; Buffers among them are looked after too. ``adopt`` is told what is read of them.
    """

    __slots__ = ("_before", "_cells", "_f", "_flags", "_modules", "_names", "_reads")

    def __init__(
        self, f: Callable[..., Any], given: Sequence[Any], adopt: Callable[[Tensor], None] | None = None
    ) -> None:
        self._f = f
        bound_to: list[Any] = []
        self._before = _look(f, bound_to)
        self._cells: list[_Variable] = []
        self._names: list[_Variable] = []
        buffers = [x for x in given if is_buffer(x)]
        buffers += [place[2] for places in self._before for place in places if is_buffer(place[2])]
        self._reads = Reads(buffers, adopt) if buffers else None
        held = [place[2] for places in self._before for place in places]
        insides = insides_of(modules_among([*bound_to, *given, *held]))
        self._modules = ModuleBuffers(insides)
        tensors = [*(x for x in held if type(x) in _TENSORS), *parameters_in(insides)]
        self._flags = [(weakref.ref(x), x.requires_grad) for x in tensors]

    def __enter__(self) -> None:
        if self._reads is not None:
            self._reads.__enter__()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._reads is not None:
            self._reads.__exit__(kind, error, traceback)
        if kind is None:
            self._settle()

    def _settle(self) -> None:
        """``f`` has run; what it changed itself isn't looked after."""
        self._modules.settle()
        (cells, names), self._before = self._before, ([], [])
        for place in cells:
            cell, name, value, state = place
            if _lasts(place, _content(cell)):
                # of a list or dict only what was in it: the thing itself may hold what f returned, for ever
                self._cells.append((cell, name, None if type(state) in _CONTAINERS else value, state))
        for place in names:
            namespace, name, value, state = place
            if _lasts(place, namespace.get(name, _NOTHING)):
                self._names.append((namespace, name, _weakly(value), state))

    def have_other_flags(self) -> bool:
        """Whether a tensor requires grad that didn't, or the other way round, as far as they are found."""
        return any((x := kept()) is not None and x.requires_grad is not then for kept, then in self._flags)

    def changes(self) -> tuple[str, str] | None:
        """What can't be put back, and what to do about it."""
        for namespace, name, kept, _ in self._names:
            if not _are_same(kept(), namespace.get(name, _NOTHING)):
                return (
                    f"{name}, a global variable or an attribute that it uses, is something else now",
                    "pass it as an argument",
                )
        return None

    def written(self) -> dict[int, str]:
        """Tensors that were written in place since, by their names."""
        found: dict[int, str] = {}
        for _, name, x, state in self._cells:
            if type(state) is int and not _is_as_it_was(state, _state(x)):
                found[id(x)] = name
        for _, name, kept, state in self._names:
            if type(state) is int and not _is_as_it_was(state, _state(x := kept())):
                found[id(x)] = name
        return found

    def put_back(self, stack: contextlib.ExitStack) -> None:
        """What ``f`` closes over is as it was, until ``stack`` is left."""
        for cell, _, then, state in self._cells:
            now = _content(cell)
            contained = type(state) in _CONTAINERS
            if not (_is_as_it_was(state, now) if contained else _are_same(then, now)):
                stack.callback(_fill, cell, now)
                cell.cell_contents = state.copy() if contained else then
        if self._reads is not None:
            stack.callback(self._reads.again())
        self._modules.put_back(stack)


def written_since(name: str) -> tuple[str, str]:
    """What is wrong with a tensor, and what to do about it."""
    return f"{name}, which it uses, has been written in place since", "write into a clone() of it"


class Uses(TorchFunctionMode):
    """Around a run: ``found`` becomes the name of the first of these tensors whose elements are used."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self._names = names
        self.found: str | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.found is None and _uses_elements(func):
            for x in pytree.tree_iter((args, kwargs)):
                if id(x) in self._names:
                    self.found = self._names[id(x)]
        return func(*args, **kwargs)


def _uses_elements(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _VIEWS
    return name not in _QUESTIONS
