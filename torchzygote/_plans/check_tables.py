"""The check of a plan's values as weighted sums, with tables made once: nothing is scattered.

Knows where entries are and what the probe weighs them with; not how products are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._certificate import Comparison, is_plain, wide
from .._colored import Collected, gather
from ..coloring.recovery import Recovery

__all__ = ["CheckTables"]


class CheckTables:
    """Tables for one plan and dtype; :func:`check_tables` makes them.

    ``factors[k]`` weighs the products of kind ``k``, a row per color: summed over colors, they give what the
    probe must give. An entry of a symmetric matrix that is read from its mirror image has no factor; it is in
    ``entries``, positions among the values, a column per row of the matrix, weighed with ``weights``.
    """

    __slots__ = ("_entries", "_factors", "_weights")

    def __init__(self, factors: Sequence[Tensor] | None, entries: Tensor, weights: Tensor) -> None:
        self._factors = factors
        self._entries = entries
        self._weights = weights

    def applies(self, found: Collected) -> bool:
        """Whether what the tables weigh is at hand."""
        return self._factors is None or found.products is not None

    def check(self, found: Collected, eps: float, branches: bool) -> list[Comparison]:
        """Whether each element of the plain products is explained; nothing where all plainly are.

        ``branches``: the values may be looked at, which saves most of the work where all is right.
        """
        terms = [self._terms(found, k) for k in range(len(found.probed))]
        sums = [_total([term.sum(0) for term in parts]) for parts in terms]
        wanted = [expected[0].to(got.dtype) for expected, got in zip(found.probed, sums, strict=True)]
        if branches and all(is_plain(a.detach(), b.detach(), eps) for a, b in zip(sums, wanted, strict=True)):
            return []
        scales = [_total([term.abs().sum(0) for term in parts]) for parts in terms]
        mirrored = self._entries.shape[0] > 0
        return [
            Comparison(*one, eps, mirrored=mirrored, branches=branches)
            for one in zip(sums, scales, wanted, strict=True)
        ]

    def _terms(self, found: Collected, k: int) -> list[Tensor]:
        terms = []
        if self._factors is not None:
            assert found.products is not None
            terms.append(wide(found.products[k]) * self._factors[k])
        if self._entries.shape[0] > 0:
            read = gather(wide(found.values[0]), self._entries.reshape(-1))
            terms.append(read.view(self._entries.shape) * self._weights)
        return terms


def _total(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def check_tables(
    recovery: Recovery, probes: Tensor, dtype: torch.dtype, device: torch.device, most: int
) -> CheckTables | None:
    """Tables of at most ``most`` bytes; ``None`` where scattering is to be preferred."""
    if recovery.mode == "diagonal" or all(recovery.is_full(i) for i in range(len(recovery.patterns))):
        return None
    probe = probes[0]
    factors = _factors(recovery, probe, dtype, device, most)
    if recovery.mode != "symmetric":
        nothing = torch.empty(0, 0, dtype=torch.int32, device=device)
        return None if factors is None else CheckTables(factors, nothing, nothing)
    rest = _rest(recovery, probe, dtype, device, most, everything=factors is None)
    if rest is None or (factors is None and rest[0].shape[0] == 0):
        return None
    return CheckTables(factors, *rest)


def _own(recovery: Recovery, device: torch.device) -> Tensor:
    """Entries of a symmetric matrix that are read from their own row."""
    _, position = recovery.slots(0, device)
    return position == recovery.rows_of(0, device)


def _factors(
    recovery: Recovery, probe: Tensor, dtype: torch.dtype, device: torch.device, most: int
) -> list[Tensor] | None:
    """A table for each kind of product, where these hold little else than entries."""
    lengths = recovery.lengths()
    cells = recovery.ncolors * sum(lengths)
    if not recovery.is_compact() or cells * dtype.itemsize > most:
        return None
    tables = [torch.zeros(recovery.ncolors, n, dtype=dtype, device=device) for n in lengths]
    offset = 0
    for i, width in enumerate(recovery.widths):
        if recovery.is_full(i):
            weights = probe if recovery.mode == "reverse" else probe[offset : offset + width]
            tables[recovery.product_of(i)][recovery.colors_of(i, device)] = weights.unsqueeze(1)
            offset += width
            continue
        row, position = recovery.slots(i, device)
        if recovery.mode == "reverse":
            factors = probe[recovery.rows_of(i, device)]
        else:
            factors = probe[recovery.columns_of(i, device) + offset]
        if recovery.mode == "symmetric":
            own = _own(recovery, device)
            row, position, factors = row[own], position[own], factors[own]
        tables[recovery.product_of(i)][row, position] = factors
        offset += width
    return tables


def _rest(
    recovery: Recovery,
    probe: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    most: int,
    *,
    everything: bool,
) -> tuple[Tensor, Tensor] | None:
    """Entries of a symmetric matrix without a factor and their weights; ``None`` where a row has too many."""
    pattern = recovery.patterns[0]
    left = torch.arange(pattern.nnz, device="cpu")
    if not everything:
        left = left[~_own(recovery, torch.device("cpu"))]
    rows = pattern.rows()[left]
    counts = torch.bincount(rows, minlength=recovery.rows)
    height = int(counts.max()) if counts.numel() > 0 else 0
    if height * recovery.rows > 2 * pattern.nnz + 65536 or pattern.nnz * 16 > most or pattern.nnz >= 1 << 31:
        return None
    turn = torch.arange(rows.numel(), device="cpu") - (counts.cumsum(0) - counts)[rows]
    entries = torch.zeros(height, recovery.rows, dtype=torch.int32, device="cpu")
    entries[turn, rows] = left.int()
    weights = torch.zeros(height, recovery.rows, dtype=dtype, device=device)
    weights[turn.to(device), rows.to(device)] = probe[pattern.indices[left].to(device)]
    return entries.to(device), weights
