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
from ._certificate import agreement, close, precision, probe_rows, wide
from ._colored import Collected, chunk_of, collect, color_seeds, hessian_products, jacobian_products
from ._engine import Linearization
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

    __slots__ = ("_padded", "_seeds", "_tables", "device", "dtype", "probes", "recovery", "total")

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
        self._tables = None if self.probes is None else self._make_tables()
        self._padded = None if self.probes is None else self._make_padded()
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

    def _make_tables(self) -> list[Tensor] | None:
        """For each product a factor, so that the products' weighted sum is what the probe must give.

        Only where the products hold little else than entries, and each entry once.
        """
        recovery = self.recovery
        if recovery.mode not in ("forward", "reverse"):
            return None
        lengths = recovery.lengths()
        cells = recovery.ncolors * sum(lengths)
        if not recovery.is_compact() or cells * self.dtype.itemsize > _MOST_KEPT:
            return None
        assert self.probes is not None
        probe = self.probes[0]
        tables = [torch.zeros(recovery.ncolors, n, dtype=self.dtype, device=self.device) for n in lengths]
        offset = 0
        for i, (row, column) in enumerate(recovery.slots_on(self.device)):
            if recovery.mode == "reverse":
                factors = probe[recovery.rows_on(self.device)[i]]
            else:
                factors = probe[recovery.columns_on(self.device)[i] + offset]
            tables[recovery.product_of(i)][row, column] = factors
            offset += recovery.widths[i]
        return tables

    def _make_padded(self) -> tuple[Tensor, Tensor] | None:
        """For a symmetric matrix, the entries of each row in a table, and what the probe weighs them with.

        Summed over, it gives the matrix times the probe without scattering, which compilers do badly.
        """
        recovery = self.recovery
        pattern = recovery.patterns[0]
        if recovery.mode != "symmetric" or pattern.nnz == 0:
            return None
        counts = pattern.indptr.diff()
        most = int(counts.max())
        if most * recovery.rows > 2 * pattern.nnz + 65536 or pattern.nnz * 16 > _MOST_KEPT:
            return None
        assert self.probes is not None
        within = torch.arange(most).unsqueeze(1)
        there = within < counts
        entries = torch.where(there, pattern.indptr[:-1] + within, 0)
        factors = self.probes[0][pattern.indices[entries].to(self.device)]
        weights = torch.where(there.to(self.device), factors, 0)
        return entries.to(self.device), weights

    def check(self, found: Collected, eps: float) -> list[Tensor]:
        """Whether each element of the plain products is explained; empty without a check."""
        if self.probes is None:
            return []
        if self._padded is not None and (_engine.compiling() or _engine.in_functorch()):
            entries, weights = self._padded
            terms = wide(found.values[0])[entries] * weights
            return [close(terms.sum(0), terms.abs().sum(0), found.probed[0][0].to(terms.dtype), eps)]
        if self._tables is None or found.products is None:
            return agreement(self.recovery, found.values, self.probes, found.probed, eps)
        fine = []
        branches = not (_engine.compiling() or _engine.in_functorch())
        for product, table, expected in zip(found.products, self._tables, found.probed, strict=True):
            terms = wide(product) * table
            got, wanted = terms.sum(0), expected[0].to(terms.dtype)
            if branches:  # |got| is at most the size of its terms, so that this suffices where it holds
                near = close(got, got.abs(), wanted, eps)
                if bool(near.all()):
                    fine.append(near)
                    continue
            fine.append(close(got, terms.abs().sum(0), wanted, eps))
        return fine


def or_nan(values: Sequence[Tensor], fine: Sequence[Tensor]) -> list[Tensor]:
    """The values, or NaN where a traced program can't branch and the check fails: never a wrong number."""
    if not fine:
        return list(values)
    right = torch.stack([one.all() for one in fine]).all()
    return [torch.where(right, v, torch.nan) for v in values]


def jacobian_values(
    f: Callable[..., Any],
    prepared: Prepared,
    lin: Linearization,
    y: Tensor,
    constants: Constants,
    options: Options,
    random: RandomState | None,
    hooked: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The values of each matrix and whether the check holds, element by element."""
    cost = FREE if _engine.compiling() or _engine.in_functorch() else row_cost(lin)
    products = jacobian_products(
        f,
        prepared,
        lin,
        y,
        constants.recovery,
        constants.seeds,
        chunk_of(options, cost, constants.recovery, y),
        options,
        random,
        hooked,
    )
    dtypes = [result_dtype(x, y) for x in prepared.inputs]
    found = collect(constants.recovery, products, dtypes, y.device, options.keep)
    return found.values, constants.check(found, precision(prepared.inputs, y))


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
    return found.values[0], constants.check(found, precision([x], x))
