"""The same question while ``torch.compile`` traces, asked of the fake tensors. Imported only then."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from ._torch_private import has_tangent, layers, maybe_batch_axis, trace_time, traced_value_of

__all__ = ["warn_if_dropped"]

_noted = threading.local()
_call_while_tracing = trace_time()


def _note(context: Any) -> None:
    y = traced_value_of(context, "y")
    _noted.followed = any(
        layer.requires_grad or (maybe_batch_axis(layer) is None and has_tangent(layer))
        for _, layer in layers(y)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_followed() -> bool:
    return bool(_noted.followed)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _say(warn: Callable[[str], None], name: str) -> None:
    warn(name)


def warn_if_dropped(outputs: list[Any], warn: Callable[[str], None], name: str) -> None:
    """``warn(name)``, while tracing, if one of these depends on what somebody may differentiate by."""
    for y in outputs:  # noqa: B007 - which _note finds by its name
        _call_while_tracing(_note)
        if _is_followed():
            _say(warn, name)
            return
