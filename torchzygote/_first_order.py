"""One recorded call of a function whose Jacobians are wanted.

Holds what every way of computing them starts from; knows nothing of matrices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from . import _engine, _state
from ._arguments import Prepared
from ._engine import Linearization
from ._outputs import output_tensor
from ._random import RandomState
from ._torch_private import stepwise
from ._unfused import unfused, unfused_but_norms

__all__ = ["FirstOrder", "must_be_pulled", "record"]


class FirstOrder(NamedTuple):
    """``f`` as recorded by one call.

    ``y``: what it returned, as a tensor. ``random``: from where it drew, unless a compiler traces it.
    ``position``: :func:`_state.mark` as of before it ran; ``hooked``: whether anything waits since then.
    """

    caller: str
    f: Callable[..., Any]
    prepared: Prepared
    lin: Linearization
    y: Tensor
    random: RandomState | None
    position: int
    hooked: bool


def record(
    caller: str, f: Callable[..., Any], prepared: Prepared, keep: bool, forward: bool = False
) -> FirstOrder:
    """Run ``f`` once; ``keep``: results will be differentiable themselves.

    ``forward``: forward mode is meant. For what ``f`` finds by identity that is the recorded pullback,
    differentiated by its cotangent, which fused kernels don't let it be.
    """
    random = None if _engine.compiling() else RandomState()
    position = _state.mark()
    pulled_twice = forward and not all(prepared.owned)
    with _around(pulled_twice):
        lin = _engine.linearize(f, prepared, keep=keep)
    if pulled_twice and random is not None and not (keep or _engine.in_transform()) and lin.survey().lacking:
        _state.forget_since(position)
        random.restore()
        with unfused():  # with formulas for what can't be differentiated twice, as torch.cdist
            lin = _engine.linearize(f, prepared, keep=keep)
    y = output_tensor(caller, lin.y_leaves[0] if lin.y_spec is None else lin.y)
    return FirstOrder(caller, f, prepared, lin, y, random, position, _state.mark() > position)


def _around(pulled_twice: bool) -> contextlib.AbstractContextManager[None]:
    if pulled_twice:
        return unfused_but_norms()
    return contextlib.nullcontext() if _engine.compiling() else stepwise()


def must_be_pulled(first: FirstOrder) -> bool:
    """Whether forward mode would leave something out: hooks, operators that it gives zeros or noise for."""
    found = first.lin.survey()
    return first.hooked or bool(found.unpushable) or (found.by_lu and _engine.in_transform())
