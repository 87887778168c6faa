"""What is being differentiated, asked while ``torch.compile`` traces. Imported only then."""

from __future__ import annotations

import torch

from . import _state
from ._torch_private import functorch_depth, transform_stack

__all__ = ["ignored", "is_deriving"]


class _Hidden:
    """How many levels are hidden; an object of its own, because Dynamo can't follow thread-local state."""

    def __init__(self) -> None:
        self.levels = -1


_hidden = _Hidden()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _depth() -> int:
    return functorch_depth()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _derivative_beyond(level: int) -> bool:
    return any(name in ("grad", "jvp") for name in transform_stack()[level:])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _in_eager_differentiation() -> bool:
    return _state.differentiated()


class ignored:
    """Around code whose derivative is to be ignored."""

    def __enter__(self) -> None:
        self.before = _hidden.levels
        _hidden.levels = _depth()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        _hidden.levels = self.before


def is_deriving() -> bool:
    """Whether a derivative is being traced, or the compiled call is part of one."""
    if _hidden.levels >= 0:
        return bool(_derivative_beyond(_hidden.levels))
    return bool(_in_eager_differentiation())
