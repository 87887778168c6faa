"""One evaluation of a plan: a chunk of products, one gather, one check.

Eager, and as a program that ``torch.compile`` and ``torch.func`` can follow. It must not know where a plan
comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _engine
from .._arguments import Prepared
from .._assembly import result_dtype
from .._certificate import Comparison, agreement, precision, probe_rows
from .._colored import (
    Collected,
    Products,
    are_linear,
    chunk_of,
    collect,
    color_seeds,
    hessian_products,
    jacobian_products,
)
from .._cost_model import FREE
from .._crosscheck import pushes_what_is_pulled
from .._first_order import FirstOrder
from .._numbers import may_branch
from .._products import Seeds
from .._pulling import Options
from .._random import RandomState
from .._repetition import settle_colored
from .._row_cost import row_cost
from .._second_order import SecondOrder, run
from ..coloring.recovery import Recovery
from .check_tables import CheckTables, check_tables

__all__ = ["Constants", "hessian_values", "jacobian_values", "or_nan"]

# Seeds and tables beyond this many bytes are made anew in each evaluation, or not at all.
_MOST_KEPT = 64 << 20


class Constants:
    """What an evaluation needs besides values: seeds of the colors and the probes, and the check's tables."""

    __slots__ = ("_seeds", "_tables", "device", "dtype", "probes", "recovery", "total")

    def __init__(self, recovery: Recovery, dtype: torch.dtype, device: torch.device, verify: bool) -> None:
        self.recovery = recovery
        self.dtype = dtype
        self.device = device
        alone = recovery.mode == "diagonal" and recovery.ncolors == recovery.rows  # hidden by no other column
        self.probes = probe_rows(recovery).to(dtype=dtype, device=device) if verify and not alone else None
        seeds, self.total = color_seeds(
            recovery.coloring.colors, recovery.ncolors, self.probes, dtype, device
        )
        numel = recovery.coloring.colors.numel()
        self._seeds: Seeds | Tensor = seeds
        if self.total * numel * dtype.itemsize <= _MOST_KEPT and self.total > 0:
            self._seeds = seeds(0, self.total)
        self._tables: CheckTables | None = None
        if self.probes is not None:
            self._tables = check_tables(recovery, self.probes, dtype, device, _MOST_KEPT)
        for i in range(len(recovery.patterns)):
            if recovery.is_full(i):
                recovery.colors_of(i, device)
                continue
            recovery.flat_slots(i, device)
            if recovery.mode != "diagonal":
                recovery.rows_of(i, device)
                recovery.columns_of(i, device)

    def seeds(self, dtype: torch.dtype, device: torch.device) -> tuple[Seeds, int]:
        """The seeds as ``_products`` takes them."""
        if not isinstance(self._seeds, Tensor):
            make = self._seeds
            return (lambda lo, hi: make(lo, hi).to(device, dtype)), self.total
        block = self._seeds.to(device, dtype)

        def part(lo: int, hi: int) -> Tensor:
            return block[lo:hi].clone()  # a hook or a custom backward may write into its cotangent

        return part, self.total

    def check(self, found: Collected, eps: float) -> list[Comparison]:
        """Whether each element of the plain products is explained; empty without a check."""
        if self.probes is None:
            return []
        branches = may_branch()
        if self._tables is None or not self._tables.applies(found):
            return agreement(self.recovery, found.values, self.probes, found.probed, eps, branches)
        return self._tables.check(found, eps, branches)


def or_nan(values: Sequence[Tensor], right: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The values, or NaN where a traced program can't branch and the check fails: never a wrong number.

    So are their derivatives of any order by ``inputs``, whether the values depend on these or not.
    """
    factor = torch.where(right, 1.0, torch.nan)
    nothing = factor * 0
    for x in inputs:
        real = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
        # Zero, with derivatives that the choice makes zero, too; `expm1` has them in any order.
        nothing = nothing + torch.where(right, 0.0, real).expm1().sum() * factor
    return [_spoiled(v, factor, nothing) for v in values]


def _spoiled(v: Tensor, factor: Tensor, nothing: Tensor) -> Tensor:
    """``v`` times 1 minus 0, to the bit; or NaN."""
    if v.is_complex():  # a product of complex numbers makes NaN of infinity
        parts = torch.view_as_real(v.resolve_conj())
        return torch.view_as_complex(_spoiled(parts, factor, nothing))
    return v * factor.to(v.dtype) - nothing.to(v.dtype)


def _settle(
    comparisons: Sequence[Comparison],
    constants: Constants,
    found: Collected,
    products: Callable[[Callable[..., Any], Options], Products],
    options: Options,
    linear: Callable[[], bool],
) -> None:
    """Look again at what passed beside far larger elements only, and at what may have lost digits.

    Not where a traced program can't branch. ``linear()``: as for :func:`settle_colored`.
    """
    if constants.probes is None or not may_branch():
        return

    def once(seeds: Callable[..., Any]) -> Products:
        return products(seeds, options.once)

    settle_colored(comparisons, constants.recovery, constants.probes, found.probed, once, linear)


def jacobian_values(
    first: FirstOrder, constants: Constants, options: Options, crosscheck: bool = False
) -> tuple[list[Tensor], list[Comparison]]:
    """The values of each matrix, and what the check compared.

    ``crosscheck``: of forward mode against a pullback, instead of the structure.
    """
    lin, y, inputs = first.lin, first.y, first.prepared.inputs
    cost = row_cost(lin) if may_branch() else FREE
    recovery = constants.recovery
    chunk = chunk_of(options, cost, recovery, y)

    def products(seeds: Callable[..., Any], options: Options) -> Products:
        return jacobian_products(first, recovery, seeds, chunk, options)

    dtypes = [result_dtype(x, y) for x in inputs]
    found = collect(recovery, products(constants.seeds, options), dtypes, y.device, options.keep)
    if crosscheck and constants.probes is not None:
        pushed = found.probed[0]
        return found.values, [] if first.hooked else pushes_what_is_pulled(lin, y, constants.probes, pushed)
    coarsest = 0.0 if _engine.compiling() else lin.coarsest()
    comparisons = constants.check(found, precision(inputs, y, coarsest))
    linear = lambda: are_linear(first, recovery, found.probed)
    _settle(comparisons, constants, found, products, options, linear)
    return found.values, comparisons


def hessian_values(
    caller: str,
    f: Callable[..., Any],
    prepared: Prepared,
    mode: str,
    constants: Constants,
    options: Options,
    random: RandomState | None,
) -> tuple[Tensor, list[Comparison]]:
    """Likewise for a Hessian, or for the diagonal of one."""
    x = prepared.inputs[0]
    traced = not may_branch()
    if _engine.compiling() and mode == "forward_over_reverse":
        second = SecondOrder(
            caller, prepared, options.keep, None
        )  # one run of f, for its products, says it all
    else:
        second = run(
            caller, f, prepared, options.keep, recorded=mode == "reverse_over_reverse", random=random
        )
    recovery = constants.recovery
    if mode == "reverse_over_reverse":
        second.differentiate()
        if second.by_input(0) is None:  # linear
            return torch.zeros(recovery.entries(0), dtype=x.dtype, device=x.device), []
    elif not _engine.compiling():
        second.take_gradient()
    chunk = chunk_of(options, FREE if traced else second.row_cost(), recovery, x)

    def products(seeds: Callable[..., Any], options: Options) -> Products:
        return hessian_products(f, second, 0, mode, seeds, chunk, options, random)

    found = collect(recovery, products(constants.seeds, options), [x.dtype], x.device, options.keep)
    comparisons = constants.check(found, precision([x], x, second.coarsest()))
    linear = lambda: mode == "reverse_over_reverse" and second.is_linear_again(0)
    _settle(comparisons, constants, found, products, options, linear)
    return found.values[0], comparisons
