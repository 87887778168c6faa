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

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import _products
from ._certificate import Comparison, all_finite, precision, slack
from ._engine import Linearization
from ._plan import RowCost
from ._repetition import Repetition
from ._separable import Layout, in_shape_of_x, warn_mismatch
from ._torch_private import in_plain_eager
from .native.mirrored import mirrored_entries

__all__ = ["SymmetricBlocks", "can_check_themselves", "symmetric_blocks"]

# With more columns, one more product costs little, and is seen by every entry.
_COLUMNS = range(2, 5)
_LEAST_BLOCKS = 128
_WEIGHTS = 4  # 1, 1/2, 1/4, 1/8
_MOST_KEPT = 1 << 16  # elements
_BYTES_TO_DRAW = 250  # that are moved for each element


class _Draw(NamedTuple):
    """Which product has which column of each block. The elements of all inputs are numbered through.

    ``seeds[c]``: the cotangents of product ``c``, one per input. ``places``: where each entry of the blocks
    is in all products, one behind the other, and ``scales`` what it has to be multiplied with; first the
    diagonal, by one input after the other, then what is above the diagonals of the blocks and, in the same
    order, below. ``rows`` and ``columns``: where the entries above are.
    """

    seeds: list[list[Tensor]]
    places: Tensor
    scales: Tensor
    rows: Tensor
    columns: Tensor


class SymmetricBlocks(NamedTuple):
    """The blocks of a Hessian by several inputs, together.

    ``diagonals`` by each input, in its shape, and the entries ``above`` and ``below`` them in the order of
    the draw.
    """

    draw: _Draw
    diagonals: list[Tensor]
    above: Tensor
    below: Tensor

    def diagonal(self) -> Tensor:
        """By one input after the other."""
        return torch.cat([part.reshape(-1) for part in self.diagonals])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix."""
        diagonal = self.diagonal()
        n = diagonal.numel()
        rows, columns = self.draw.rows.long(), self.draw.columns.long()
        on_it = torch.arange(0, n * n, n + 1, device=rows.device)
        whole = torch.zeros(n * n, dtype=dtype, device=rows.device)
        places = torch.cat([on_it, rows * n + columns, columns * n + rows])
        entries = torch.cat([diagonal, self.above, self.below])
        return whole.index_put_((places,), entries.to(dtype)).view(n, n)


def can_check_themselves(
    lin: Linearization, layouts: Sequence[Layout], cost: RowCost, coarsest: float
) -> bool:
    """Whether there are few columns and many blocks, in one precision that tells rounding from structure.

    ``layouts[i]`` pairs the axes of the gradient ``lin.roots[i]`` with those of ``lin.inputs[i]``. ``cost``:
    about what a product takes; a cheap one takes less time than to draw for as many elements. ``coarsest``:
    spacing of the coarsest numbers that were recorded.
    """
    first = lin.inputs[0]
    elements = sum(x.numel() for x in lin.inputs)
    blocks = math.prod(layouts[0].x_shape[q] for _, q in layouts[0].pairs)
    return (
        (elements <= _MOST_KEPT or cost.nbytes >= _BYTES_TO_DRAW * elements)
        and elements // blocks in _COLUMNS
        and blocks >= _LEAST_BLOCKS
        and precision([first], lin.roots[0], coarsest) < 1e-5
        and all(x.dtype == first.dtype and x.device == first.device for x in (*lin.inputs, *lin.roots))
    )


def symmetric_blocks(
    lin: Linearization, layouts: Sequence[Layout], *, create_graph: bool = False, progress: bool = False
) -> SymmetricBlocks | None:
    """The blocks of the Hessian whose gradients are ``lin.roots``; ``None`` if they aren't symmetric.

    ``layouts`` as above, the same batch axes for all. Nothing may bend the pullbacks, as hooks do: they must
    be linear.
    """
    draw = _draw(lin.inputs, tuple(layouts))
    widths = [x.numel() for x in lin.inputs]
    eps = torch.finfo(lin.inputs[0].dtype).eps  # `can_check_themselves` has seen that nothing is coarser
    of_terms, _ = slack(eps)

    def blocks(seeds: Sequence[Sequence[Tensor]], options: dict[str, bool]) -> tuple[SymmetricBlocks, Tensor]:
        products: list[Tensor] = []
        for found in _products.pulls(lin, seeds, **options):
            for x, g in zip(lin.inputs, found, strict=True):
                products.append(x.new_zeros(x.shape) if g is None else g)
        parts, agree = mirrored_entries(
            products, draw.places, draw.scales, draw.rows, draw.columns, widths, of_terms
        )
        *diagonals, above, below = parts
        shaped = [h if x.dim() == 1 else h.view(x.shape) for h, x in zip(diagonals, lin.inputs, strict=True)]
        return SymmetricBlocks(draw, shaped, above, below), agree

    def again(factor: Tensor) -> list[Tensor]:
        repeated, _ = blocks([[seed * factor for seed in seeds] for seeds in draw.seeds], {})
        return [repeated.above - repeated.below]

    first, agree = blocks(draw.seeds, {"create_graph": create_graph, "progress": progress})
    return first if bool(agree) or _is_symmetric(lin, first, again, eps) else None


def _draw(inputs: Sequence[Tensor], layouts: tuple[Layout, ...]) -> _Draw:
    like = inputs[0]
    few = sum(x.numel() for x in inputs) <= _MOST_KEPT
    plain = like.device.type == "cpu" and in_plain_eager() and not torch.is_inference_mode_enabled()
    return (_kept if few and plain else _new_draw)(layouts, like.dtype, like.device)


def _new_draw(layouts: tuple[Layout, ...], dtype: torch.dtype, device: torch.device) -> _Draw:
    widths = [layout.block_columns for layout in layouts]
    numbers: list[Tensor] = []
    total = 0
    for layout in layouts:
        mine = layout.x_numbers(device)
        numbers.append(mine + total)
        total += mine.numel()
    elements = torch.cat(numbers, 1)  # (blocks, k)
    blocks, k = elements.shape

    def by_element(table: Tensor) -> list[Tensor]:
        parts = torch.split(table, widths, 1)
        return [in_shape_of_x(layout, part) for layout, part in zip(layouts, parts, strict=True)]

    # On the CPU, so that a device draws the same; bytes, as they may have to be copied.
    generator = torch.Generator("cpu").manual_seed(20_240_229 + blocks)
    drawn = torch.randint(k * _WEIGHTS, (k, blocks), generator=generator, dtype=torch.uint8, device="cpu")
    drawn = drawn.to(device)
    columns = torch.arange(k, device=device)
    product_of = (columns - (drawn[0] // _WEIGHTS).unsqueeze(1)) % k  # that with this column of this block
    scales = torch.exp2((drawn % _WEIGHTS).to(dtype))
    first, second = torch.triu_indices(k, k, 1, device=device)
    places = product_of * total + elements
    by_place = [h.reshape(-1) for scale in scales for h in by_element(scale.unsqueeze(1).expand(-1, k))]
    order = torch.cat(
        [
            *(h.reshape(-1) for h in by_element(places)),
            (product_of[:, first] * total + elements[:, second]).view(-1),
            (product_of[:, second] * total + elements[:, first]).view(-1),
        ]
    )
    index = torch.int32 if k * total < 1 << 31 else torch.int64  # half of what has to be read
    return _Draw(
        [by_element(torch.where(product_of == c, 1 / scales[c].unsqueeze(1), 0.0)) for c in range(k)],
        order.to(index),
        torch.cat(by_place)[order],
        elements[:, first].reshape(-1).to(index),
        elements[:, second].reshape(-1).to(index),
    )


# A loop asks for the same one in every call.
_kept = functools.lru_cache(maxsize=8)(_new_draw)


def _is_symmetric(
    lin: Linearization, blocks: SymmetricBlocks, again: Callable[..., list[Tensor]], eps: float
) -> bool:
    """Whether each block is its transpose up to rounding; ``False`` where zeros outside might be wrong.

    ``again``: the differences across the diagonals from a multiple of all seeds.
    """
    diagonal, above, below = blocks.diagonal().detach(), blocks.above.detach(), blocks.below.detach()
    entries = torch.cat([diagonal, above, below])
    if not all_finite(entries):
        return False
    # An entry may be what is left of terms as large as those beside it.
    sizes = diagonal.abs()
    scale = above.abs() + below.abs() + sizes[blocks.draw.rows] + sizes[blocks.draw.columns]
    compared = Comparison(above, scale, below, eps, beside=entries.abs())
    # The seeds are parts already: there is one for each column.
    Repetition(torch.ones_like(scale[:1]), lambda: (), [above - below], again).refute([compared])
    if bool(compared.fine.all()):
        return True
    warn_mismatch(lin)
    return False
