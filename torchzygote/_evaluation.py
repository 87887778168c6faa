"""One evaluation of a plan: a chunk of products, one gather, one check.

Eager, and as a program that ``torch.compile`` and ``torch.func`` can follow. It must not know where a plan
comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _engine
from ._arguments import Prepared
from ._assembly import result_dtype
from ._certificate import agreement, precision, probe_rows
from ._check_tables import CheckTables, check_tables
from ._colored import Collected, chunk_of, collect, color_seeds, hessian_products, jacobian_products
from ._crosscheck import pushes_what_is_pulled
from ._first_order import FirstOrder
from ._plan import FREE
from ._products import Seeds
from ._random import RandomState
from ._row_cost import row_cost
from ._second_order import Options, run
from .coloring.recovery import Recovery

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
        self.probes = probe_rows(recovery).to(dtype=dtype, device=device) if verify else None
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
        recovery.flat_slots(device)
        recovery.rows_on(device)
        recovery.columns_on(device)

    def seeds(self, dtype: torch.dtype, device: torch.device) -> tuple[Seeds, int]:
        """The seeds as ``_products`` takes them."""
        if not isinstance(self._seeds, Tensor):
            make = self._seeds
            return (lambda lo, hi: make(lo, hi).to(dtype)), self.total
        block = self._seeds.to(dtype)

        def part(lo: int, hi: int) -> Tensor:
            return block if hi - lo == block.shape[0] else block[lo:hi]

        return part, self.total

    def check(self, found: Collected, eps: float) -> list[Tensor]:
        """Whether each element of the plain products is explained; empty without a check."""
        if self.probes is None:
            return []
        if self._tables is None or not self._tables.applies(found):
            return agreement(self.recovery, found.values, self.probes, found.probed, eps)
        return self._tables.check(found, eps, not (_engine.compiling() or _engine.in_functorch()))


def or_nan(values: Sequence[Tensor], fine: Sequence[Tensor]) -> list[Tensor]:
    """The values, or NaN where a traced program can't branch and the check fails: never a wrong number."""
    if not fine:
        return list(values)
    right = torch.stack([one.all() for one in fine]).all()
    return [torch.where(right, v, torch.nan) for v in values]


def jacobian_values(
    first: FirstOrder, constants: Constants, options: Options, crosscheck: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The values of each matrix and whether the check holds, element by element.

    ``crosscheck``: of forward mode against a pullback, instead of the structure.
    """
    lin, y, inputs = first.lin, first.y, first.prepared.inputs
    cost = FREE if _engine.compiling() or _engine.in_functorch() else row_cost(lin)
    chunk = chunk_of(options, cost, constants.recovery, y)
    products = jacobian_products(first, constants.recovery, constants.seeds, chunk, options)
    dtypes = [result_dtype(x, y) for x in inputs]
    found = collect(constants.recovery, products, dtypes, y.device, options.keep)
    if crosscheck and constants.probes is not None:
        right = first.hooked or pushes_what_is_pulled(lin, y, constants.probes, found.probed[0])
        return found.values, [torch.tensor(right, device="cpu")]
    coarsest = 0.0 if _engine.compiling() else lin.survey().coarsest
    return found.values, constants.check(found, precision(inputs, y, coarsest))


def hessian_values(
    caller: str,
    f: Callable[..., Any],
    prepared: Prepared,
    mode: str,
    constants: Constants,
    options: Options,
    random: RandomState | None,
) -> tuple[Tensor, list[Tensor]]:
    """Likewise for a Hessian, or for the diagonal of one."""
    x = prepared.inputs[0]
    traced = _engine.compiling() or _engine.in_functorch()
    second = run(caller, f, prepared, options.keep, recorded=mode == "reverse_over_reverse")
    if mode == "reverse_over_reverse":
        second.differentiate()
        if second.by_input(0) is None:  # linear
            recovery = constants.recovery
            return torch.zeros(recovery.slots[0][0].numel(), dtype=x.dtype, device=x.device), []
    cost = FREE if traced else second.row_cost()
    chunk = chunk_of(options, cost, constants.recovery, x)
    products = hessian_products(f, second, 0, mode, constants.seeds, chunk, options, random)
    found = collect(constants.recovery, products, [x.dtype], x.device, options.keep)
    return found.values[0], constants.check(found, precision([x], x, second.coarsest()))
