"""Block-diagonal derivatives: few products where a batch axis runs through unmixed.

If axis ``p`` of ``y`` runs along with axis ``q`` of ``x`` (``_alignment``), the rows of all batch elements
can share their seeds: as many products as one element has rows. Each result is checked against one product
with a random cotangent. Knows products and shapes; it must not know what is being differentiated.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import _engine, _plan, _products
from ._alignment import aligned_axes
from ._engine import Linearization
from ._plan import RowCost
from ._torch_private import node_names

__all__ = ["Blocks", "Layout", "block_products", "find_layout"]

# Below this many rows, or bytes that the dense way moves, it takes no longer than finding out: the walk costs
# 4 microseconds a node, as much as moving some 50 KB.
_LEAST_ROWS = 32
_LEAST_BYTES = 4 << 20
_LEAST_SAVING = 4


class Layout(NamedTuple):
    """Which axes of ``y`` and ``x`` are paired; the others make up one block."""

    y_shape: tuple[int, ...]
    x_shape: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def y_free(self) -> list[int]:
        """Axes of ``y`` within a block."""
        return [p for p in range(len(self.y_shape)) if p not in {p for p, _ in self.pairs}]

    @property
    def x_free(self) -> list[int]:
        """Axes of ``x`` within a block."""
        return [q for q in range(len(self.x_shape)) if q not in {q for _, q in self.pairs}]

    @property
    def block_rows(self) -> int:
        """Rows of one block: products needed."""
        return math.prod(self.y_shape[p] for p in self.y_free)

    @property
    def block_columns(self) -> int:
        """Columns of one block."""
        return math.prod(self.x_shape[q] for q in self.x_free)

    def y_numbers(self, device: torch.device) -> Tensor:
        """Row numbers, shape (blocks, block rows)."""
        order = [p for p, _ in self.pairs] + self.y_free
        numbers = torch.arange(math.prod(self.y_shape), device=device).view(self.y_shape)
        return numbers.permute(order).reshape(-1, self.block_rows)

    def x_numbers(self, device: torch.device) -> Tensor:
        """Column numbers, shape (blocks, block columns)."""
        order = [q for _, q in self.pairs] + self.x_free
        numbers = torch.arange(math.prod(self.x_shape), device=device).view(self.x_shape)
        return numbers.permute(order).reshape(-1, self.block_columns)


def find_layout(root: Tensor, x: Tensor, cost: RowCost, *, same_axes: bool = False) -> Layout | None:
    """The layout of the Jacobian of ``root`` by ``x`` where it pays, ``None`` elsewhere.

    ``cost``: what one row of the Jacobian takes while it is pulled back. ``same_axes``: only axes that
    are paired with themselves count, as the diagonal of a Hessian needs it.
    """
    rows = root.numel()
    if min(rows, x.numel()) < _LEAST_ROWS or rows * cost.nbytes < _LEAST_BYTES:
        return None
    if _engine.compiling() or _engine.in_functorch():
        return None
    pairs = aligned_axes(root, x)
    if not pairs:
        return None
    if same_axes:
        pairs = [(p, q) for p, q in pairs if p == q]
    layout = Layout(tuple(root.shape), tuple(x.shape), tuple(pairs))
    return layout if (layout.block_rows + 1) * _LEAST_SAVING <= rows else None


class Blocks(NamedTuple):
    """``values[b, k, j]``: row ``k``, column ``j`` of block ``b``."""

    layout: Layout
    values: Tensor

    def dense(self, rows: int, columns: int, dtype: torch.dtype, transposed: bool = False) -> Tensor:
        """The whole matrix, or its transpose."""
        values = self.values.to(dtype)
        y_numbers = self.layout.y_numbers(values.device)
        x_numbers = self.layout.x_numbers(values.device)
        row, column = (1, rows) if transposed else (columns, 1)
        places = (y_numbers * row).unsqueeze(2) + (x_numbers * column).unsqueeze(1)
        whole = torch.zeros(rows * columns, dtype=dtype, device=values.device)
        filled = whole.index_put_((places.reshape(-1),), values.reshape(-1))
        return filled.view((columns, rows) if transposed else (rows, columns))

    def diagonal(self) -> Tensor:
        """The diagonal, in the shape of ``x``; only for pairs of equal axes."""
        layout = self.layout
        order = [q for _, q in layout.pairs] + layout.x_free
        back = sorted(range(len(order)), key=order.__getitem__)
        diagonal = self.values.diagonal(dim1=1, dim2=2)
        return diagonal.reshape([layout.x_shape[q] for q in order]).permute(back).contiguous()


def _seeds(layout: Layout, like: Tensor) -> Tensor:
    """A seed per row of a block: ones at that row of every block."""
    k = layout.block_rows
    sizes = [n if p in layout.y_free else 1 for p, n in enumerate(layout.y_shape)]
    rows = torch.eye(k, dtype=like.dtype, device=like.device).view(k, *sizes)
    return rows.expand(k, *layout.y_shape).reshape(k, -1)


def block_products(
    lin: Linearization,
    layout: Layout,
    cost: RowCost,
    *,
    chunk_size: int | None = None,
    create_graph: bool = False,
    progress: bool = False,
) -> Blocks | None:
    """The blocks of the Jacobian of ``lin.roots[0]`` by ``lin.inputs[0]``; ``None`` if the check fails."""
    root = lin.roots[0]
    seeds = _seeds(layout, root)
    chunk = _plan.choose_chunk(chunk_size, seeds.shape[0], cost, root.device)
    products: list[Tensor] = []
    for _, _, (product,) in _products.vjps(
        lin, 0, lambda lo, hi: seeds[lo:hi], len(seeds), chunk, create_graph=create_graph, progress=progress
    ):
        if product is None:
            return None
        products.append(product)
    values = _by_block(layout, products[0] if len(products) == 1 else torch.cat(products))
    check = _random_vector(root)
    (checked,) = lin.pull([check.view(root.shape)], retain=True, create_graph=False)
    if checked is None:
        return None
    weights = check[layout.y_numbers(check.device)]  # (blocks, block rows)
    if not _agrees(values.detach(), _by_block(layout, checked.detach().unsqueeze(0))[0], weights):
        if bool(checked.isfinite().all()):  # a NaN agrees with nothing, which is nobody's fault
            _warn_mismatch(node_names(root))
        return None
    return Blocks(layout, values.transpose(0, 1))


def _by_block(layout: Layout, products: Tensor) -> Tensor:
    """Products of shape (rows, *x's) as (rows, blocks, block columns)."""
    order = [q + 1 for _, q in layout.pairs] + [q + 1 for q in layout.x_free]
    return products.permute(0, *order).reshape(len(products), -1, layout.block_columns)


def _random_vector(like: Tensor) -> Tensor:
    """Numbers between 1/2 and 3/2 with random signs; the global random state is left alone."""
    generator = torch.Generator().manual_seed(0x5EED)
    sizes, signs = torch.rand(2, like.numel(), generator=generator).unbind()
    return ((sizes + 0.5) * torch.where(signs < 0.5, -1.0, 1.0)).to(dtype=like.dtype, device=like.device)


def _agrees(values: Tensor, checked: Tensor, weights: Tensor) -> bool:
    """Whether the blocks explain the product with the random cotangent, but for rounding."""
    terms = values * weights.t().unsqueeze(2)
    size = terms.abs().sum(0)
    eps = torch.finfo(size.dtype).eps
    allowed = 4 * eps**0.5 * size + 64 * eps * size.max()
    return bool(((terms.sum(0) - checked).abs() <= allowed).all())


def _warn_mismatch(operations: list[str]) -> None:
    warnings.warn(
        "a batch axis seemed to run through f unmixed, which a product with a random vector contradicts, so "
        "that the derivative is computed the dense way. Either a hook on a tensor changes the derivative, or "
        "torchzygote's rule for an operation is wrong: please report that, with the operations of f: "
        f"{', '.join(operations)}",
        stacklevel=2,
    )
