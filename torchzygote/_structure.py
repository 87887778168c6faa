"""Asking the sparsity detection about one call; whatever it can't follow counts as dense.

It must not know what the structure is used for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from . import _engine
from ._arguments import Prepared
from .sparsity.detect import DEFAULT_BUDGET, detect_hessian, detect_jacobian
from .sparsity.pattern import Pattern

__all__ = ["hessian_patterns", "jacobian_patterns"]

_log = logging.getLogger("torchzygote")

# Detection may take a fifth of the dense way's time: it handles about 20 members of index sets while a core
# moves this many kilobytes.
_BYTES_PER_MEMBER = 400


def _budget(limit: int | None) -> int:
    return DEFAULT_BUDGET if limit is None else min(DEFAULT_BUDGET, limit // _BYTES_PER_MEMBER)


def jacobian_patterns(
    f: Callable[..., Any], prepared: Prepared, rows: int, limit: int | None
) -> list[Pattern] | None:
    """A pattern per input, ``None`` where detection fails; ``limit``: bytes that the dense way moves."""
    expected = [(rows, x.numel()) for x in prepared.inputs]
    return _asked(detect_jacobian, f, prepared, limit, expected)


def hessian_patterns(f: Callable[..., Any], prepared: Prepared, limit: int | None) -> list[Pattern] | None:
    """The pattern of each input's own Hessian; likewise."""
    expected = [(x.numel(), x.numel()) for x in prepared.inputs]
    return _asked(detect_hessian, f, prepared, limit, expected)


def _asked(
    detect: Callable[..., list[Pattern]],
    f: Callable[..., Any],
    prepared: Prepared,
    limit: int | None,
    expected: Sequence[tuple[int, int]],
) -> list[Pattern] | None:
    def flat(*inputs: Tensor) -> Any:
        return _engine.call(f, prepared, inputs)

    try:
        patterns = detect(flat, prepared.inputs, owned=prepared.owned, budget=_budget(limit))
    except Exception as error:
        _log.debug("structure not found, taken as dense: %s: %s", type(error).__name__, error)
        return None
    shapes = [tuple(pattern.shape) for pattern in patterns]
    if shapes != list(expected):
        _log.debug("structure has the shapes %s, the derivative %s: taken as dense", shapes, expected)
        return None
    return patterns
