"""What each native operator computes, in pure PyTorch: specification, test oracle and fallback.

Everything on floating tensors is differentiable by PyTorch itself, in every mode. Shapes, dtypes and ranges
are refused in the words of the native library.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import is_tracing
from ._checks import (
    check_colors,
    check_compress,
    check_index,
    check_matrix,
    check_out,
    check_range,
    check_scatter,
    check_slots,
    scattered_rows,
)

__all__ = [
    "compress",
    "decompress",
    "decompress_dense",
    "gather_diagonal",
    "scatter_rows_",
    "seed_rows",
    "unite_sets",
]


def seed_rows(
    lo: int,
    hi: int,
    numel: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    colors: Tensor | None = None,
) -> Tensor:
    """Rows ``lo`` to ``hi`` of the identity, or of the matrix that marks which column has which color."""
    check_range(lo, hi, None if colors is not None else numel)
    if colors is None:
        if is_tracing():  # torch.func.linearize drops what is written into constants (2.13)
            rows = torch.arange(lo, hi, device=device).unsqueeze(1)
            return (rows == torch.arange(numel, device=device)).to(dtype)
        block = torch.zeros(hi - lo, numel, dtype=dtype, device=device)
        block.diagonal(lo).fill_(1)
        return block
    check_colors(colors, numel)
    wanted = torch.arange(lo, hi, device=device)
    return (colors.to(device).unsqueeze(0) == wanted.unsqueeze(1)).to(dtype)


def scatter_rows_(
    blocks: Sequence[Tensor], products: Sequence[Tensor | None], lo: int, hi: int | None = None
) -> None:
    """``blocks[i][lo:hi] = products[i]``, flattened to rows; zeros for ``None``."""
    rows = scattered_rows(products, lo, hi)
    check_scatter(blocks, products, lo, rows)
    for block, product in zip(blocks, products, strict=True):
        if product is None:
            block[lo : lo + rows].zero_()
        elif rows > 0:
            block[lo : lo + rows].copy_(product.reshape(rows, block.shape[1]))


def gather_diagonal(
    products: Tensor, lo: int, *, out: Tensor | None = None, colors: Tensor | None = None
) -> Tensor:
    """``products[r, lo + r]``, or with colors ``out[i] = products[colors[i] - lo, i]``."""
    rows, columns = check_matrix("products", products)
    if colors is None:
        check_range(lo, lo + rows, columns)
        found = products.diagonal(lo)
        if out is None:
            return found.clone()
        check_out(out, (rows,), products)
        out.copy_(found)
        return out
    if out is None:
        raise ValueError("out: expected a tensor to write to where colors are given, got None")
    if lo < 0:
        raise ValueError(f"lo: expected at least 0, got {lo}")
    check_out(out, (columns,), products)
    check_colors(colors, columns)
    if rows > 0:
        position = colors.to(torch.int64) - lo
        read = products[position.clamp(0, rows - 1), torch.arange(columns, device=products.device)]
        out.copy_(torch.where((position >= 0) & (position < rows), read, out))
    return out


def _read(products: Tensor, lo: int, slot_row: Tensor, slot_column: Tensor, otherwise: Tensor) -> Tensor:
    """The slots in these rows of products; ``otherwise`` for the others."""
    rows = products.shape[0]
    position = slot_row.to(torch.int64) - lo
    inside = (position >= 0) & (position < rows)
    column = torch.where(inside, slot_column.to(torch.int64), 0)
    return torch.where(inside, products[position.clamp(0, rows - 1), column], otherwise)


def decompress(products: Tensor, lo: int, slot_row: Tensor, slot_column: Tensor, out: Tensor) -> None:
    """``out[e] = products[slot_row[e] - lo, slot_column[e]]`` wherever that row is in this chunk."""
    check_slots(products, lo, slot_row, slot_column)
    check_out(out, tuple(slot_row.shape), products)
    if products.shape[0] > 0 and out.numel() > 0:
        out.copy_(_read(products, lo, slot_row, slot_column, out))


def decompress_dense(
    products: Tensor,
    lo: int,
    slot_row: Tensor,
    slot_column: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
) -> None:
    """``out[rows[e], columns[e]] = products[slot_row[e] - lo, slot_column[e]]`` likewise."""
    check_slots(products, lo, slot_row, slot_column)
    height, width = check_matrix("out", out)
    check_out(out, (height, width), products)
    check_index("rows", rows, slot_row, height)
    check_index("columns", columns, slot_row, width)
    if products.shape[0] > 0 and rows.numel() > 0:
        where = (rows.to(torch.int64), columns.to(torch.int64))
        out.index_put_(where, _read(products, lo, slot_row, slot_column, out[where]))


def compress(matrix: Tensor, colors: Tensor, ncolors: int, *, by: str = "columns") -> Tensor:
    """Colored products of a known matrix: sums of the columns (or rows) of each color, one color a row."""
    summed, kept = check_compress(matrix, colors, ncolors, by)
    height = matrix.shape[0]
    check_colors(colors, summed, below=ncolors)
    colors = colors.to(torch.int64)
    if ncolors == 0:
        return torch.zeros(0, kept, dtype=matrix.dtype, device=matrix.device)
    used = colors >= 0
    colors = colors.clamp(min=0)
    if matrix.layout == torch.strided:
        lines = torch.where(used.unsqueeze(1), matrix.t() if by == "columns" else matrix, 0)
        return matrix.new_zeros(ncolors, kept).index_add(0, colors, lines)
    counts = matrix.crow_indices().diff()
    rows = torch.repeat_interleave(torch.arange(height, device=matrix.device), counts)
    columns = matrix.col_indices().to(torch.int64)
    line, position = (columns, rows) if by == "columns" else (rows, columns)
    values = torch.where(used[line], matrix.values(), 0)
    flat = torch.zeros(ncolors * kept, dtype=matrix.dtype, device=matrix.device)
    return flat.index_add(0, colors[line] * kept + position, values).view(ncolors, kept)


def unite_sets(
    set_ptr: Tensor, set_members: Tensor, group_ptr: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The id of each group's union of sets, and all sets with the new ones appended."""
    starts, members = set_ptr.tolist(), set_members.tolist()
    bounds, ids = group_ptr.tolist(), group_ids.tolist()
    sets = [frozenset(members[a:b]) for a, b in itertools.pairwise(starts)]
    known: dict[frozenset[int], int] = {}
    found: list[int] = []
    for a, b in itertools.pairwise(bounds):
        own = ids[a:b]
        union: frozenset[int] = frozenset().union(*(sets[i] for i in own))
        same = next((i for i in own if len(sets[i]) == len(union)), None)
        if not union and sets and not sets[0]:
            same = 0  # nothing at all is set 0 where that is the empty one
        if same is None:
            same = known.get(union)
        if same is None:
            same = known[union] = len(sets)
            sets.append(union)
            members.extend(sorted(union))
            starts.append(len(members))
        found.append(same)
    return (
        torch.tensor(found, dtype=torch.int64, device="cpu"),
        torch.tensor(starts, dtype=torch.int64, device="cpu"),
        torch.tensor(members, dtype=torch.int64, device="cpu"),
    )
