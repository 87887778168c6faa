"""From colored products to the entries of a matrix, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch_private import below_autograd
from . import reference
from ._checks import check_compress
from ._choice import as_stored, compiled, mark_written, on_cpu
from ._loading import operator

__all__ = ["compress", "decompress", "decompress_dense"]

_SUMMED = (torch.float32, torch.float64, torch.complex64, torch.complex128)
if on_cpu:
    _decompress_ = operator("decompress_")
    _decompress_dense_ = operator("decompress_dense_")
    _compress_ = operator("compress_")


def decompress(products: Tensor, lo: int, slot_row: Tensor, slot_column: Tensor, out: Tensor) -> None:
    """Values of a sparse matrix from a chunk of its colored products.

    Parameters
    ----------
    products : torch.Tensor
        The products of colors ``lo`` to ``lo + k``, shape ``(k, m)``.
    lo : int
        First color of the chunk.
    slot_row, slot_column : torch.Tensor
        For each nonzero the color whose product has its value, and the position in that product; int64 or
        int32, shape ``(nnz,)``.
    out : torch.Tensor
        The values, shape ``(nnz,)``. Written where the color is in this chunk.

    Raises
    ------
    ValueError
        Shapes, dtypes or devices do not fit, or a slot lies outside the products; nothing is written then.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import decompress
    >>> values = torch.zeros(3)
    >>> decompress(torch.tensor([[5., 6.]]), 1, torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), values)
    >>> values
    tensor([5., 0., 6.])
    """
    if compiled(products, slot_row, slot_column, out) and as_stored(out):
        with below_autograd():
            _decompress_(out, products, lo, slot_row, slot_column)
        mark_written([out])
    else:
        reference.decompress(products, lo, slot_row, slot_column, out)


def decompress_dense(
    products: Tensor,
    lo: int,
    slot_row: Tensor,
    slot_column: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
) -> None:
    """Entries of a dense matrix from a chunk of its colored products.

    As :func:`decompress`, into ``out[rows[e], columns[e]]``; ``out`` is a matrix, possibly strided, and the
    positions are distinct.

    Parameters
    ----------
    products, lo, slot_row, slot_column
        As for :func:`decompress`.
    rows, columns : torch.Tensor
        The position of each nonzero, int64 or int32.
    out : torch.Tensor
        The matrix.

    Raises
    ------
    ValueError
        As :func:`decompress`; or a position lies outside the matrix.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import decompress_dense
    >>> zero, one = torch.tensor([0]), torch.tensor([1])
    >>> J = torch.zeros(2, 2)
    >>> decompress_dense(torch.tensor([[5., 6.]]), 0, zero, one, one, zero, J)
    >>> J
    tensor([[0., 0.],
            [6., 0.]])
    """
    if compiled(products, slot_row, slot_column, rows, columns, out) and as_stored(out):
        with below_autograd():
            _decompress_dense_(out, products, lo, slot_row, slot_column, rows, columns)
        mark_written([out])
    else:
        reference.decompress_dense(products, lo, slot_row, slot_column, rows, columns, out)


def compress(matrix: Tensor, colors: Tensor, ncolors: int, *, by: str = "columns") -> Tensor:
    """Colored products of a known matrix: what the products of a coloring would give.

    Parameters
    ----------
    matrix : torch.Tensor
        Dense or ``torch.sparse_csr``.
    colors : torch.Tensor
        The color of each column (``by="columns"``) or row, int64 or int32; -1 for none.
    ncolors : int
        How many colors there are.
    by : {"columns", "rows"}
        What the colors are of.

    Returns
    -------
    torch.Tensor
        Row ``c`` is the sum of the columns (rows) of color ``c``: shape ``(ncolors, rows)``, or
        ``(ncolors, columns)``.

    Raises
    ------
    ValueError
        ``by`` is another word, or a color is not below ``ncolors``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import compress
    >>> compress(torch.tensor([[1., 0., 2.], [0., 3., 0.]]), torch.tensor([0, 0, 1]), 2)
    tensor([[1., 3.],
            [2., 0.]])
    """
    check_compress(matrix, colors, ncolors, by)
    if (
        by == "columns"
        and matrix.layout == torch.sparse_csr
        and matrix.dtype in _SUMMED
        and compiled(matrix, colors)
    ):
        out = torch.empty(ncolors, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        with below_autograd():
            _compress_(out, matrix.crow_indices(), matrix.col_indices(), matrix.values(), colors)
        return out
    return reference.compress(matrix, colors, ncolors, by=by)
