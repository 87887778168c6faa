"""TorchScript functions and modules inside ``torch.func`` transforms.

Once the JIT has optimized one (from its second call on), it runs cut off from autograd and gets a node in the
innermost transform alone: outer ones and forward mode get zeros, silently (2.13). Inside transforms they run
from their graphs as they were written, which all transforms see. Their parameters stay where they are when
tensors are exchanged, so that they refuse to run then. Nothing public is called when a script is.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .levels import in_functorch
from .operators import is_tracing

__all__ = [
    "enable_optimized_scripts",
    "scripts_as_written",
    "scripts_kept_from",
]

_CLASSES: tuple[Any, ...] = (torch._C.ScriptFunction, torch._C.ScriptMethod)
_CALLS = tuple(vars(kind)["__call__"] for kind in _CLASSES)

_unoptimized: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]
_lock = threading.Lock()
_users = 0
# To change a method of these classes takes a microsecond, so that it is done once, where it is needed first.
_installed = False


class _Exchanged(threading.local):
    """Per thread: the tensors that hold what others held before an exchange."""

    def __init__(self) -> None:
        self.tensors: list[Sequence[Tensor]] = []


_exchanged = _Exchanged()


def _run_function(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    return _run(_CALLS[0], self, [], args, kwargs)


def _run_method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
    if _exchanged.tensors:
        _refuse_exchanged(self)
    return _run(_CALLS[1], self, [self.owner], args, kwargs)


_REPLACEMENTS = (_run_function, _run_method)


def _run(call: Any, script: Any, bound: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In a transform: as a function of the same graph, which has never been optimized."""
    if _users and in_functorch() and not is_tracing():
        values = _in_order(script.schema.arguments, [*bound, *args], kwargs)
        if values is not None:
            written: Any = torch._C._create_function_from_graph(script.name, script.graph)  # 4 microseconds
            with _unoptimized(False):
                return _CALLS[0](written, *values)
    return call(script, *args, **kwargs)


def _in_order(declared: Any, values: list[Any], kwargs: dict[str, Any]) -> list[Any] | None:
    """All arguments by position, as a graph has neither defaults nor names; ``None`` if they don't fit."""
    remaining = dict(kwargs)
    for argument in declared[len(values) :]:
        if argument.name not in remaining and not argument.has_default_value():
            return None
        values.append(remaining.pop(argument.name, argument.default_value))
    return None if remaining or len(values) != len(declared) else values


def _held_by(module: Any) -> Iterator[Tensor]:
    kinds: tuple[Any, ...] = (torch._C.ParameterDict, torch._C.BufferDict)
    for kind in kinds:
        yield from dict(kind(module).items()).values()
    inside: Any = torch._C.ModuleDict(module)
    for _, inner in inside.items():
        yield from _held_by(inner)


def _refuse_exchanged(method: Any) -> None:
    held = {id(x) for x in _held_by(method.owner)}
    if any(id(x) in held for tensors in _exchanged.tensors for x in tensors):
        raise RuntimeError(
            f"the scripted module {method.owner._type().name()} can't be differentiated by its parameters in "
            "forward mode and inside torch.func transforms, where they are exchanged, which TorchScript "
            "doesn't see; use reverse mode outside of transforms, or the module that was scripted"
        )


def enable_optimized_scripts(on: bool) -> None:
    """Switch off, and on again as often, the optimizations in transforms, in all threads."""
    global _installed, _users
    with _lock:
        _users += -1 if on else 1
        if not _installed:
            for kind, call in zip(_CLASSES, _REPLACEMENTS, strict=True):
                kind.__call__ = call
            _installed = True


class scripts_as_written:
    """Around a function that is differentiated in a transform."""

    __slots__ = ()

    def __enter__(self) -> None:
        enable_optimized_scripts(False)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        enable_optimized_scripts(True)


@contextlib.contextmanager
def scripts_kept_from(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Scripted modules that hold one of ``tensors`` refuse to run in this thread: others see another one."""
    _exchanged.tensors.append(tensors)
    try:
        with scripts_as_written():
            yield
    finally:
        _exchanged.tensors.pop()
