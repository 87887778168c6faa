"""Operators on the results of derivatives, compiled where that was possible.

Each function here calls the compiled operator where it is loaded for the tensors' device and the tensors are
plain ones; otherwise (under ``torch.func``, ``torch.compile`` or autograd) the same in pure PyTorch from
:mod:`torchzygote.native.reference`. Knows nothing of derivatives, chunks or colorings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import below_autograd, in_forward_ad, in_functorch
from . import _loading, index_sets, reference
from ._checks import check_scatter, scattered_rows
from ._loading import info, loaded_devices

__all__ = [
    "color_graph",
    "compress",
    "decompress",
    "decompress_dense",
    "gather_diagonal",
    "info",
    "scatter_rows_",
    "seed_rows",
    "unite_sets",
]

_on_cpu = "cpu" in loaded_devices
_on_cuda = "cuda" in loaded_devices
if _on_cpu:
    _seed_rows_ = _loading.operator("seed_rows_")
    _scatter_rows_ = _loading.operator("scatter_rows_")
    _gather_diagonal_ = _loading.operator("gather_diagonal_")
    _decompress_ = _loading.operator("decompress_")
    _decompress_dense_ = _loading.operator("decompress_dense_")
    _compress_ = _loading.operator("compress_")
    _color_graph = _loading.operator("color_graph")

_PLAIN = (Tensor, torch.nn.Parameter)
_NO_LIMIT = 2**62
# Rows of the identity with less elements than this come faster from two operators of PyTorch's own: 3.9
# microseconds for 10 x 10 where one from outside takes 5.5. From here on both take as long as writing does.
_SMALL = 1 << 16


def _compiled(*tensors: Tensor | None) -> bool:
    """Whether the compiled operator is there for these tensors, and right: nothing differentiates them."""
    if torch.compiler.is_compiling() or not _on_cpu or in_functorch() or in_forward_ad():
        return False
    recording = torch.is_grad_enabled()
    for x in tensors:
        if x is None:
            continue
        if type(x) not in _PLAIN or not (x.is_cpu or (_on_cuda and x.is_cuda)):
            return False
        if recording and x.requires_grad:
            return False
    return True


def _mark_written(tensors: Sequence[Tensor]) -> None:
    """Let autograd know, which the call went past, in case one of them was saved for a backward pass."""
    torch.autograd.graph.increment_version([x for x in tensors if not x.is_inference()])


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
    small = colors is None and (hi - lo) * numel < _SMALL and torch.device(device).type == "cpu"
    if 0 <= lo <= hi and numel >= 0 and not small and _compiled(colors):
        block = torch.empty(hi - lo, numel, dtype=dtype, device=device)
        if _compiled(block):
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
    apart = _on_cuda and any(block.device != blocks[0].device for block in blocks)
    if apart or not _compiled(*blocks, *products):
        reference.scatter_rows_(blocks, products, lo, hi)
    elif hi is None and products and all(x is not None for x in products):
        with below_autograd():
            _scatter_rows_(blocks, products, lo)
        _mark_written(blocks)
    else:
        rows = scattered_rows(products, lo, hi)
        check_scatter(blocks, products, lo, rows)
        present = [(block, x) for block, x in zip(blocks, products, strict=True) if x is not None]
        if present:
            with below_autograd():
                _scatter_rows_([block for block, _ in present], [x for _, x in present], lo)
            _mark_written([block for block, _ in present])
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
    if not _compiled(products, out, colors) or (colors is not None and out is None):
        return reference.gather_diagonal(products, lo, out=out, colors=colors)
    found = products.new_empty(products.shape[0] if products.dim() > 0 else 0) if out is None else out
    with below_autograd():
        _gather_diagonal_(found, products, lo, colors)
    if out is not None:
        _mark_written([out])
    return found


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
    if _compiled(products, slot_row, slot_column, out):
        with below_autograd():
            _decompress_(out, products, lo, slot_row, slot_column)
        _mark_written([out])
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
    if _compiled(products, slot_row, slot_column, rows, columns, out):
        with below_autograd():
            _decompress_dense_(out, products, lo, slot_row, slot_column, rows, columns)
        _mark_written([out])
    else:
        reference.decompress_dense(products, lo, slot_row, slot_column, rows, columns, out)


_SUMMED = (torch.float32, torch.float64, torch.complex64, torch.complex128)


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
    if (
        by == "columns"
        and matrix.layout == torch.sparse_csr
        and matrix.dim() == 2
        and matrix.dtype in _SUMMED
        and _compiled(matrix, colors)
    ):
        out = torch.empty(ncolors, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
        with below_autograd():
            _compress_(out, matrix.crow_indices(), matrix.col_indices(), matrix.values(), colors)
        return out
    return reference.compress(matrix, colors, ncolors, by=by)


def unite_sets(
    set_ptr: Tensor, set_members: Tensor, group_ptr: Tensor, group_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Unions of index sets, each union once.

    Set ``s`` has the members ``set_members[set_ptr[s]:set_ptr[s + 1]]``, sorted; group ``g`` unites the sets
    ``group_ids[group_ptr[g]:group_ptr[g + 1]]``. All int64, on the CPU.

    Parameters
    ----------
    set_ptr, set_members, group_ptr, group_ids : torch.Tensor
        Sets and groups as above.

    Returns
    -------
    ids, set_ptr, set_members : torch.Tensor
        The id of each group's union, and all sets, the new ones appended. A union that equals one of its
        group's own sets keeps that id, and equal unions share one.

    Raises
    ------
    ValueError
        An array isn't int64 on the CPU, or its pointers or ids are out of range.

    Examples
    --------
    >>> import torch
    >>> from torchzygote.native import unite_sets
    >>> ptr, members = torch.tensor([0, 1, 2]), torch.tensor([3, 5])
    >>> unite_sets(ptr, members, torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]))
    (tensor([2, 1]), tensor([0, 1, 2, 4]), tensor([3, 5, 3, 5]))
    """
    if not _compiled(set_ptr, set_members, group_ptr, group_ids):
        return reference.unite_sets(set_ptr, set_members, group_ptr, group_ids)
    ids, sizes, new = index_sets.unite_groups(set_ptr, set_members, group_ptr, group_ids, _NO_LIMIT)
    return ids, torch.cat([set_ptr, set_ptr[-1:] + sizes.cumsum(0)]), torch.cat([set_members, new])


def color_graph(indptr: Tensor, indices: Tensor, ncols: int, kind: str, order: str) -> Tensor | None:
    """Greedy coloring of a sparse pattern, for graphs of tens of millions of entries.

    Parameters
    ----------
    indptr, indices : torch.Tensor
        The pattern, row by row: int64, and int64 or int32; symmetric for ``"distance1"`` and ``"star"``.
    ncols : int
        Number of columns.
    kind : {"distance1", "distance2_rows", "distance2_columns", "star"}
        What must differ: neighbors; rows that share a column; columns that share a row; neighbors, and along
        every path of four vertices two colors are not enough.
    order : {"natural", "largest_first"}
        The order in which vertices take the smallest color that is left to them.

    Returns
    -------
    torch.Tensor or None
        A color for each row or column, int64, from 0 on. ``None`` where the native library isn't loaded: the
        same in Python is :func:`torchzygote.coloring.greedy.color_graph`.

    Raises
    ------
    ValueError
        ``kind`` or ``order`` is another word, or the pattern is none.
    """
    if not _compiled(indptr, indices):
        return None
    colors: Tensor = _color_graph(indptr.contiguous(), indices.contiguous(), ncols, kind, order)
    return colors
