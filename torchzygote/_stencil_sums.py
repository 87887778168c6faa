"""Hessians and their diagonals where the recorded graph shows a sum over a grid, of terms alike everywhere.

Decides whether that is looked for, and how it is checked; it must not know how the numbers come about.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from ._crosscheck import is_confirmed
from ._curvature import stencil_hessians
from ._curvature.stencil_hessians import StencilHessian
from ._numbers import show_numbers
from ._other_ways import another_may_do, suppressed
from ._pulling import Options
from ._second_order import SecondOrder
from ._warning import warn

__all__ = ["diagonal", "matrix"]

_log = logging.getLogger("torchzygote")

# In half precision, squares of tangents get too small.
_ROUGH = 1e-4


def matrix(second: SecondOrder, options: Options, *, verify: bool) -> Tensor | None:
    """The Hessian by the only input, before the gradient is taken; that is told, too.

    ``None`` where ``f`` isn't seen to be such a sum. The tangents are checked in any case; ``verify`` asks
    for a plain product, too, the first time that the graph looks like this.
    """
    found = _found(second, options, diagonal=False)
    if found is None:
        return None
    if verify and not found.confirmed:
        if not _is_confirmed(second, found.values):
            return None
        found.confirmed[:] = [True]
    second.grads = [found.gradient]
    return found.values


def diagonal(second: SecondOrder, options: Options) -> list[Tensor] | None:
    """The diagonal by the only input, likewise."""
    if len(second.prepared.inputs) != 1:
        return None
    found = _found(second, options, diagonal=True)
    return None if found is None else [found.values]


def _found(second: SecondOrder, options: Options, *, diagonal: bool) -> StencilHessian | None:
    """What is asked for row by row, recorded or with a bar, is given so."""
    if options.keep or options.progress or options.chunk_size is not None:
        return None
    inputs = second.prepared.inputs
    is_array = inputs[0].dim() > 0 and inputs[0].numel() > 0
    recorded = second.recorded() if is_array and show_numbers(inputs) else None
    if recorded is None:
        return None
    y, (x,) = recorded
    if (eps := torch.finfo(x.dtype).eps) > _ROUGH:  # all have its dtype
        return None
    try:
        return stencil_hessians.hessian(y, x, eps, diagonal=diagonal)
    except Exception as error:  # a form of an operation that its rule doesn't know; something written over
        if not another_may_do(error):
            raise
        _log.debug("stencil: %s: %s", type(error).__name__, error)
        return None


def _is_confirmed(second: SecondOrder, matrix: Tensor) -> bool:
    """Whether one plain product with a random vector agrees; a warning says so if not."""
    with suppressed():  # an operation may lack a second backward
        second.differentiate()
    lin = second.by_input(0)
    if lin is None:  # nobody can tell, or the gradient depends on nothing
        return False
    if is_confirmed(lin, lin.roots[0], [matrix]):
        return True
    warn(
        f"{second.caller}: the Hessian that was summed up along the recorded graph differs from plain "
        "automatic differentiation in a product with a random vector, so that it is computed otherwise: "
        "please report that, with f"
    )
    return False
