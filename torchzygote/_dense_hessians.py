"""Dense Hessians and their diagonals: the recorded gradient pulled back, or the gradient pushed forward.

Multiplies with ``_products``, puts together with ``_assembly``; it must not know of arguments or sparsity.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _engine, _products, _separable, _state, native
from ._arguments import Prepared
from ._assembly import Columns, Rows, add_rows
from ._block_layout import Layout
from ._certificate import precision
from ._cost_model import FREE, RowCost
from ._curvature import summed
from ._curvature.directions import directions
from ._curvature.steps import steps_to
from ._curvature.summed import Curvature
from ._engine import Linearization
from ._numbers import show_numbers
from ._other_ways import another_may_do
from ._pulling import Options, chunk_for, pulled_rows
from ._random import RandomState, restored_after
from ._second_order import SecondOrder, Seen, gradient_by
from ._symmetric_blocks import can_check_themselves, symmetric_blocks

__all__ = [
    "Whole",
    "diagonal",
    "diagonals_along_batch",
    "diagonals_by_curvature",
    "matrix",
    "pushed",
]

_log = logging.getLogger("torchzygote")

# In half precision, squares of tangents get too small.
_ROUGH = 1e-4
# So many columns are pushed before anybody knows what f takes.
_UNMEASURED = 16
# Recorded, batched and pushed anew in each chunk, an operation takes so many times what it takes in a
# pullback. (Rosenbrock, n = 1000: 37 ms in chunks of 96, 20 of 256, 16 of 512 and of 1000.)
_ANEW = 8
# A walk along the gradient's graph takes as long as moving so many bytes for each operation.
_LOOK = 160_000


class Whole(NamedTuple):
    """Value, gradient and Hessian; ``None`` for a gradient that is zero."""

    value: Any
    gradient: Tensor | None
    matrix: Tensor


def pushed(
    caller: str, f: Callable[..., Any], prepared: Prepared, options: Options, random: RandomState | None
) -> Whole | None:
    """Forward over reverse, with value and gradient from the first chunk's run of ``f``.

    ``None`` where ``f`` has to be measured first, as all columns at once may not fit, or are so many that
    structure may pay.
    """
    x = prepared.inputs[0]
    n, compiling = x.numel(), _engine.compiling()
    if n == 0 or (n > _UNMEASURED and not compiling):
        return None
    chunk = n if compiling else options.chunk_size or n  # a traced program can't draw the same in each
    seen = Seen(n if options.chunk_size is None and n > 1 and not compiling else 0)
    source = _engine.separate(x if options.keep else x.detach())
    block = Columns(n, x, x.dtype, options.keep)
    seeds = _products.identity_seeds(n, x.dtype, x.device)
    values: list[Tensor] = []
    with _engine.recording_if(options.keep):
        position = _state.mark()
        for lo, hi, products in _products.jvps(
            gradient_by(f, caller, prepared, 0, seen),
            [source],
            0,
            seeds,
            n,
            chunk,
            keep=options.keep,
            random=random,
            progress=options.progress,
            values=values,
        ):
            if seen.stopped:
                _state.forget_since(position)
                if random is not None:
                    random.restore()
                return None
            block.add(lo, hi, products if options.keep else products.detach())
        gradient, value = values[0], values[1] if len(values) > 1 else seen.value
    if not options.keep:
        gradient, value = gradient.detach(), _engine.detached(value)
    return Whole(value, gradient, block.matrix())


def matrix(
    f: Callable[..., Any], second: SecondOrder, mode: str, options: Options, random: RandomState | None
) -> Tensor:
    if second.is_constant:
        return _zeros(second, options)
    if mode == "forward_over_reverse":
        second.take_gradient()
        return _by_columns(f, second, options, random, own_draw=random is not None and random.has_moved())
    failed: Exception | None = None
    # Whatever one row takes: pushed, it takes more, and counts what is computed under no_grad.
    try:
        second.differentiate()
        lin = second.by_input(0)
        if lin is None:  # linear: the gradient depends on nothing
            return _zeros(second, options)
        cost = FREE if _engine.compiling() else second.row_cost()
        return _by_rows(second, lin, options, cost)
    except Exception as error:  # an operation without a second backward may have a forward derivative
        if mode == "reverse_over_reverse" or not another_may_do(error):
            raise
        failed = error
    try:
        second.take_gradient()
        return _by_columns(f, second, options, random)
    except Exception as error:
        if not another_may_do(error):
            raise
        raise failed from None
    finally:
        failed = None  # whose traceback holds this frame


def _zeros(second: SecondOrder, options: Options) -> Tensor:
    x = second.prepared.inputs[0]
    return Rows(x.numel(), x, x.dtype, options.keep).matrix()


def _pulled_rows(lin: Linearization, cost: RowCost, options: Options) -> Iterator[_products.Chunk]:
    """The rows of a Hessian, a chunk at a time."""
    root = lin.roots[0]
    seeds = _products.identity_seeds(root.numel(), root.dtype, root.device)
    return pulled_rows(lin, seeds, root.numel(), cost, options)


def _by_rows(second: SecondOrder, lin: Linearization, options: Options, cost: RowCost) -> Tensor:
    """Reverse over reverse: the recorded gradient is pulled back."""
    x = second.prepared.inputs[0]
    n = x.numel()
    worth = n * cost.nbytes >= cost.nodes * _LOOK
    layouts = _separable.find_hessian_layouts(lin, cost, second.scalar) if worth else None
    if layouts is not None:
        found = _matrix_of_blocks(second, lin, layouts[0][0], options, cost)
        if found is not None:
            return found
    block = Rows(n, x, x.dtype, options.keep)
    for lo, hi, (product,) in _pulled_rows(lin, cost, options):
        add_rows([block], lo, hi, [product])
    return block.matrix()


def _matrix_of_blocks(
    second: SecondOrder, lin: Linearization, layout: Layout, options: Options, cost: RowCost
) -> Tensor | None:
    x = second.prepared.inputs[0]
    if _are_symmetric(second, lin, [layout]):
        both = symmetric_blocks(lin, [layout], options)
        return None if both is None else both.dense(x.dtype)
    found = _separable.block_products(lin, [[layout]], cost, options)
    return None if found is None else found[0][0].dense(x.numel(), x.numel(), x.dtype)


def _are_symmetric(second: SecondOrder, lin: Linearization, layouts: list[Layout]) -> bool:
    """Whether products with the blocks' columns are going to check each other."""
    return second.is_plain() and can_check_themselves(lin, layouts, second.row_guess(), second.coarsest())


def _diagonals_of_blocks(
    second: SecondOrder, lin: Linearization, layouts: list[list[Layout]], options: Options
) -> list[Tensor] | None:
    """The diagonal by each input of ``lin``; ``None`` if the check fails."""
    own = [row[i] for i, row in enumerate(layouts)]
    if _are_symmetric(second, lin, own):
        both = symmetric_blocks(lin, own, options)
        return None if both is None else both.diagonals
    found = _separable.block_products(lin, layouts, second.row_cost(), options)
    return None if found is None else [row[i].diagonal() for i, row in enumerate(found)]


def _by_columns(
    f: Callable[..., Any],
    second: SecondOrder,
    options: Options,
    random: RandomState | None,
    *,
    own_draw: bool = False,
) -> Tensor:
    """Forward over reverse: the gradient is pushed forward, and recorded anew in every chunk.

    ``own_draw``: value and gradient are taken from there, too. In ``torch.func``, some random functions fill
    their masks in another order.
    """
    x = second.prepared.inputs[0]
    n = x.numel()
    source = _engine.separate(x if options.keep else x.detach())

    block = Columns(n, x, x.dtype, options.keep)
    cost = FREE if _engine.compiling() else second.row_cost()
    chunk = chunk_for(options, n, cost._replace(nodes=_ANEW * cost.nodes), x.device)
    seeds = _products.identity_seeds(n, x.dtype, x.device)
    seen = Seen(0) if own_draw else None
    values: list[Tensor] | None = [] if own_draw else None
    gradient = gradient_by(f, second.caller, second.prepared, 0, seen)
    position = _state.mark()
    with restored_after(random):
        for lo, hi, products in _products.jvps(
            gradient,
            [source],
            0,
            seeds,
            n,
            chunk,
            random=random,
            progress=options.progress,
            keep=options.keep,
            values=values,
        ):
            block.add(lo, hi, products if options.keep else products.detach())
    if seen is not None and values:
        _state.forget_since(position)  # hooks report from the first run
        value = values[1] if len(values) > 1 else seen.value
        second.replace_by(values[0], value if options.keep else _engine.detached(value))
    return block.matrix()


def diagonals_by_curvature(second: SecondOrder, options: Options) -> list[Tensor] | None:
    """All diagonals where ``f`` is a sum over samples of all inputs; before the gradient is taken."""
    recorded = second.recorded() if show_numbers(second.prepared.inputs) else None
    if recorded is None:
        return None
    y, inputs = recorded
    cost = second.row_guess()
    found = _separable.find_sum(y, inputs, cost)
    if found is None:
        return None
    eps = precision(inputs, y, second.rounded())  # all steps have the dtype of y
    if eps > _ROUGH:
        return None
    separation, layouts = found
    try:
        steps = steps_to(y, inputs, separation, options.keep)
        if steps is None:
            return None
        along = directions(layouts, y.dtype, y.device)
        chunk = chunk_for(options, along.total, cost, y.device)
        way = Curvature(y, inputs, steps, along, eps, options.keep)
        return summed.diagonals(way, chunk=chunk, progress=options.progress)
    except Exception as error:  # a form of an operation that its rule doesn't know; something written over
        if not another_may_do(error):
            raise
        _log.debug("curvature: %s: %s", type(error).__name__, error)
        return None


def diagonals_along_batch(second: SecondOrder, options: Options) -> list[Tensor | None]:
    """The diagonal by each input along whose batch axes ``f`` runs unmixed; ``None`` for the others."""
    inputs = second.prepared.inputs
    found: list[Tensor | None] = [None] * len(inputs)
    if not show_numbers(inputs):
        return found
    guess = second.row_guess()

    def add(which: list[int]) -> bool:
        lin = second.by_inputs(which)
        layouts = _separable.find_hessian_layouts(lin, guess, second.scalar)
        if layouts is not None:
            diagonals = _diagonals_of_blocks(second, lin, layouts, options)
            for i, h in zip(which, diagonals or [], strict=False):
                found[i] = h.to(inputs[i].dtype)
        return layouts is not None

    for group in _alike(second.gradients()):
        if not add(group) and len(group) > 1:
            for i in group:
                add([i])
    return found


def _alike(gradients: dict[int, Tensor]) -> list[list[int]]:
    """Inputs grouped by the length of their first axis, which may be a batch axis that they share."""
    groups: dict[tuple[torch.Size, torch.device], list[int]] = {}
    for i, grad in gradients.items():
        groups.setdefault((grad.shape[:1], grad.device), []).append(i)
    return list(groups.values())


def diagonal(second: SecondOrder, i: int, options: Options) -> Tensor:
    """The diagonal by input ``i``, gathered from each chunk of Hessian rows."""
    x = second.prepared.inputs[i]
    lin = second.by_input(i)
    n = x.numel()
    if lin is None or n == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    cost = FREE if _engine.compiling() else second.row_cost()
    chunk = chunk_for(options, n, cost, x.device)
    parts: list[Tensor] = []
    # Not a list of parts: small pieces of memory, kept from chunk to chunk, would lie where the next chunk's
    # large ones must go, and the heap would grow by half a chunk each time.
    # (Under vmap, it would have no room for the examples.)
    joined = options.keep or _engine.in_transform() or chunk >= n
    whole = None if joined else torch.zeros(n, dtype=x.dtype, device=x.device)
    for lo, hi, (product,) in _pulled_rows(lin, cost, options._replace(chunk_size=chunk)):
        if whole is not None:
            if product is not None:
                whole[lo:hi].copy_(native.gather_diagonal(product.reshape(hi - lo, n), lo))
        elif product is None:
            parts.append(torch.zeros(hi - lo, dtype=x.dtype, device=x.device))
        else:
            parts.append(product.reshape(hi - lo, n).diagonal(lo).clone())  # a view would keep the chunk
    return (torch.cat(parts) if whole is None else whole).reshape(x.shape)
