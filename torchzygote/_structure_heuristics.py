"""Whether structure is worth looking for, and what of it the recorded graph shows by itself.

Decides from sizes and recorded operations; it must not know how a matrix is computed.
"""

from __future__ import annotations

from ._cost_model import RowCost
from ._engine import Linearization
from ._recorded.alignment import keeps_elements_apart
from ._recorded.reach import reach
from ._recorded.stencils import stencil
from ._row_cost import is_plain
from ._separable import find_layout
from ._structure import within_budget
from .sparsity.pattern import Pattern

__all__ = ["has_batch_axis", "looking_limit", "read_stencil"]

# Bytes that the dense products must move before anybody looks for structure: a core moves some 4 GB a second,
# and detection takes 2 ms and 0.1 ms for each recorded operation. Where every operation keeps elements apart,
# the derivative is sparse nearly always, so that detection need be no more than three times faster.
_WORTH_LOOKING = 1 << 29
_WORTH_LOOKING_LOCAL = 24 << 20
_WORTH_LOOKING_NODE = 5 << 18
# Convolutions of few channels and rows through ``unfold`` take 5 to 20 times as long for each byte.
_SLOW = 8
# Of windows that reach so many times fewer elements than there are products (colors are some more than these
# elements): below, detection and check take what is saved.
_LEAST_GAIN = 6
# What the recorded graph shows by itself takes 0.1 ms, and some microseconds for each operation; colors,
# products and their check take a millisecond. (Dense Hessians of Rosenbrock's function pay from n = 350 on.)
_WORTH_READING = 8 << 20
_WORTH_READING_NODE = 1 << 16
# Fewer products than this take no longer than walking over all elements of f for their structure.
_LEAST_PRODUCTS = 8


def looking_limit(products: int, cost: RowCost, lin: Linearization | None) -> int:
    """How many bytes the dense way moves, or might in its time; 0 where structure isn't worth looking for.

    ``products``: how many it takes. To look runs ``f``.
    """
    nbytes = products * cost.nbytes
    if products < _LEAST_PRODUCTS or lin is None or nbytes >= _WORTH_LOOKING:
        return nbytes if products >= _LEAST_PRODUCTS and nbytes >= _WORTH_LOOKING else 0
    least = _WORTH_LOOKING_LOCAL + cost.nodes * _WORTH_LOOKING_NODE
    if nbytes >= least and keeps_elements_apart(lin.roots):
        return nbytes
    return _limit_of_windows(lin, products, nbytes, least) if nbytes * _SLOW >= least else 0


def _limit_of_windows(lin: Linearization, products: int, nbytes: int, least: int) -> int:
    """The same where windows slide: their reach tells what products are left, and what detection takes."""
    if not is_plain(lin):
        return 0
    elements = members = 0
    is_slow = False
    for root in lin.roots:
        for x in lin.inputs:
            found = reach(root, x)
            if found is None:
                return 0
            elements, members = elements + found.elements, members + found.members
            is_slow |= found.is_slow
    limit = nbytes * _SLOW if is_slow else nbytes
    pays = limit >= least and elements * _LEAST_GAIN <= products
    return limit if pays and within_budget(members, limit) else 0


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
