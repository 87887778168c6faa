"""What one row of a derivative takes while it is pulled back, read off the recorded graph.

Counts only; it must not know what is decided from its numbers.
"""

from __future__ import annotations

from ._engine import Linearization
from ._plan import RowCost
from ._torch_private import backward_bytes

__all__ = ["row_cost"]


def row_cost(lin: Linearization) -> RowCost:
    """Upper bound of what one row takes."""
    nbytes, nodes, misbatched = backward_bytes(lin.roots)
    return RowCost(nbytes + sum(x.numel() * x.element_size() for x in lin.inputs), nodes, misbatched)
