"""Blocks of a Hessian from products that check each other, because a Hessian is symmetric.

In a block diagonal Hessian with ``k`` columns per block, ``k`` products suffice: each with one column of
every block. Here the column and its weight are drawn at random for each block. Where the structure is right,
``H[a, b]`` from the product with column ``b`` is ``H[b, a]`` from the one with column ``a``. If blocks
depended on each other after all, the products would contain random sums of other blocks' columns, which
breaks the symmetry. (Two blocks that depend on each other don't show it with a probability of 0.6 at most, as
they hide it in the diagonal or have weights in the same ratio; ``m`` such pairs with 0.6 to the ``m``.)

So small blocks need no further product to check them, which would be a third one for two coordinates. The
weights are powers of two, which change no digit of a result. Knows products and layouts; it must not know
what is being differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _products
from ._block_layout import Blocks, Layout, by_block, in_shape_of_x
from ._cached_draws import MOST_KEPT, generator_for, kept
from ._certificate import Comparison, all_finite, precision, slack
from ._cost_model import RowCost
from ._engine import Linearization
from ._pulling import Options
from ._repetition import Repetition
from ._separable import warn_mismatch
from .native.mirrored import mirrored_blocks, read_blocks

__all__ = ["SymmetricBlocks", "can_check_themselves", "symmetric_blocks"]

# With more columns, one more product costs little, and is seen by every entry.
_COLUMNS = range(2, 5)
_LEAST_BLOCKS = 128
_WEIGHTS = 4  # 1, 1/2, 1/4, 1/8
_BYTES_TO_DRAW = 250  # that are moved for each element


class _Draw(NamedTuple):
    """Which product has which column of each block: ``(c + shifts[b]) % k`` of block ``b`` product ``c``.

    ``seeds[c]``: the cotangents of product ``c``, one per input; an element of block ``b`` is ``0`` or
    ``1 / scales[c, b]``. ``widths``: columns of a block by each input; ``in_order``: whether its batch axes
    come first.
    """

    seeds: list[list[Tensor]]
    shifts: Tensor
    scales: Tensor
    widths: list[int]
    in_order: list[bool]


class SymmetricBlocks(NamedTuple):
    """The blocks of a Hessian by several inputs, together; ``diagonals`` by each input, in its shape."""

    draw: _Draw
    layouts: tuple[Layout, ...]
    products: list[Tensor]
    diagonals: list[Tensor]

    def entries(self) -> Tensor:
        """All of them, shape (blocks, k, k)."""
        return read_blocks(self.products, self.draw.shifts, self.draw.scales, self.draw.widths)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix by the only input."""
        n = self.diagonals[0].numel()
        return Blocks(self.layouts[0], self.entries()).dense(n, n, dtype)


def can_check_themselves(
    lin: Linearization, layouts: Sequence[Layout], cost: RowCost, coarsest: float
) -> bool:
    """Whether there are few columns and many blocks, in one precision that tells rounding from structure.

    ``layouts[i]`` pairs the axes of the gradient ``lin.roots[i]`` with those of ``lin.inputs[i]``. ``cost``:
    about what a product takes; a cheap one takes less time than to draw for as many elements. ``coarsest``:
    spacing of the coarsest numbers that were recorded.
    """
    first = lin.inputs[0]
    elements = 0  # loops, not generators: a small network waits for each of them
    for x in lin.inputs:
        elements += x.numel()
    if elements > MOST_KEPT and cost.nbytes < _BYTES_TO_DRAW * elements:
        return False
    blocks = math.prod(layouts[0].x_shape[q] for _, q in layouts[0].pairs)
    if elements // blocks not in _COLUMNS or blocks < _LEAST_BLOCKS:
        return False
    for x in (*lin.inputs, *lin.roots):
        if x.dtype != first.dtype or x.device != first.device:
            return False
    return precision([first], lin.roots[0], coarsest) < 1e-5


def symmetric_blocks(
    lin: Linearization, layouts: Sequence[Layout], options: Options
) -> SymmetricBlocks | None:
    """The blocks of the Hessian whose gradients are ``lin.roots``; ``None`` if they aren't symmetric.

    ``layouts`` as above, the same batch axes for all. Nothing may bend the pullbacks, as hooks do: they must
    be linear.
    """
    layouts = tuple(layouts)
    draw = _draw(lin.inputs, layouts)
    eps = torch.finfo(lin.inputs[0].dtype).eps  # `can_check_themselves` has seen that nothing is coarser
    of_terms, _ = slack(eps)

    def blocks(seeds: Sequence[Sequence[Tensor]], options: Options) -> tuple[SymmetricBlocks, Tensor]:
        products: list[Tensor] = []
        for found in _products.pulls(lin, seeds, create_graph=options.keep, progress=options.progress):
            for x, g, layout, simple in zip(lin.inputs, found, layouts, draw.in_order, strict=True):
                product = x.new_zeros(x.shape) if g is None else g
                products.append(product if simple else by_block(layout, product.unsqueeze(0))[0])
        flat, agree = mirrored_blocks(products, draw.shifts, draw.scales, draw.widths, of_terms)
        diagonals = [
            h if len(layout.x_shape) == 1 else _shaped(layout, h, simple)
            for h, layout, simple in zip(flat, layouts, draw.in_order, strict=True)
        ]
        return SymmetricBlocks(draw, layouts, products, diagonals), agree

    def again(factor: Tensor) -> list[Tensor]:
        repeated, _ = blocks([[seed * factor for seed in seeds] for seeds in draw.seeds], options.once)
        entries = repeated.entries()
        return [_above(entries) - _above(entries.mT)]

    first, agree = blocks(draw.seeds, options)
    return first if bool(agree) or _is_symmetric(lin, first, again, eps) else None


def _shaped(layout: Layout, diagonal: Tensor, in_order: bool) -> Tensor:
    """By block, flat, as in ``x``."""
    if in_order:
        return diagonal.view(layout.x_shape)
    return in_shape_of_x(layout, diagonal.view(-1, layout.block_columns))


def _draw(inputs: Sequence[Tensor], layouts: tuple[Layout, ...]) -> _Draw:
    like = inputs[0]
    keeps = like.device.type == "cpu" and sum(x.numel() for x in inputs) <= MOST_KEPT
    return (_kept_draw if keeps else _new_draw)(layouts, like.dtype, like.device)


def _new_draw(layouts: tuple[Layout, ...], dtype: torch.dtype, device: torch.device) -> _Draw:
    widths = [layout.block_columns for layout in layouts]
    blocks, k = math.prod(layouts[0].x_shape[q] for _, q in layouts[0].pairs), sum(widths)

    def by_element(table: Tensor) -> list[Tensor]:
        parts = torch.split(table, widths, 1)
        return [in_shape_of_x(layout, part) for layout, part in zip(layouts, parts, strict=True)]

    generator = generator_for(blocks)  # bytes, as they may have to be copied to a device
    drawn = torch.randint(k * _WEIGHTS, (k, blocks), generator=generator, dtype=torch.uint8, device="cpu")
    drawn = drawn.to(device)
    shifts = drawn[0] // _WEIGHTS
    product_of = (torch.arange(k, device=device) - shifts.unsqueeze(1)) % k  # that with this column
    scales = torch.exp2((drawn % _WEIGHTS).to(dtype))
    seeds = [by_element(torch.where(product_of == c, 1 / scales[c].unsqueeze(1), 0.0)) for c in range(k)]
    in_order = [layout.x_order == sorted(layout.x_order) for layout in layouts]
    return _Draw(seeds, shifts, scales, widths, in_order)


_kept_draw = kept(_new_draw)


def _above(entries: Tensor) -> Tensor:
    """What is above the diagonals, flat."""
    first, second = torch.triu_indices(entries.shape[1], entries.shape[1], 1, device=entries.device)
    return entries[:, first, second].reshape(-1)


def _is_symmetric(
    lin: Linearization, blocks: SymmetricBlocks, again: Callable[..., list[Tensor]], eps: float
) -> bool:
    """Whether each block is its transpose up to rounding; ``False`` where zeros outside might be wrong.

    ``again``: the differences across the diagonals from a multiple of all seeds.
    """
    entries = blocks.entries().detach()
    if not all_finite(entries):
        return False
    above, below = _above(entries), _above(entries.mT)
    # An entry may be what is left of terms as large as those beside it.
    sizes = entries.diagonal(dim1=1, dim2=2).abs()
    scale = above.abs() + below.abs() + _above(sizes.unsqueeze(1) + sizes.unsqueeze(2))
    compared = Comparison(above, scale, below, eps, beside=entries.reshape(-1).abs())
    # The seeds are parts already: there is one for each column.
    Repetition(torch.ones_like(scale[:1]), lambda: (), [above - below], again).refute([compared])
    if bool(compared.fine.all()):
        return True
    warn_mismatch(lin)
    return False
