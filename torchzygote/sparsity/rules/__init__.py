"""Rules over aten operators: how index sets pass through each of them, and what it couples.

One module for each group of behavior; importing them fills the table.
"""

from __future__ import annotations

from . import (
    elementwise,
    factorizations,
    interpolation,
    matrices,
    movement,
    recurrent,
    reductions,
    selection,
    windows,
)
from ._table import RULES, Call, Context, Dep, Rule, zero_ids
from .elementwise import active_couplings
from .selection import PROBES

__all__ = [
    "PROBES",
    "RULES",
    "Call",
    "Context",
    "Dep",
    "Rule",
    "active_couplings",
    "elementwise",
    "factorizations",
    "interpolation",
    "matrices",
    "movement",
    "recurrent",
    "reductions",
    "selection",
    "windows",
    "zero_ids",
]
