"""A sparsity pattern: which entries of a matrix can be nonzero.

Holds structure alone; it must not know how the structure was found, nor what it is used for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._torch_private import plain_tensors
from .._warning import making_sparse
from ._picture import picture

__all__ = ["Pattern"]


class Pattern:
    """Positions of the possibly nonzero entries of a matrix, row by row.

    Parameters
    ----------
    shape : tuple of int
        Rows and columns.
    indptr, indices : torch.Tensor
        Row ``r`` has its entries in the columns ``indices[indptr[r]:indptr[r + 1]]``: int64, on the CPU,
        ascending and unique within a row.
    is_local : bool
        The structure is that of one input (a sort, a maximum, a branch taken): at another one it may differ.
    unknown : tuple of str
        Operators without a rule, that were taken to couple everything.
    operators : tuple of str
        All operators met.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import plan_jacobian
    >>> (pattern,) = plan_jacobian(lambda x: x[1:] - x[:-1], torch.rand(4)).patterns
    >>> pattern.shape, pattern.nnz, pattern.is_local
    ((3, 4), 6, False)
    >>> pattern.to_dense().int()
    tensor([[1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    """

    __slots__ = ("_dense", "_indices", "_indptr", "is_local", "operators", "shape", "unknown")
    __hash__ = None  # type: ignore[assignment]

    def __init__(
        self,
        shape: tuple[int, int],
        indptr: Tensor,
        indices: Tensor,
        *,
        is_local: bool = False,
        unknown: tuple[str, ...] = (),
        operators: tuple[str, ...] = (),
    ) -> None:
        self.shape = shape
        self._indptr: Tensor | None = indptr
        self._indices: Tensor | None = indices
        self._dense = False
        self.is_local = is_local
        self.unknown = unknown
        self.operators = operators

    @classmethod
    def full(
        cls,
        shape: tuple[int, int],
        *,
        given_up: bool = True,
        is_local: bool = False,
        unknown: tuple[str, ...] = (),
        operators: tuple[str, ...] = (),
    ) -> Pattern:
        """A pattern of ones, whose indices are made only if somebody asks for them.

        ``given_up``: not found to be full, but taken for it.
        """
        pattern = cls(shape, _NONE, _NONE, is_local=is_local, unknown=unknown, operators=operators)
        pattern._indptr = pattern._indices = None
        pattern._dense = given_up
        return pattern

    @property
    def dense(self) -> bool:
        """Whether the structure was given up: every entry counts as nonzero."""
        return self._dense

    @property
    def lists_all(self) -> bool:
        """Whether no entry is known to be zero, be the structure given up or found to be full."""
        return self._dense or 0 < self.nnz == self.shape[0] * self.shape[1]

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.shape[0] * self.shape[1] if self._indices is None else self._indices.numel()

    @property
    def density(self) -> float:
        """Share of the matrix that is listed."""
        return self.nnz / max(1, self.shape[0] * self.shape[1])

    @property
    def indptr(self) -> Tensor:
        """Where each row starts in :attr:`indices`."""
        if self._indptr is None:
            with plain_tensors():
                self._indptr = torch.arange(self.shape[0] + 1, device="cpu") * self.shape[1]
        return self._indptr

    @property
    def indices(self) -> Tensor:
        """Columns of the entries, row by row."""
        if self._indices is None:
            with plain_tensors():
                self._indices = torch.arange(self.shape[1], device="cpu").repeat(self.shape[0])
        return self._indices

    def rows(self) -> Tensor:
        """The row of each entry, in the order of :attr:`indices`."""
        counts = self.indptr[1:] - self.indptr[:-1]
        return torch.repeat_interleave(
            torch.arange(self.shape[0], device="cpu"), counts, output_size=self.nnz
        )

    def transpose(self) -> Pattern:
        """The pattern of the transposed matrix."""
        shape = (self.shape[1], self.shape[0])
        if self.lists_all:
            return self._told_of(Pattern.full(shape, given_up=self._dense))
        # A stable sort keeps the rows, which become columns, in ascending order.
        order = torch.sort(self.indices, stable=True).indices
        indptr = indptr_of(torch.bincount(self.indices, minlength=shape[0]))
        return self._told_of(Pattern(shape, indptr, self.rows()[order]))

    def copy(self, device: torch.device | None = None) -> Pattern:
        """The same positions in memory of its own; on a device for a matrix there, and nothing else."""
        if self.lists_all and (device is None or device.type == "cpu"):
            return self._told_of(Pattern.full(self.shape, given_up=self._dense))
        indptr, indices = (part.to(device or "cpu", copy=True) for part in (self.indptr, self.indices))
        return self._told_of(Pattern(self.shape, indptr, indices))

    def _told_of(self, other: Pattern) -> Pattern:
        """``other``, with what is known of how this one was found."""
        other.is_local, other.unknown, other.operators = self.is_local, self.unknown, self.operators
        return other

    def to_csr(self, device: torch.device | None = None) -> Tensor:
        """A ``torch.sparse_csr`` tensor of ``True`` in memory of its own, with the attribute ``is_local``."""
        values = torch.ones(self.nnz, dtype=torch.bool, device=device or "cpu")
        indptr, indices = (part.to(values.device, copy=True) for part in (self.indptr, self.indices))
        with making_sparse():
            csr = torch.sparse_csr_tensor(
                indptr, indices, values, self.shape, device=values.device, check_invariants=False
            )
        csr.is_local = self.is_local  # type: ignore[attr-defined]
        return csr

    def to_dense(self) -> Tensor:
        """A boolean matrix."""
        matrix = torch.zeros(self.shape, dtype=torch.bool, device="cpu")
        if self.lists_all:
            return matrix.fill_(True)
        matrix[self.rows(), self.indices] = True
        return matrix

    @classmethod
    def from_coo(
        cls, rows: Tensor, columns: Tensor, shape: tuple[int, int], *, is_local: bool = False
    ) -> Pattern:
        """The pattern of these entries, in any order, repeated ones merged."""
        rows = torch.as_tensor(rows).detach().to("cpu", torch.int64).reshape(-1)
        columns = torch.as_tensor(columns).detach().to("cpu", torch.int64).reshape(-1)
        if rows.numel() != columns.numel():
            raise ValueError(
                f"pattern: expected as many rows as columns, got {rows.numel()} and {columns.numel()}"
            )
        for name, index, bound in (("row", rows, shape[0]), ("column", columns, shape[1])):
            if index.numel() and (int(index.min()) < 0 or int(index.max()) >= bound):
                raise ValueError(
                    f"pattern: expected every {name} from 0 to {bound - 1}, got {int(index.min())} to "
                    f"{int(index.max())}"
                )
        keys = torch.unique(rows * shape[1] + columns)  # sorted
        width = max(1, shape[1])
        counts = torch.bincount(torch.div(keys, width, rounding_mode="floor"), minlength=shape[0])
        return cls(shape, indptr_of(counts), keys % width, is_local=is_local)

    @classmethod
    def from_dense(cls, matrix: Tensor) -> Pattern:
        """The pattern of the nonzero entries of a two-dimensional tensor."""
        if matrix.dim() != 2:
            raise ValueError(f"expected two dimensions, got shape {tuple(matrix.shape)}")
        found = matrix.detach().cpu().nonzero()
        return cls.from_coo(found[:, 0], found[:, 1], (matrix.shape[0], matrix.shape[1]))

    @classmethod
    def from_csr(cls, matrix: Any) -> Pattern:
        """The pattern of the entries that a compressed tensor (CSR, CSC, BSR, BSC) or SciPy matrix stores.

        A stored block counts as a whole.
        """
        if isinstance(matrix, Tensor) and matrix.layout not in _COMPRESSED:
            raise TypeError(f"pattern: expected a CSR, CSC, BSR or BSC tensor, got {_describe(matrix)}")
        if len(matrix.shape) != 2:
            raise ValueError(f"expected two dimensions, got shape {tuple(matrix.shape)}")
        shape = (int(matrix.shape[0]), int(matrix.shape[1]))
        rows, columns = _of_tensor(matrix) if isinstance(matrix, Tensor) else _of_scipy(matrix.tocsr())
        found = cls.from_coo(rows, columns, shape)
        found.is_local = bool(getattr(matrix, "is_local", False))
        return found

    @classmethod
    def of(cls, given: Any) -> Pattern:
        """A pattern from what users give: a pattern, a tensor of any layout, an array, a SciPy matrix."""
        if isinstance(given, Pattern):
            return given
        if isinstance(given, Tensor):
            if given.layout in _COMPRESSED and given.dim() == 2:
                return cls.from_csr(given)
            if given.layout == torch.strided:
                return cls.from_dense(given)
            if given.layout == torch.sparse_coo and given.dim() == 2 and given.sparse_dim() == 2:
                indices = given._indices()
                return cls.from_coo(indices[0], indices[1], (given.shape[0], given.shape[1]))
        elif hasattr(given, "tocsr"):
            return cls.from_csr(given)
        elif hasattr(given, "__array__"):
            array = np.asarray(given)
            if array.dtype.kind in "biufc":
                # A comparison is a new array, native and writeable, whatever this one is.
                return cls.from_dense(torch.from_numpy(np.ascontiguousarray(array != 0)))
            raise TypeError(
                f"pattern: expected an array of numbers or bools, got an array of dtype {array.dtype}"
            )
        raise TypeError(
            "pattern: expected a two-dimensional tensor (dense or sparse), an array, a SciPy sparse matrix "
            f"or a Pattern, got {_describe(given)}"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        if self.shape != other.shape or self.nnz != other.nnz:
            return False
        if self.lists_all and other.lists_all:
            return True
        return torch.equal(self.indptr, other.indptr) and torch.equal(self.indices, other.indices)

    def __repr__(self) -> str:
        notes = [name for name, on in (("dense", self._dense), ("local", self.is_local)) if on]
        head = f"Pattern {self.shape[0]}×{self.shape[1]}, {self.nnz} nonzeros ({self.density:.2g})"
        return "\n".join([", ".join([head, *notes]), *self.picture()])

    def picture(self, width: int = 32, height: int = 8) -> list[str]:
        """Lines of text that show where the entries are, at most ``width`` × ``height`` characters."""
        if self._dense:
            return []
        rows, columns = (
            (self.rows(), self.indices) if not self.lists_all else self._sample(8 * height, 4 * width)
        )
        return picture(rows, columns, self.shape, width, height)

    def _sample(self, down: int, across: int) -> tuple[Tensor, Tensor]:
        """Some rows and columns at even distances, which broadcast with each other."""
        rows, columns = (torch.arange(n, device="cpu") for n in self.shape)
        step = [max(1, n // most) for n, most in zip(self.shape, (down, across), strict=True)]
        return rows[:: step[0], None], columns[:: step[1]]


_NONE = torch.empty(0, dtype=torch.int64, device="cpu")


_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def _of_scipy(matrix: Any) -> tuple[Tensor, Tensor]:
    # Copies: a read-only array is none of PyTorch's.
    indptr, indices = (torch.from_numpy(np.array(a, dtype=np.int64)) for a in (matrix.indptr, matrix.indices))
    return _expanded(indptr, indices, matrix.shape[0])


def _of_tensor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is stored, block by block where there are blocks."""
    blocks = matrix.layout in (torch.sparse_bsr, torch.sparse_bsc)
    height, width = matrix.values().shape[1:] if blocks else (1, 1)
    if matrix.layout in (torch.sparse_csc, torch.sparse_bsc):
        count = matrix.shape[1] // width
        columns, rows = _expanded(matrix.ccol_indices(), matrix.row_indices(), count)
    else:
        count = matrix.shape[0] // height
        rows, columns = _expanded(matrix.crow_indices(), matrix.col_indices(), count)
    if blocks:
        rows = rows[:, None, None] * height + torch.arange(height, device="cpu")[:, None]
        columns = columns[:, None, None] * width + torch.arange(width, device="cpu")
        rows, columns = rows.expand(-1, -1, width), columns.expand(-1, height, -1)
    return rows, columns


def _expanded(indptr: Tensor, indices: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Both coordinates of what compressed rows (or columns) store."""
    indptr, indices = (part.detach().to("cpu", torch.int64) for part in (indptr, indices))
    counts = indptr[1:] - indptr[:-1]
    if indptr.numel() != count + 1 or bool((counts < 0).any()) or int(indptr[-1]) != indices.numel():
        raise ValueError("pattern: expected row pointers that ascend from 0 to the number of entries")
    return torch.repeat_interleave(torch.arange(count, device="cpu"), counts), indices


def indptr_of(counts: Tensor) -> Tensor:
    """Row pointers from the number of entries in each row."""
    indptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(counts, 0, out=indptr[1:])
    return indptr


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and layout {value.layout}"
    return type(value).__name__
