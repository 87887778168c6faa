"""Operators on symmetric blocks and on tangents, for the CPU alone, against the same in PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_samples import layouts, mirrored, needs_library, numbers

from torchzygote.native.elementwise import push_elementwise, push_elementwise_plainly
from torchzygote.native.mirrored import mirrored_blocks, mirrored_blocks_plainly, read_blocks

pytestmark = needs_library

WIDTHS = [[1, 1], [2], [1, 2], [3], [2, 0, 1], [1, 3], [1, 1, 1, 1], [4]]


@given(
    st.sampled_from([torch.float32, torch.float64]),
    layouts,
    st.sampled_from(WIDTHS),
    st.integers(0, 200),
    st.integers(0, 3),
    st.integers(0, 1 << 20),
    st.booleans(),
)
def test_mirrored_blocks_are_read_and_compared(
    dtype: torch.dtype, layout: str, widths: list[int], blocks: int, kind: int, where: int, flat: bool
) -> None:
    products, shifts, scales, entries = mirrored(widths, blocks, dtype, layout)
    if flat:  # vectors may be strided
        products = [torch.stack([x.reshape(-1), x.reshape(-1)], 1)[:, 1] for x in products]
    product = products[where % len(products)]
    changed = kind > 0 and product.numel() > 0
    if changed:  # one element isn't what it was
        at = tuple(where % n for n in product.shape)
        product[at] = (0.0, product[at] + 0.5, math.inf, math.nan)[kind]
    found, agree = mirrored_blocks(products, shifts, scales, widths, 1e-6)
    expected, told = mirrored_blocks_plainly(products, shifts, scales, widths, 1e-6)
    assert [x.shape for x in found] == [(blocks * width,) for width in widths]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert (agree.dtype, agree.shape) == (told.dtype, told.shape) == (torch.bool, ())
    assert bool(agree) == bool(told)
    if changed:
        assert kind == 1 or not bool(agree)
    else:
        assert bool(agree)
        assert torch.equal(read_blocks(products, shifts, scales, widths), entries)
        diagonal = entries.diagonal(dim1=1, dim2=2)
        for part, x in zip(torch.split(diagonal, widths, 1), found, strict=True):
            assert torch.equal(part.reshape(-1), x)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("run", [mirrored_blocks, mirrored_blocks_plainly])
def test_blocks_that_are_not_symmetric_are_told_in_every_place(widths: list[int], run: Any) -> None:
    k, blocks = sum(widths), 5000
    products, shifts, scales, _ = mirrored(widths, blocks, torch.float64)
    assert bool(run(products, shifts, scales, widths, 1e-12)[1])
    for c in range(k):
        for i, width in enumerate(widths):
            for row in range(width):
                for block in (0, 17, blocks - 1):
                    on_it = sum(widths[:i]) + row == (c + int(shifts[block])) % k
                    changed = [x.clone() for x in products]
                    changed[c * len(widths) + i][block, row] += 0.0 if on_it else 1.0
                    assert bool(run(changed, shifts, scales, widths, 1e-6)[1]) == on_it


@given(
    st.sampled_from([torch.float32, torch.float64]),
    layouts,
    st.integers(0, 5),
    st.integers(0, 40),
    st.integers(0, 70),
    st.sampled_from([(False, ""), (True, ""), (False, "tanh"), (False, "sigmoid")]),
    st.booleans(),
)
def test_tangents_are_pushed_through_functions_of_elements(
    dtype: torch.dtype,
    layout: str,
    rows: int,
    samples: int,
    within: int,
    way: tuple[bool, str],
    overwrite: bool,
) -> None:
    squared, function = way
    tangents = numbers((rows, samples, within), dtype, layout)
    slope, weight = (numbers((samples, within), dtype, layout, seed) for seed in (1, 2))
    given = [x.clone() for x in (tangents, slope, weight)]
    expected, sums = push_elementwise_plainly(*given, squared=squared, function=function)
    found, terms = push_elementwise(
        tangents, slope, weight, squared=squared, function=function, overwrite=overwrite
    )
    eps = torch.finfo(dtype).eps  # a difference from one is rounded otherwise in one step
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * eps if function else 0)
    torch.testing.assert_close(terms, sums, rtol=1e3 * eps, atol=1e4 * eps)
    written = overwrite and tangents.is_contiguous()
    assert written == (found.data_ptr() == tangents.data_ptr()) or found.numel() == 0
    assert torch.equal(tangents, found if written else given[0])
    assert torch.equal(slope, given[1])
    assert torch.equal(weight, given[2])


@pytest.mark.parametrize("shape", [(2, 70_000, 3), (3, 5, 40_000), (40_000, 2, 3)])
def test_many_tangents_are_divided_among_threads_without_gaps(shape: tuple[int, int, int]) -> None:
    tangents = numbers(shape, torch.float64)
    slope, weight = (numbers(shape[1:], torch.float64, seed=seed) for seed in (1, 2))
    expected, sums = push_elementwise_plainly(tangents, slope, weight, squared=True)
    found, terms = push_elementwise(tangents, slope, weight, squared=True)
    assert torch.equal(found, expected)
    torch.testing.assert_close(terms, sums)
