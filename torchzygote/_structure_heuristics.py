"""Whether structure is worth looking for, and what of it the recorded graph shows by itself.

Decides from sizes and recorded operations; it must not know how a matrix is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._cost_model import RowCost
from ._engine import Linearization
from ._recorded.alignment import keeps_elements_apart
from ._recorded.stencils import stencil
from ._row_cost import is_plain
from ._separable import find_layout
from .sparsity.pattern import Pattern

__all__ = ["has_batch_axis", "is_worth_looking", "read_stencil"]

# Bytes that the dense products must move before anybody looks for structure: a core moves some 4 GB a second,
# and detection takes 2 ms and 0.1 ms for each recorded operation. Where every operation keeps elements apart,
# the derivative is sparse nearly always, so that detection need be no more than three times faster.
_WORTH_LOOKING = 1 << 29
_WORTH_LOOKING_LOCAL = 24 << 20
_WORTH_LOOKING_NODE = 5 << 18
# What the recorded graph shows by itself takes 0.1 ms, and some microseconds for each operation; colors,
# products and their check take a millisecond. (Dense Hessians of Rosenbrock's function pay from n = 350 on.)
_WORTH_READING = 8 << 20
_WORTH_READING_NODE = 1 << 16
# Fewer products than this take no longer than walking over all elements of f for their structure.
_LEAST_PRODUCTS = 8


def is_worth_looking(products: int, cost: RowCost, roots: Sequence[Tensor]) -> bool:
    """Whether to look for structure by running ``f``; ``products``: how many the dense way takes."""
    if products < _LEAST_PRODUCTS:
        return False
    nbytes = products * cost.nbytes
    if nbytes >= _WORTH_LOOKING or nbytes < _WORTH_LOOKING_LOCAL + cost.nodes * _WORTH_LOOKING_NODE:
        return nbytes >= _WORTH_LOOKING
    return keeps_elements_apart(roots)


def read_stencil(lin: Linearization, cost: RowCost, products: int) -> list[Pattern] | None:
    """The structure of a stencil, as the recorded graph alone shows it."""
    if len(lin.inputs) > 1 or products < _LEAST_PRODUCTS:
        return None
    if products * cost.nbytes < _WORTH_READING + cost.nodes * _WORTH_READING_NODE or not is_plain(lin):
        return None
    found = stencil(lin.roots[0], lin.inputs[0])
    return None if found is None else [found]


def has_batch_axis(lin: Linearization, cost: RowCost) -> bool:
    """Whether the graph alone shows a block-diagonal structure, which the dense way makes use of."""
    return all(find_layout(lin.roots[0], x, cost) is not None for x in lin.inputs)
