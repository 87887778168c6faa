"""The mode around a function that is pushed forward.

It keeps constants apart, writes out what PyTorch pushes wrong, and refuses what it doesn't push at all. A
function mode sees operators under all their names, and in one thread only; each takes some microseconds for
each operator, so that there is one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .constant_operands import RULES, Operator, Rule
from .forward import Pushes
from .library import OVERLOADS, called_watched, library_operators
from .running_logsumexp import written_logcumsumexp

__all__ = ["are_operators_pushed", "operators_pushed"]


def _logcumsumexp(operator: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
    return written_logcumsumexp(operator, args, None)


_RUNNING = frozenset((torch.logcumsumexp, Tensor.logcumsumexp))
_ALWAYS: dict[Any, Rule] = dict.fromkeys(_RUNNING, _logcumsumexp)
_RULES = {**RULES, **_ALWAYS}


class _Pushing(TorchFunctionMode):
    """``rules`` for operators of PyTorch's, ``names`` of those that nobody pushes."""

    def __init__(self, rules: dict[Any, Rule], names: frozenset[str]) -> None:
        super().__init__()
        self._rules, self._names, self._pushes = rules, names, Pushes()

    def __torch_function__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = self._rules.get(func)
        if rule is not None and not is_compiling():  # a compiled function, which knows what is constant
            if not kwargs:
                y = rule(func, args, self._pushes)
            else:
                y = written_logcumsumexp(func, args, kwargs) if func in _RUNNING else NotImplemented
            if y is not NotImplemented:
                return y
        if self._names and isinstance(func, OVERLOADS):
            return called_watched(self._names, func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


def _is_ours(mode: Any) -> bool:
    return type(mode) is DeviceContext or type(mode).__module__.startswith("torchzygote.")


def operators_pushed() -> contextlib.AbstractContextManager[Any]:
    """Around a function that is pushed forward.

    Modes of others see each operator as it was called, once.
    """
    stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return _Pushing(_RULES if all(map(_is_ours, stack)) else _ALWAYS, library_operators())


def are_operators_pushed() -> bool:
    """Whether :func:`operators_pushed` is around."""
    stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(isinstance(mode, _Pushing) for mode in stack)
