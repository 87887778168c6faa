"""Diagonals of Hessians by inputs that enter through affine maps, as the weights of linear layers do.

An input may be one matrix, or a vector of all weights that ``f`` cuts into pieces. What goes other ways is
taken row by row where these are few, or apart where it is only added, as a penalty on the weights is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cost_model
from ._affine_check import numel_of
from ._affine_products import diagonals, matrix
from ._block_layout import Blocks
from ._engine import Linearization
from ._numbers import show_numbers
from ._other_ways import suppressed
from ._pulling import Options, pulled_rows
from ._recorded.affine import Entrance
from ._second_order import SecondOrder
from ._separable import LEAST_ROWS, LEAST_SAVING, block_products, find_hessian_layouts
from ._torch_private import leads_to, pulled_through, value_of_node

__all__ = ["add_diagonals", "hessian"]


def add_diagonals(second: SecondOrder, options: Options, found: list[Tensor | None]) -> None:
    """Write diagonals into ``found`` where ``None`` stands and affine maps give them."""
    inputs = second.prepared.inputs
    if not show_numbers(inputs):
        return
    missing = [i for i, h in enumerate(found) if h is None and second.by_input(i) is not None]
    rows = sum(inputs[i].numel() for i in missing)
    if rows < LEAST_ROWS:
        return
    if rows * second.row_guess().nbytes < _cost_model.LEAST_BYTES and not second.multiplies_much(rows):
        return
    maps, entering = second.entrances(missing)
    sums = {i: one for i, entrance in entering.items() if (one := _begun(second, i, entrance)) is not None}
    added = {i: one.added for i, one in sums.items() if one.added is not None}
    maps = [m._replace(terms=[t for t in m.terms if t.which in sums]) for m in maps]
    maps = [m for m in maps if m.terms]
    if max((sum(map(numel_of, m.terms)) for m in maps), default=0) < LEAST_ROWS:
        return
    for affine, gradient in zip(maps, second.gradient_inside([m.z for m in maps]), strict=True):
        parts = diagonals(second, affine, gradient, added, options)
        for k, term in enumerate(affine.terms):
            one = sums[term.which]
            if parts is None:
                one.by_rows |= term.restored(one.x.new_ones(term.shape)) != 0
            else:
                one.total = parts[k] if one.total is None else one.total + parts[k]
    for i, one in sums.items():
        found[i] = _finished(second, i, one, options)


def hessian(second: SecondOrder, mode: str, options: Options) -> Tensor | None:
    """The Hessian by the only input, if it isn't small, where an affine map gives it; ``None`` elsewhere."""
    x = second.prepared.inputs[0]
    n = x.numel()
    if not show_numbers([x]) or mode == "forward_over_reverse" or second.is_constant:
        return None
    if x.dim() == 0 or n < LEAST_ROWS:
        return None
    with suppressed():  # an operation may lack a second backward; forward mode is next
        second.differentiate()
    if second.by_input(0) is None:
        return None
    maps, entering = second.entrances([0])
    if [[numel_of(term) for term in m.terms] for m in maps] != [[n]]:
        return None
    one = _begun(second, 0, entering[0])
    if one is None or bool(one.by_rows.any()):
        return None
    (gradient,) = second.gradient_inside([maps[0].z])
    if gradient is None or not gradient.requires_grad:
        return None
    added = {} if one.added is None else {0: one.added}
    found = matrix(second, maps[0], gradient, added, options)
    if found is None or one.added is None:
        return found
    blocks = _blocks(second, one.added, options)
    return None if blocks is None else found + blocks.dense(n, n, x.dtype)


class _Sum:
    """The diagonal by one input, as far as it is known.

    ``by_rows``: elements whose rows are going to be asked for. ``added``: the gradient of what is only added
    to all that comes of the affine maps, where an element goes both ways.
    """

    __slots__ = ("added", "by_rows", "total", "x")

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.total: Tensor | None = None
        self.by_rows = torch.zeros_like(x, dtype=torch.bool)
        self.added: Linearization | None = None


def _begun(second: SecondOrder, i: int, entrance: Entrance) -> _Sum | None:
    """``None`` where an element goes two ways that meet."""
    one = _Sum(second.prepared.inputs[i].detach())
    if len(entrance.terms) == 1 and not entrance.others:
        return one
    by_terms = torch.zeros_like(one.x, dtype=torch.int32)
    for term in entrance.terms:
        by_terms += term.restored(one.x.new_ones(term.shape)) != 0
    elsewhere = torch.zeros_like(one.by_rows)
    for other in entrance.others:
        elsewhere |= other.covers(one.x)
    if bool((by_terms > 1).any()):
        return None
    if not bool((elsewhere & (by_terms > 0)).any()):
        one.by_rows |= elsewhere
        return one
    gradient = _gradient_elsewhere(second, entrance)
    if gradient is None:
        return None
    if gradient.requires_grad:
        one.added = second.derived(gradient, second.tracked(i))
    return one


def _gradient_elsewhere(second: SecondOrder, entrance: Entrance) -> Tensor | None:
    """The gradient by an input along the other ways alone, recorded; ``None`` unless it is only added."""
    if not all(other.is_simple for other in entrance.others):
        return None
    others = [value_of_node(other.node, 0) for other in entrance.others]
    for term in entrance.terms:
        beside = [v for v in term.node.next_functions if v[0] is not None and v != term.entered]
        if any(leads_to(node, others) for node, _ in beside):
            return None
    total = torch.zeros_like(second.tracked(entrance.terms[0].which)).detach()
    with torch.enable_grad():
        for other, g in zip(entrance.others, second.gradient_inside(others), strict=True):
            piece = None if g is None else pulled_through(other.node, other.position, g, other.way.shape)
            total = total if piece is None else total + other.way.back(piece.to(total.dtype))
    entered = [value_of_node(term.node, 0) for term in entrance.terms]
    if total.grad_fn is not None and leads_to(total.grad_fn, entered):
        return None
    return total


def _finished(second: SecondOrder, i: int, one: _Sum, options: Options) -> Tensor | None:
    """The whole diagonal; ``None`` where the dense way is no longer, or a check fails."""
    elements = one.by_rows.reshape(-1).nonzero()[:, 0]
    if one.total is None or LEAST_SAVING * elements.numel() > one.x.numel():
        return None
    total = one.total
    if one.added is not None:
        added = _blocks(second, one.added, options)
        if added is None:
            return None
        total = total + added.diagonal()
    if elements.numel() > 0:
        rows = _rows(second, i, elements, options)
        total = total.reshape(-1).index_put((elements,), rows).view(one.x.shape)
    return total.to(one.x.dtype).contiguous()


def _blocks(second: SecondOrder, lin: Linearization, options: Options) -> Blocks | None:
    """The Hessian of what is only added, where it is block diagonal."""
    cost = second.row_cost()
    layouts = find_hessian_layouts(lin, cost)
    if layouts is None:
        return None
    found = block_products(lin, layouts, cost, options)
    return None if found is None else found[0][0]


def _rows(second: SecondOrder, i: int, elements: Tensor, options: Options) -> Tensor:
    """The diagonal at some elements of an input, from one product each."""
    lin = second.by_input(i)
    assert lin is not None
    root, total = lin.roots[0], elements.numel()
    cost = second.row_cost()

    def seeds(lo: int, hi: int) -> Tensor:
        rows = torch.zeros(hi - lo, root.numel(), dtype=root.dtype, device=root.device)
        return rows.scatter_(1, elements[lo:hi].unsqueeze(1), 1.0)

    parts: list[Tensor] = []
    for lo, hi, (product,) in pulled_rows(lin, seeds, total, cost, options):
        if product is None:
            parts.append(root.new_zeros(hi - lo))
        else:
            parts.append(product.reshape(hi - lo, -1).gather(1, elements[lo:hi].unsqueeze(1))[:, 0])
    return torch.cat(parts)
