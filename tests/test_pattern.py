"""Patterns from what users hand in: tensors of every layout, NumPy arrays of every kind, SciPy matrices."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from torchzygote import plan_jacobian
from torchzygote.sparsity.pattern import Pattern

DENSE = torch.tensor([[1.0, 0, 2, 0], [0, 0, 0, 0], [3.0, 4, 0, 0], [0, 0, 0, 5]])
TALL = torch.cat([DENSE, DENSE.flip(1)])
N = TALL.numpy()
BAND = torch.eye(7, 8) + torch.eye(8)[1:]


def read_only(a: Any) -> Any:
    a = a.copy()
    a.flags.writeable = False
    return a


def scipy_read_only(a: Any) -> Any:
    a = scipy.sparse.csr_array(a)
    a.indices.flags.writeable = a.indptr.flags.writeable = False
    return a


def unaligned(a: Any) -> Any:
    record = np.zeros(a.shape, dtype=np.dtype([("tag", "i1"), ("value", "f4")]))
    record["value"] = a
    return record["value"]


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_layouts(layout: torch.layout) -> None:
    given = TALL.to_sparse(layout=layout)
    assert torch.equal(Pattern.of(given).to_dense(), TALL != 0)
    assert torch.equal(Pattern.of(given.to(torch.complex64)).to_dense(), TALL != 0)


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support")
@pytest.mark.parametrize("block", [(1, 1), (2, 2), (4, 1), (1, 2), (8, 4)])
@pytest.mark.parametrize("layout", [torch.sparse_bsr, torch.sparse_bsc])
def test_of_block_layouts_all_that_is_stored_counts(layout: torch.layout, block: tuple[int, int]) -> None:
    found = Pattern.of(TALL.to_sparse(layout=layout, blocksize=block)).to_dense()
    stored = (TALL != 0).reshape(8 // block[0], block[0], 4 // block[1], block[1]).any(1).any(-1)
    assert torch.equal(found, stored.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1))


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support")
def test_empty_ones() -> None:
    for layout in (torch.sparse_csc, torch.sparse_csr):
        assert Pattern.of(torch.zeros(3, 4).to_sparse(layout=layout)).nnz == 0
    assert Pattern.of(torch.zeros(4, 4).to_sparse_bsr((2, 2))).shape == (4, 4)
    assert Pattern.of(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(N.astype(">f8"), id="big-endian"),
        pytest.param(N.astype(">i2"), id="big-endian integers"),
        pytest.param(N[::-1, ::-1].copy()[::-1, ::-1], id="negative strides"),
        pytest.param(read_only(N), id="read-only"),
        pytest.param(read_only(N != 0), id="read-only bools"),
        pytest.param(N.astype(np.longdouble), id="long"),
        pytest.param(N.astype(np.uint64), id="unsigned"),
        pytest.param(N.astype(np.float16), id="half"),
        pytest.param(1j * N, id="complex"),
        pytest.param(unaligned(N), id="field of records"),
        pytest.param(np.asfortranarray(N), id="by columns"),
        pytest.param(np.broadcast_to(N[0], (8, 4)), id="broadcast"),
        pytest.param(scipy_read_only(N), id="read-only SciPy"),
        pytest.param(scipy.sparse.csc_matrix(N), id="SciPy by columns"),
        pytest.param(scipy.sparse.dia_array(np.eye(4)), id="SciPy by diagonals"),
    ],
)
def test_arrays_of_every_kind_without_a_warning(array: Any) -> None:
    dense = array.toarray() if hasattr(array, "toarray") else array
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Pattern.of(array)
    assert np.array_equal(found.to_dense().numpy(), dense != 0)


def test_not_a_number_is_an_entry() -> None:
    assert Pattern.of(np.array([[np.nan, 0.0]])).nnz == 1
    assert Pattern.of(torch.tensor([[torch.nan, 0.0]])).nnz == 1


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: np.array([["a"]]), TypeError, "got an array of dtype <U1"),
        (lambda: np.array([[None]]), TypeError, "got an array of dtype object"),
        (lambda: np.zeros(3), ValueError, r"expected two dimensions, got shape \(3,\)"),
        (lambda: torch.zeros(2, 3, 4).to_sparse_csr(), TypeError, r"got a tensor of shape \(2, 3, 4\)"),
        (lambda: torch.zeros(2, 3, 4).to_sparse(2), TypeError, r"got a tensor of shape \(2, 3, 4\)"),
        (
            lambda: scipy.sparse.coo_array(np.ones(3)),
            ValueError,
            r"expected two dimensions, got shape \(3,\)",
        ),
        (lambda: "word", TypeError, "got str"),
    ],
)
def test_what_is_no_matrix_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pattern.of(given())


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support")
@pytest.mark.parametrize(
    "band",
    [
        lambda: BAND.to_sparse_csc(),
        lambda: BAND.to_sparse_bsr((1, 2)),
        lambda: read_only(BAND.numpy().astype(">f4")),
    ],
)
def test_a_plan_takes_them(band: Any) -> None:
    def f(x: Tensor) -> Tensor:
        return x[1:] * x[:-1]

    x = torch.rand(8)
    (J,) = plan_jacobian(f, x, sparsity=band())(x)
    torch.testing.assert_close(J.to_dense(), torch.autograd.functional.jacobian(f, x))
