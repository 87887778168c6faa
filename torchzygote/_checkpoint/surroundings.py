"""What a function sees besides its arguments, so that it does the same when it runs again.

Random numbers, autocast, the default device and dtype, whether this package is differentiating, and which
formulas run instead of PyTorch's operators. Knows nothing of derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from .. import _state
from .._random import RandomState
from .._torch_private import (
    are_formulas_pushed,
    are_operators_pushed,
    in_function_mode,
    node_name,
    operators_pushed,
    outside_functorch,
    pushed_by_formulas,
    running_node,
)
from .._unfused import unfused_as_before, unfused_for

__all__ = ["Surroundings", "may_draw_after_saving", "outside_inference"]

_Autocast = tuple[str, bool, torch.dtype, bool]


def _autocast_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _autocast() -> list[_Autocast]:
    cached = torch.is_autocast_cache_enabled()
    return [
        (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), cached)
        for device in _autocast_types()
    ]


def _default_device() -> torch.device | None:
    """``None``: none was set."""
    if not in_function_mode():
        return None
    with outside_functorch():  # PyTorch makes a tensor to find out, in a way that torch.func refuses
        return torch.get_default_device()


def outside_inference() -> contextlib.AbstractContextManager[None]:
    """Around a run whose graph is wanted, wherever the backward pass is that wants it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


class Surroundings:
    """The state at the time this was made; :meth:`restored` puts it back for one more run."""

    __slots__ = ("_autocast", "_depth", "_device", "_dtype", "_formulas", "_pushing", "_random", "_unfused")

    def __init__(self) -> None:
        self._random = RandomState()
        self._autocast = _autocast()
        self._device = _default_device()
        self._dtype = torch.get_default_dtype()
        self._depth = _state.depth()
        self._unfused = unfused_for()
        self._formulas = in_function_mode() and are_formulas_pushed()
        self._pushing = in_function_mode() and are_operators_pushed()

    def rewind(self) -> None:
        """Set the random state back, for good."""
        self._random.restore()

    def restored(self) -> contextlib.ExitStack:
        """A context in which all is as it was; on leaving it, all is as it would be without it."""
        stack = contextlib.ExitStack()
        try:
            self._restore(stack)
        except BaseException:  # an interrupt, too
            stack.close()
            raise
        return stack

    def _restore(self, stack: contextlib.ExitStack) -> None:
        stack.callback(RandomState().restore)
        self._random.restore()
        for (device, enabled, dtype, cached), now in zip(self._autocast, _autocast(), strict=True):
            if (device, enabled, dtype, cached) != now:
                stack.enter_context(
                    torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)
                )
        if _default_device() != self._device:
            stack.enter_context(self._device or torch.device("cpu"))
        if torch.get_default_dtype() is not self._dtype:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(self._dtype)
        stack.enter_context(_state.at_depth(self._depth))
        if unfused_for() != self._unfused:
            stack.enter_context(unfused_as_before(self._unfused))
        if self._formulas and not are_formulas_pushed():
            stack.enter_context(pushed_by_formulas())
        if self._pushing and not are_operators_pushed():
            stack.enter_context(operators_pushed())


def may_draw_after_saving(operations: Sequence[int], saved: Sequence[tuple[Any, ...]]) -> bool:
    """Whether the last operation may fill something that it has saved, so that it mustn't be stopped there.

    ``operations``: by which each tensor is ``saved``, as version, ``requires_grad``, shape and dtype.
    ``torch.rrelu`` saves memory for its noise, and draws it then, uncounted (2.13). What was saved last is
    asked for first, by its node; where none runs, memory that nobody has written to may be such.
    """
    node = running_node()
    if node is not None:
        return node_name(node).startswith("RreluWithNoise")
    for operation, (version, requires_grad, _, dtype) in zip(
        reversed(operations), reversed(saved), strict=True
    ):
        if operation != operations[-1]:
            return False
        if version == 0 and not requires_grad and dtype.is_floating_point:
            return True
    return False
