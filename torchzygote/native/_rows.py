"""Chunks of rows: their seeds, and where their products go."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import below_autograd
from . import reference
from ._checks import check_scatter, scattered_rows
from ._choice import as_stored, compiled, mark_written, on_cpu, on_cuda
from ._loading import operator

__all__ = ["gather_diagonal", "scatter_rows_", "seed_rows"]

# Rows of the identity with less elements than this come faster from two operators of PyTorch's own: 3.9
# microseconds for 10 x 10 where one from outside takes 5.5. From here on both take as long as writing does.
_SMALL = 1 << 16
if on_cpu:
    _seed_rows_ = operator("seed_rows_")
    _scatter_rows_ = operator("scatter_rows_")
    _gather_diagonal_ = operator("gather_diagonal_")


def seed_rows(
    lo: int,
    hi: int,
    numel: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    colors: Tensor | None = None,
) -> Tensor:
    """Seeds for one chunk of rows or colors, written in one pass.

    Parameters
    ----------
    lo, hi : int
        The chunk: rows, or colors.
    numel : int
        How many columns.
    dtype, device
        Those of the result.
    colors : torch.Tensor, optional
        The color of each column, int64 or int32 of shape ``(numel,)``; -1 for a column that is never seeded.

    Returns
    -------
    torch.Tensor
        Shape ``(hi - lo, numel)``: row ``r`` is 1 in column ``lo + r``, or in the columns of
        color ``lo + r``.

    Raises
    ------
    ValueError
        The chunk is no range of columns, ``colors`` has another shape or dtype, or a color is below -1.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import seed_rows
    >>> seed_rows(1, 3, 4, dtype=torch.float32, device="cpu")
    tensor([[0., 1., 0., 0.],
            [0., 0., 1., 0.]])
    >>> seed_rows(0, 2, 4, dtype=torch.float32, device="cpu", colors=torch.tensor([0, 1, 0, -1]))
    tensor([[1., 0., 1., 0.],
            [0., 1., 0., 0.]])
    """
    whole = colors is None and lo == 0 and hi == numel
    if whole and torch.compiler.is_compiling():
        # Inductor compares indices anew wherever a product reads an `eye`; this one it keeps in memory.
        return torch.ones(numel, dtype=dtype, device=device).diag_embed()
    kind = device if isinstance(device, str) else device.type
    small = colors is None and (hi - lo) * numel < _SMALL and kind == "cpu"
    if small and whole:
        return torch.eye(numel, dtype=dtype, device=device)  # 7 microseconds for 10 x 10, two operators 20
    if 0 <= lo <= hi and numel >= 0 and not small and compiled(colors):
        block = torch.empty(hi - lo, numel, dtype=dtype, device=device)
        if compiled(block):
            with below_autograd():
                _seed_rows_(block, lo, colors)
            return block
    return reference.seed_rows(lo, hi, numel, dtype=dtype, device=device, colors=colors)


def scatter_rows_(
    blocks: Sequence[Tensor], products: Sequence[Tensor | None], lo: int, hi: int | None = None
) -> None:
    """A chunk of batched products written into the rows of their matrices, for all arguments at once.

    ``blocks[i][lo:hi] = products[i].reshape(hi - lo, -1)``, converted to the block's dtype.

    Parameters
    ----------
    blocks : sequence of torch.Tensor
        Matrices, possibly strided.
    products : sequence of (torch.Tensor or None)
        For each block a tensor of shape ``(hi - lo, ...)`` with as many elements a row as the block has
        columns; ``None`` writes zeros.
    lo : int
        First row.
    hi : int, optional
        End of the rows; by default as many as the products have.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices do not fit, or the rows lie outside a block; nothing is written then.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import scatter_rows_
    >>> J = torch.zeros(3, 2)
    >>> scatter_rows_([J], [torch.tensor([[1., 2.], [3., 4.]])], lo=1)
    >>> J
    tensor([[0., 0.],
            [1., 2.],
            [3., 4.]])
    """
    apart = on_cuda and any(block.device != blocks[0].device for block in blocks)
    if apart or not (compiled(*blocks, *products) and all(map(as_stored, blocks))):
        reference.scatter_rows_(blocks, products, lo, hi)
    elif hi is None and products and all(x is not None for x in products):
        with below_autograd():
            _scatter_rows_(blocks, products, lo)
        mark_written(blocks)
    else:
        rows = scattered_rows(products, lo, hi)
        check_scatter(blocks, products, lo, rows)
        present = [(block, x) for block, x in zip(blocks, products, strict=True) if x is not None]
        if present:
            with below_autograd():
                _scatter_rows_([block for block, _ in present], [x for _, x in present], lo)
            mark_written([block for block, _ in present])
        for block, x in zip(blocks, products, strict=True):
            if x is None:
                block[lo : lo + rows].zero_()


def gather_diagonal(
    products: Tensor, lo: int, *, out: Tensor | None = None, colors: Tensor | None = None
) -> Tensor:
    """The diagonal entries in a chunk of products, without forming the matrix.

    Parameters
    ----------
    products : torch.Tensor
        Rows ``lo`` to ``lo + k`` (or the products of these colors), shape ``(k, n)``.
    lo : int
        First row or color.
    out : torch.Tensor, optional
        Where to write; needed with ``colors``, then of shape ``(n,)``.
    colors : torch.Tensor, optional
        The color of each column, int64 or int32 of shape ``(n,)``.

    Returns
    -------
    torch.Tensor
        Shape ``(k,)`` with ``products[r, lo + r]``; with colors ``out``, in which
        ``out[i] = products[colors[i] - lo, i]`` wherever ``lo <= colors[i] < lo + k``.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices do not fit, or the rows have no diagonal entry.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import gather_diagonal
    >>> gather_diagonal(torch.tensor([[1., 2., 3.], [4., 5., 6.]]), lo=1)
    tensor([2., 6.])
    >>> gather_diagonal(torch.tensor([[1., 2., 3.]]), 0, out=torch.zeros(3), colors=torch.tensor([0, 1, 0]))
    tensor([1., 0., 3.])
    """
    if not compiled(products, out, colors) or not (colors is None if out is None else as_stored(out)):
        return reference.gather_diagonal(products, lo, out=out, colors=colors)
    found = products.new_empty(products.shape[0] if products.dim() > 0 else 0) if out is None else out
    with below_autograd():
        _gather_diagonal_(found, products, lo, colors)
    if out is not None:
        mark_written([out])
    return found
