"""Matrices made of the values that an evaluation of a plan gave.

Holds what sparse results share; it must not know how the values were computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _compressed, _engine
from .._torch_private import version_of
from ..sparsity.pattern import Pattern

__all__ = ["PlanResults", "listing_all"]

# Results after which a new copy of the structure is made: its time then hardly shows, nor does the question
# whether somebody has written into one of them.
_MOST_SHARING = 64


class PlanResults:
    """Makes the results of one plan."""

    __slots__ = ("_by_number", "_patterns", "_structures")

    def __init__(self, patterns: tuple[Pattern, ...], by_number: tuple[int, ...]) -> None:
        """``by_number``: the shape of a result by a number, which is dense."""
        self._patterns = patterns
        self._structures = [_SharedStructure(pattern) for pattern in patterns]
        self._by_number = by_number

    @_engine.entry_point
    def matrices(
        self, values: Sequence[Tensor], inputs: Sequence[Tensor], dense: bool, create_graph: bool | None
    ) -> list[Tensor]:
        """A matrix of the values by each input."""
        matrices = []
        for i, (v, x) in enumerate(zip(values, inputs, strict=True)):
            if dense or x.dim() == 0:
                matrix = _compressed.dense(self._patterns[i], v, x.device)
                matrices.append(matrix if x.dim() > 0 else matrix.reshape(self._by_number))
            else:
                matrices.append(self._structures[i].csr(v, x.device))
        return matrices


class _SharedStructure:
    """A copy of the structure that sparse results share, lest a write into one of them gets into the plan.

    A copy for each of them would take a tenth of what evaluating a compiled plan of a banded Hessian does; to
    a device, it would be waited for.
    Once PyTorch has written into one, later results get another copy; what NumPy writes can't be seen.
    """

    __slots__ = ("_copies", "_pattern")

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern
        self._copies: dict[torch.device, tuple[Pattern, list[tuple[Tensor, int]]]] = {}

    def csr(self, values: Tensor, device: torch.device) -> Tensor:
        """A matrix of these values."""
        if device not in self._copies or _is_spent(self._copies[device][1]):
            self._copies[device] = self._pattern.copy(device), []
        copy, watched = self._copies[device]
        matrix = _compressed.csr(copy, values, device)
        # These count what is written into the matrix, and outlive it. The vectors it was made of don't.
        columns = matrix.col_indices()
        watched.append((columns, version_of(columns)))
        return matrix


def _is_spent(watched: Sequence[tuple[Tensor, int]]) -> bool:
    """Whether results with another copy are to be made: enough share it, or one was written into."""
    return len(watched) >= _MOST_SHARING or any(version_of(columns) != before for columns, before in watched)


@_engine.entry_point
def listing_all(matrix: Tensor, create_graph: bool | None) -> Tensor:
    """A dense result as a CSR matrix that lists every entry; vectors and numbers as they are."""
    return matrix if matrix.dim() < 2 else _compressed.full_csr(matrix)
