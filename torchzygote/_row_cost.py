"""What one row of a derivative takes while it is pulled back, read off the recorded graph.

Counts only; it must not know what is decided from its numbers.
"""

from __future__ import annotations

from . import _state
from ._cost_model import RowCost
from ._engine import Linearization

__all__ = ["is_linear", "is_plain", "row_cost"]


def is_plain(lin: Linearization) -> bool:
    """Whether pulling back does what the recorded graph shows, at its cost.

    Not so where tensor hooks bend what is pulled back, or a checkpointed function runs again each time.
    """
    session = _state.session()
    return not ((session is not None and session.recomputes) or lin.may_be_bent())


def is_linear(lin: Linearization) -> bool:
    """Whether a pullback is linear in its cotangent: no hooks, nor custom functions, may do otherwise."""
    return not (lin.may_be_bent() or lin.survey().nonlinear)


def row_cost(lin: Linearization) -> RowCost:
    """Upper bound of what one row takes."""
    found = lin.survey()
    inputs = sum(x.numel() * x.element_size() for x in lin.inputs)
    return RowCost(lin.nbytes() + inputs, found.nodes, found.misbatched, found.looped)
