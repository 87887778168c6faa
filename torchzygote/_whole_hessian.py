"""The Hessian of one recorded run, by the way that its graph tells to be the cheapest.

Decides which of the ways gives the matrix; how each of them works is its module's business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import _compressed, _dense_hessians, _engine, _factored, _stencil_sums
from ._arguments import Prepared
from ._dense_hessians import Whole
from ._pulling import Options
from ._random import RandomState
from ._second_order import run

__all__ = ["whole_hessian"]


def whole_hessian(
    caller: str,
    f: Callable[..., Any],
    prepared: Prepared,
    mode: str,
    options: Options,
    random: RandomState | None,
    sparse: bool,
    verify: bool,
    alone: bool,
) -> Whole:
    """What ``f`` as recorded by one run gives, and tells of how to go on."""
    second = run(caller, f, prepared, options.keep, recorded=mode != "forward_over_reverse", random=random)
    matrix = None
    if mode == "auto" and not sparse:
        matrix = _stencil_sums.matrix(second, options, verify=verify)
    is_small = matrix is None and not sparse and second.is_small()
    if matrix is None and not sparse and (not is_small or second.multiplies_much(prepared.inputs[0].numel())):
        matrix = _factored.hessian(second, mode, options)
    if matrix is None and not is_small:
        matrix = _compressed.hessian(caller, f, second, mode, options, random, sparse=sparse, verify=verify)
    if matrix is None:
        matrix = _dense_hessians.matrix(f, second, mode, options, random)
        if sparse and prepared.inputs[0].dim() > 0:
            matrix = _compressed.no_entries(matrix) if second.is_linear else _compressed.full_csr(matrix)
    if alone:
        return Whole(None, None, matrix)
    grad = second.grads[0]
    return Whole(second.value, grad if options.keep else _engine.detached(grad), matrix)
