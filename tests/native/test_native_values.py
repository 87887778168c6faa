"""Operators for both devices give what their reference in PyTorch gives, for any shapes, strides and dtypes.

Each test runs with the kernels for the CPU, and with those for CUDA on the CPU (``kernels`` in conftest.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_samples import (
    DTYPES,
    INDEX_DTYPES,
    LAYOUTS,
    dtypes,
    index_dtypes,
    integers,
    laid_out,
    layouts,
    needs_library,
    numbers,
    raw,
    sizes,
)

from torchzygote import native
from torchzygote.native import reference

pytestmark = [needs_library, pytest.mark.usefixtures("kernels")]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@given(dtypes, sizes, sizes, sizes)
def test_seed_rows_are_rows_of_the_identity(dtype: torch.dtype, lo: int, rows: int, more: int) -> None:
    columns = lo + rows + more
    found = native.seed_rows(lo, lo + rows, columns, dtype=dtype, device="cpu")
    assert same(found, torch.eye(columns).to(dtype)[lo : lo + rows])


@pytest.mark.parametrize("shape", [(3, 70_000), (700, 900), (90, 40_000), (70_000, 3)])
@pytest.mark.parametrize("colored", [False, True])
def test_large_seeds_are_divided_among_threads_without_gaps(shape: tuple[int, int], colored: bool) -> None:
    rows, columns = shape
    lo = 2 if colored or rows < columns else 0
    colors = integers(-1, rows + 3, columns, torch.int64) if colored else None
    hi = lo + (rows if colored else min(rows, columns - lo))
    arguments = {"dtype": torch.float32, "device": "cpu", "colors": colors}
    found = native.seed_rows(lo, hi, columns, **arguments)
    assert same(found, reference.seed_rows(lo, hi, columns, **arguments))


@given(dtypes, index_dtypes, layouts, st.integers(0, 5), sizes, sizes)
def test_seed_rows_mark_the_columns_of_each_color(
    dtype: torch.dtype, index: torch.dtype, layout: str, lo: int, rows: int, columns: int
) -> None:
    colors = integers(-1, 12, columns, index, layout)
    found = native.seed_rows(lo, lo + rows, columns, dtype=dtype, device="cpu", colors=colors)
    for r in range(rows):
        assert same(found[r], (colors == lo + r).to(dtype))


@given(dtypes, layouts, st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_seeds_can_be_written_into_strided_memory(
    dtype: torch.dtype, layout: str, lo: int, rows: int, more: int
) -> None:
    out = laid_out(torch.full((rows, lo + rows + more), 7.0).to(dtype), layout)
    raw("seed_rows_")(out, lo, None)
    assert same(out.contiguous(), torch.eye(lo + rows + more).to(dtype)[lo : lo + rows])


shapes = st.lists(st.integers(0, 5), min_size=0, max_size=7).map(tuple)
argument = st.tuples(shapes, dtypes, layouts, dtypes, layouts, st.booleans())


@given(st.lists(argument, max_size=4), st.integers(0, 40), st.integers(0, 3), st.integers(0, 3))
def test_scatter_rows_writes_all_arguments_and_nothing_else(
    arguments: list[tuple], rows: int, lo: int, more: int
) -> None:
    blocks, expected, products = [], [], []
    for i, (shape, to, to_layout, source, source_layout, absent) in enumerate(arguments):
        if source.is_complex and not to.is_complex:
            source = to
        columns = math.prod(shape)
        blocks.append(numbers((lo + rows + more, columns), to, to_layout, seed=i))
        expected.append(blocks[-1].clone())
        products.append(None if absent else numbers((rows, *shape), source, source_layout, seed=10 + i))
        if absent:
            expected[-1][lo : lo + rows] = 0
        else:
            expected[-1][lo : lo + rows] = products[-1].reshape(rows, columns).to(to)
    native.scatter_rows_(blocks, products, lo, lo + rows)
    for block, wanted in zip(blocks, expected, strict=True):
        assert same(block, wanted)


@pytest.mark.parametrize(
    ("source", "to"), [(a, b) for a in DTYPES for b in DTYPES if b.is_complex or not a.is_complex]
)
def test_scatter_rows_converts_as_copy_does(source: torch.dtype, to: torch.dtype) -> None:
    values = [1.5, -0.1, 65504.0, 7e4, 3e38, 1e-7, math.inf, -math.inf, math.nan, 0.0]
    product = torch.tensor([values] * 3, dtype=torch.float64).to(source)
    for layout in ("contiguous", "reversed"):
        block = torch.zeros(3, len(values), dtype=to)
        native.scatter_rows_([block], [laid_out(product, layout)], 0)
        torch.testing.assert_close(block, product.to(to), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(100, 50, 33), (64, 4096), (1000, 17), (40, 3, 5, 7, 11)])
@pytest.mark.parametrize("layout", ["contiguous", "reversed", "sliced"])
def test_large_products_are_divided_into_tiles_without_gaps(shape: tuple[int, ...], layout: str) -> None:
    product = numbers(shape, torch.float32, layout)
    block = torch.zeros(shape[0] + 5, math.prod(shape[1:]))
    native.scatter_rows_([block], [product], 3)
    assert torch.equal(block[3:-2], product.reshape(shape[0], -1))
    assert not block[:3].any()
    assert not block[-2:].any()


def test_conjugated_and_expanded_products_are_read_as_what_they_are() -> None:
    product = numbers((4, 6), torch.complex64)
    block = torch.zeros(4, 6, dtype=torch.complex64)
    native.scatter_rows_([block], [product.conj()], 0)
    assert torch.equal(block, product.conj().resolve_conj())
    native.scatter_rows_([block], [product[:1].expand(4, 6)], 0)
    assert torch.equal(block, product[:1].expand(4, 6))
    assert torch.equal(native.gather_diagonal(product.conj(), 1), product.conj().diagonal(1)[:4])
    imaginary = torch.zeros(4, 6)
    native.scatter_rows_([imaginary], [product.conj().imag], 0)
    assert torch.equal(imaginary, -product.imag)


def resolved(x: torch.Tensor) -> torch.Tensor:
    return x.resolve_conj().resolve_neg()


@pytest.mark.parametrize("view", [torch.Tensor.conj, lambda x: x.conj().imag], ids=["conjugate", "negative"])
@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_lazy_views_are_read_and_written_as_what_they_are(
    view: Callable[[torch.Tensor], torch.Tensor], read: bool, written: bool
) -> None:
    products = view(numbers((4, 6), torch.complex64))
    products = products if read else resolved(products)
    place = torch.arange(4)

    def target(*shape: int) -> torch.Tensor:
        out = view(numbers(shape, torch.complex64, seed=1))
        return out if written else resolved(out)

    calls: list[tuple[Callable[[ModuleType, torch.Tensor], object], tuple[int, ...]]] = [
        (lambda m, out: m.scatter_rows_([out], [products], 1), (6, 6)),
        (lambda m, out: m.gather_diagonal(products, 1, out=out), (4,)),
        (lambda m, out: m.gather_diagonal(products, 0, out=out, colors=torch.arange(6)), (6,)),
        (lambda m, out: m.decompress(products, 0, place, place, out), (4,)),
        (lambda m, out: m.decompress_dense(products, 0, place, place, place, place, out), (4, 6)),
    ]
    for call, shape in calls:
        out, wanted = target(*shape), target(*shape)
        call(native, out)
        call(reference, wanted)
        assert torch.equal(out, wanted)


def test_more_arguments_are_scattered_than_one_launch_takes() -> None:
    pairs = [(a, b) for a in DTYPES for b in DTYPES if b.is_complex or not a.is_complex]
    blocks, wanted, products = [], [], []
    for i in range(5 * len(pairs)):
        source, to = pairs[i % len(pairs)]
        shape = ((), (3, 2), (0, 2), (2, 1, 3), (2, 2, 2, 2, 2, 2, 2))[i % 5]
        products.append(numbers((4, *shape), source, LAYOUTS[i // 5 % len(LAYOUTS)], seed=i))
        blocks.append(numbers((7, math.prod(shape)), to, LAYOUTS[i // 3 % len(LAYOUTS)], seed=-i))
        wanted.append(blocks[-1].clone())
    native.scatter_rows_(blocks, products, 2)
    reference.scatter_rows_(wanted, products, 2)
    assert all(map(same, blocks, wanted))
    dtypes = [x.dtype for x in blocks]
    assert min(map(dtypes.count, dtypes)) > 16


@given(dtypes, layouts, sizes, sizes, sizes)
def test_gather_diagonal_reads_one_entry_of_each_row(
    dtype: torch.dtype, layout: str, lo: int, rows: int, more: int
) -> None:
    products = numbers((rows, lo + rows + more), dtype, layout)
    assert same(native.gather_diagonal(products, lo), products.diagonal(lo)[:rows].clone())


@given(dtypes, index_dtypes, layouts, layouts, st.integers(0, 5), sizes, sizes)
def test_gather_diagonal_reads_the_row_of_each_color(
    dtype: torch.dtype, index: torch.dtype, layout: str, other: str, lo: int, rows: int, columns: int
) -> None:
    products = numbers((rows, columns), dtype, layout)
    colors = integers(-1, 50, columns, index, other)
    out = numbers((columns,), dtype, other, seed=1)
    expected = out.clone()
    for i, color in enumerate(colors.tolist()):
        if lo <= color < lo + rows:
            expected[i] = products[color - lo, i]
    assert native.gather_diagonal(products, lo, out=out, colors=colors) is out
    assert same(out, expected)


@given(
    dtypes, index_dtypes, index_dtypes, layouts, layouts, st.integers(0, 5), sizes, st.integers(1, 9), sizes
)
def test_decompress_reads_the_slots_of_this_chunk(
    dtype: torch.dtype,
    index: torch.dtype,
    other_index: torch.dtype,
    layout: str,
    other: str,
    lo: int,
    rows: int,
    columns: int,
    count: int,
) -> None:
    products = numbers((rows, columns), dtype, layout)
    slot_row = integers(0, 45, count, index, other)
    slot_column = integers(0, columns - 1, count, other_index, layout)
    place = torch.randperm(10 * (count + 1), generator=torch.Generator().manual_seed(1))[:count]
    at = (place // 10).to(other_index), (place % 10).to(index)
    values = numbers((count,), dtype, other, seed=1)
    matrix = numbers((count + 1, 10), dtype, layout, seed=2)
    wanted_values, wanted_matrix = values.clone(), matrix.clone()
    for e in range(count):
        if lo <= slot_row[e] < lo + rows:
            wanted_values[e] = products[slot_row[e] - lo, slot_column[e]]
            wanted_matrix[at[0][e], at[1][e]] = products[slot_row[e] - lo, slot_column[e]]
    native.decompress(products, lo, slot_row, slot_column, values)
    native.decompress_dense(products, lo, slot_row, slot_column, *at, matrix)
    assert same(values, wanted_values)
    assert same(matrix, wanted_matrix)


@given(
    index_dtypes,
    st.integers(0, 3),
    st.integers(1, 4),
    st.sets(st.integers(0, 9999), max_size=3),
    st.booleans(),
)
def test_long_rows_are_read_where_some_blocks_of_indices_are_in_range_throughout(
    index: torch.dtype, lo: int, rows: int, elsewhere: set[int], strided: bool
) -> None:
    products = numbers((rows, 10_000), torch.float32)
    colors = integers(lo, lo + rows - 1, 10_000, index, "sliced" if strided else "contiguous")
    for i in elsewhere:
        colors[i] = (lo + rows, 99, max(lo - 1, 0))[i % 3]
    out, values = torch.zeros(10_000), torch.zeros(10_000)
    columns = torch.arange(10_000).flip(0).to(index)
    for found, at in ((out, torch.arange(10_000)), (values, columns.long())):
        inside = (colors >= lo) & (colors < lo + rows)
        wanted = torch.zeros(10_000)
        wanted[inside] = products[colors[inside].long() - lo, at[inside]]
        if found is out:
            native.gather_diagonal(products, lo, out=found, colors=colors)
        else:
            native.decompress(products, lo, colors, columns, found)
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("lo", [2**31 - 1, 2**32, 2**32 + 1, 2**63 - 3])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_no_color_is_among_rows_beyond_all_colors(lo: int, index: torch.dtype) -> None:
    products, colors = torch.ones(3, 5), torch.tensor([0, 1, 2, 0, 1], dtype=index)
    out = torch.zeros(5)
    native.gather_diagonal(products, lo, out=out, colors=colors)
    native.decompress(products, lo, colors, torch.arange(5), out)
    assert not out.any()


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@given(st.sampled_from(DTYPES), index_dtypes, st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_compress_sums_the_columns_of_each_color(
    dtype: torch.dtype, index: torch.dtype, rows: int, columns: int, ncolors: int
) -> None:
    matrix = numbers((rows, columns), dtype)
    matrix = matrix * (integers(0, 2, rows * columns, torch.int64).view(rows, columns) == 0)
    for by, size in (("columns", columns), ("rows", rows)):
        colors = integers(-1, ncolors - 1, size, index)
        seeds = reference.seed_rows(0, ncolors, size, dtype=dtype, device="cpu", colors=colors)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        expected = seeds.to(wide) @ (matrix.t() if by == "columns" else matrix).to(wide)
        for given_as in (matrix, matrix.to_sparse_csr()):
            found = native.compress(given_as, colors, ncolors, by=by)
            tolerance = 2e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-5
            torch.testing.assert_close(found, expected.to(dtype), rtol=tolerance, atol=tolerance)


def test_what_was_compressed_is_decompressed_again() -> None:
    matrix = torch.diag(torch.arange(1.0, 8.0)) + torch.diag(torch.arange(11.0, 17.0), 1)
    colors = torch.arange(7) % 2
    products = native.compress(matrix, colors, 2)
    rows, columns = matrix.nonzero(as_tuple=True)
    values = torch.zeros(rows.numel())
    for lo in (0, 1):
        native.decompress(products[lo : lo + 1], lo, colors[columns], rows, values)
    assert torch.equal(values, matrix[rows, columns])


@pytest.mark.parametrize("index", INDEX_DTYPES)
def test_offsets_beyond_32_bits_of_bytes_are_reached(index: torch.dtype) -> None:
    """A view into 8 GiB of address space, of which a few pages are touched."""
    columns = (1 << 31) + 8
    products = torch.empty(1, dtype=torch.uint8).new_empty(columns)[None]
    products[0, -1] = 42
    out = torch.zeros(1, dtype=torch.uint8)
    native.decompress(products, 0, torch.zeros(1, dtype=index), torch.tensor([columns - 1]), out)
    assert out.item() == 42
    block = torch.empty(2, columns, dtype=torch.uint8)
    native.scatter_rows_([block[:, -8:]], [torch.full((1, 8), 7, dtype=torch.uint8)], 1)
    assert block[1, -8:].tolist() == [7] * 8
