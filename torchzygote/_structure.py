"""Asking the sparsity detection about one call; whatever it can't follow counts as dense.

It must not know what the structure is used for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import _engine
from ._arguments import ARRAY, NUMBER, Prepared, kind_of, type_name
from ._random import RandomState
from .sparsity import detect as detected
from .sparsity.pattern import Pattern

__all__ = ["hessian_patterns", "jacobian_patterns", "within_budget"]

_log = logging.getLogger("torchzygote")

# Detection may take a fifth of the dense way's time: it handles about 20 members of index sets while a core
# moves this many kilobytes.
_BYTES_PER_MEMBER = 400


def _budget(limit: int | None) -> int:
    return (
        detected.DEFAULT_BUDGET if limit is None else min(detected.DEFAULT_BUDGET, limit // _BYTES_PER_MEMBER)
    )


def within_budget(members: int, limit: int) -> bool:
    """Whether index sets of so many members are found at all; ``limit``: bytes that the dense way moves."""
    return members <= _budget(limit)


def jacobian_patterns(
    caller: str,
    f: Callable[..., Any],
    prepared: Prepared,
    rows: int,
    limit: int | None,
    random: RandomState | None,
) -> list[Pattern] | None:
    """A pattern per input, ``None`` where detection fails; ``limit``: bytes that the dense way moves.

    ``random``: from where ``f`` draws the numbers that it drew for its value.
    """

    def detect(flat: Callable[..., Any]) -> tuple[Any, list[Pattern]]:
        return detected.jacobian_patterns(flat, prepared.inputs, prepared.owned, _budget(limit))

    return _asked(caller, detect, f, prepared, rows, strict=limit is None, random=random)


def hessian_patterns(
    caller: str, f: Callable[..., Any], prepared: Prepared, limit: int | None, random: RandomState | None
) -> list[Pattern] | None:
    """The pattern of each input's own Hessian; likewise."""

    def detect(flat: Callable[..., Any]) -> tuple[Any, list[Pattern]]:
        return detected.hessian_patterns(flat, prepared.inputs, prepared.owned, _budget(limit))

    return _asked(caller, detect, f, prepared, 1, strict=limit is None, random=random)


def _asked(
    caller: str,
    detect: Callable[[Callable[..., Any]], tuple[Any, list[Pattern]]],
    f: Callable[..., Any],
    prepared: Prepared,
    numel: int,
    *,
    strict: bool,
    random: RandomState | None,
) -> list[Pattern] | None:
    """``strict``: structure was asked for, so that an ``f`` that returns something else now is an error."""

    def flat(*inputs: Tensor) -> Any:
        return _engine.call(f, prepared, inputs)

    after = RandomState()
    if random is not None:
        random.restore()
    try:
        value, patterns = detect(flat)
    except Exception as error:
        _log.debug("structure not found, taken as dense: %s: %s", type(error).__name__, error)
        return None
    finally:
        after.restore()
    if _elements(value) != numel:
        if strict:
            raise ValueError(
                f"{caller}: expected f to return the same shape in each call, got {numel} elements once "
                f"and {type_name(value)} then; structure is found in a run of its own"
            )
        _log.debug("f returned %s elements, then %s: taken as dense", numel, type_name(value))
        return None
    return patterns


def _elements(value: Any) -> int | None:
    """How many numbers ``f`` returned; ``None`` where they are none."""
    if isinstance(value, Tensor):
        return value.numel()
    return int(getattr(value, "size", 1)) if kind_of(value) in (ARRAY, NUMBER) else None
