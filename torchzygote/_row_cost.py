"""What one row of a derivative takes while it is pulled back, read off the recorded graph.

Counts only; it must not know what is decided from its numbers.
"""

from __future__ import annotations

from ._engine import Linearization
from ._plan import RowCost

__all__ = ["row_cost"]


def row_cost(lin: Linearization) -> RowCost:
    """Upper bound of what one row takes."""
    found = lin.survey()
    inputs = sum(x.numel() * x.element_size() for x in lin.inputs)
    return RowCost(found.nbytes + inputs, found.nodes, found.misbatched)
