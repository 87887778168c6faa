"""Derivatives of what the recorded graph shows to depend on elements at the same distances everywhere.

Decides whether that is looked for, and how it is checked; it must not know how the numbers come about.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ._certificate import random_vector
from ._curvature import stencil_hessians
from ._curvature.stencil_hessians import StencilHessian
from ._first_order import FirstOrder
from ._numbers import show_numbers
from ._other_ways import another_may_do, suppressed
from ._pulling import Options
from ._row_cost import is_plain
from ._second_order import SecondOrder
from ._torch_private import is_leaf
from ._warning import warn

__all__ = ["diagonal", "jacobian", "matrix"]

T = TypeVar("T")

_log = logging.getLogger("torchzygote")

# In half precision, squares of tangents get too small.
_ROUGH = 1e-4
# Of fewer elements, batched rows of the recorded graph take no longer than its tangents, one by one.
LEAST_OF_A_JACOBIAN = 256


def jacobian(first: FirstOrder, options: Options, *, verify: bool) -> Tensor | None:
    """The Jacobian by the only input, where ``f`` is such a function; checked against one plain pullback."""
    inputs, lin = first.prepared.inputs, first.lin
    if len(inputs) != 1 or len(lin.roots) != 1 or _are_rows_asked_for(options):
        return None
    (y,), (x,) = lin.roots, lin.inputs
    if not (_is_array(x) and _is_array(y) and show_numbers([first.y, *inputs])):
        return None
    if min(x.numel(), y.numel()) < LEAST_OF_A_JACOBIAN:
        return None
    if y.dtype != x.dtype or not (first.prepared.owned[0] or is_leaf(x)) or not is_plain(lin):
        return None
    if (eps := torch.finfo(x.dtype).eps) > _ROUGH:
        return None
    probe = random_vector(y.numel()).to(y.device, y.dtype).view(y.shape) if verify else None
    return _attempt(lambda: stencil_hessians.jacobian(y, x, eps, probe))


def matrix(second: SecondOrder, options: Options, *, verify: bool) -> Tensor | None:
    """The Hessian by the only input, before the gradient is taken; that is told, too.

    ``None`` where ``f`` isn't seen to be such a sum. The tangents are checked in any case; ``verify`` asks
    for a plain product, too, the first time that the graph looks like this.
    """
    product = (lambda vector: _product(second, vector)) if verify else None
    found = _found(second, options, diagonal=False, product=product)
    if found is None:
        return None
    if found.is_refuted:
        warn(
            f"{second.caller}: the Hessian that was summed up along the recorded graph differs from plain "
            "automatic differentiation in a product with a random vector, so that it is computed otherwise: "
            "please report that, with f"
        )
        return None
    second.grads = [found.gradient]
    return found.values


def diagonal(second: SecondOrder, options: Options) -> list[Tensor] | None:
    """The diagonal by the only input, likewise."""
    if len(second.prepared.inputs) != 1:
        return None
    found = _found(second, options, diagonal=True)
    return None if found is None else [found.values]


def _found(
    second: SecondOrder,
    options: Options,
    *,
    diagonal: bool,
    product: Callable[[Tensor], Tensor | None] | None = None,
) -> StencilHessian | None:
    inputs = second.prepared.inputs
    if _are_rows_asked_for(options) or not (_is_array(inputs[0]) and show_numbers(inputs)):
        return None
    recorded = second.recorded()
    if recorded is None:
        return None
    y, (x,) = recorded
    if (eps := torch.finfo(x.dtype).eps) > _ROUGH:  # all have its dtype
        return None
    return _attempt(lambda: stencil_hessians.hessian(y, x, eps, diagonal=diagonal, product=product))


def _are_rows_asked_for(options: Options) -> bool:
    """Recorded, so many at a time, or with a bar over them."""
    return options.keep or options.progress or options.chunk_size is not None


def _is_array(x: Tensor) -> bool:
    return x.dim() > 0 and x.numel() > 0


def _attempt(way: Callable[[], T]) -> T | None:
    try:
        return way()
    except Exception as error:  # a form of an operation that its rule doesn't know; something written over
        if not another_may_do(error):
            raise
        _log.debug("stencil: %s: %s", type(error).__name__, error)
        return None


def _product(second: SecondOrder, vector: Tensor) -> Tensor | None:
    """Of the Hessian and ``vector``, by a plain pullback; ``None`` where an operation lacks one."""
    with suppressed():
        second.differentiate()
    lin = second.by_input(0)
    if lin is None:
        return torch.zeros_like(vector) if second.is_linear else None
    (found,) = lin.pull_dense([vector])
    return torch.zeros_like(vector) if found is None else found
