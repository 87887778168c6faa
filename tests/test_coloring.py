"""Colorings: valid by definition, first fit by trial, and with the numbers of colors that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from coloring_checks import VALID, greedy, is_star
from hypothesis import given
from hypothesis import strategies as st

from torchzygote.coloring import choice, color
from torchzygote.coloring.choice import is_least, refined
from torchzygote.coloring.greedy import KINDS, ORDERS, color_graph
from torchzygote.coloring.recovery import jacobian_recovery, symmetric_recovery, symmetrized
from torchzygote.sparsity.pattern import Pattern


def pattern_of(matrix: np.ndarray) -> Pattern:
    return Pattern.from_dense(torch.as_tensor(np.asarray(matrix, dtype=np.int64)))


def banded(n: int, lower: int, upper: int) -> np.ndarray:
    i = np.arange(n)
    offset = i[None, :] - i[:, None]
    return ((offset <= upper) & (offset >= -lower)).astype(int)


def arrowhead(n: int, last: bool = False) -> np.ndarray:
    matrix = np.eye(n, dtype=int)
    hub = n - 1 if last else 0
    matrix[hub, :] = matrix[:, hub] = 1
    return matrix


def stencil(height: int, width: int, periodic: bool) -> np.ndarray:
    """Five points in the plane."""
    index = np.arange(height * width).reshape(height, width)
    matrix = np.eye(height * width, dtype=int)
    for axis in (0, 1):
        for shift in (1, -1):
            other = np.roll(index, shift, axis)
            keep = np.ones_like(index, dtype=bool)
            if not periodic:
                edge = 0 if shift == 1 else -1
                keep[(edge, slice(None)) if axis == 0 else (slice(None), edge)] = False
            matrix[index[keep], other[keep]] = 1
    return matrix


matrices = st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 0.6), st.integers(0, 2**32 - 1))


def random_matrix(drawn: tuple[int, int, float, int], symmetric: bool) -> np.ndarray:
    rows, columns, density, seed = drawn
    generator = np.random.default_rng(seed)
    if not symmetric:
        return (generator.random((rows, columns)) < density).astype(int)
    half = np.triu(generator.random((rows, rows)) < density)
    return (half | half.T).astype(int)


@pytest.mark.parametrize("kind", KINDS)
@given(drawn=matrices)
def test_any_pattern_gets_the_first_fit_and_a_valid_one(
    kind: str, drawn: tuple[int, int, float, int]
) -> None:
    matrix = random_matrix(drawn, symmetric=kind in ("distance1", "star"))
    pattern = pattern_of(matrix)
    for order in ORDERS:
        colors = color_graph(pattern.indptr, pattern.indices, matrix.shape[1], kind, order).tolist()
        assert VALID[kind](matrix, colors)
        if order == "natural":
            assert colors == greedy(matrix, kind, range(len(colors)))
    chosen = color(pattern, kind)
    assert VALID[kind](matrix, chosen.colors.tolist())
    assert chosen.ncolors == len(set(chosen.colors.tolist()))


@pytest.mark.parametrize(("lower", "upper"), [(0, 0), (0, 1), (1, 1), (1, 2), (3, 0), (4, 5)])
@pytest.mark.parametrize("kind", ["distance2_rows", "distance2_columns"])
def test_a_band_needs_as_many_colors_as_it_is_wide(lower: int, upper: int, kind: str) -> None:
    chosen = color(pattern_of(banded(40, lower, upper)), kind)
    assert chosen.ncolors == lower + upper + 1
    assert torch.equal(chosen.colors, torch.arange(40) % (lower + upper + 1))


@pytest.mark.parametrize("half", [1, 2, 5, 10])
def test_a_symmetric_band_in_star_and_distance1_colors(half: int) -> None:
    """With rho bands off the diagonal: 2 floor(rho/2) + 1 star colors (published), half + 1 for neighbors."""
    pattern = pattern_of(banded(300, half, half))
    assert color(pattern, "star").ncolors == 2 * half + 1
    assert color(pattern, "distance1").ncolors == half + 1


@pytest.mark.parametrize("last", [False, True])
def test_an_arrowhead_needs_two_symmetric_colors_and_all_columns_otherwise(last: bool) -> None:
    """In natural order with the hub last, first fit gives every leaf the color 0 as well."""
    pattern = pattern_of(arrowhead(30, last))
    assert color(pattern, "star").ncolors == 2
    assert color(pattern, "distance1").ncolors == 2
    assert color(pattern, "distance2_columns").ncolors == 30
    assert color(pattern, "distance2_rows").ncolors == 30


def test_block_diagonals_need_the_size_of_the_largest_block() -> None:
    sizes = [3, 1, 5, 2, 5]
    matrix = np.zeros((16, 16), dtype=int)
    start = 0
    for size in sizes:
        matrix[start : start + size, start : start + size] = 1
        start += size
    for kind in KINDS:
        assert color(pattern_of(matrix), kind).ncolors == 5


@pytest.mark.parametrize("periodic", [False, True])
def test_five_point_stencils(periodic: bool) -> None:
    """A row has five entries, so five colors at least; a grid is bipartite, so two for the diagonal."""
    matrix = stencil(10, 10, periodic)
    pattern = pattern_of(matrix)
    assert color(pattern, "distance1").ncolors == 2
    assert 5 <= color(pattern, "distance2_columns").ncolors <= 10
    star = color(pattern, "star")
    assert 4 <= star.ncolors <= 10
    assert is_star(matrix, star.colors.tolist())


# The symmetric matrices of two papers' figures: figure 4.1 of "What color is your Jacobian?", and figure 1 of
# "Efficient computation of sparse Hessians using coloring and automatic differentiation"; their star
# colorings there have 3 and 5 colors.
FIGURES = {
    3: ["110000", "111011", "011100", "001101", "010010", "010101"],
    5: [
        "1100001000",
        "1110100000",
        "0111010000",
        "0011000001",
        "0100110100",
        "0010110010",
        "1000001100",
        "0000101110",
        "0000010111",
        "0001000011",
    ],
}


@pytest.mark.parametrize("published", FIGURES)
def test_published_star_colorings_are_not_beaten_by_ours(published: int) -> None:
    matrix = np.array([[int(c) for c in row] for row in FIGURES[published]])
    assert np.array_equal(matrix, matrix.T)
    chosen = color(pattern_of(matrix), "star")
    assert is_star(matrix, chosen.colors.tolist())
    assert chosen.ncolors <= published


def test_the_better_order_is_taken() -> None:
    """A crown in alternating order: natural first fit needs half of the vertices as colors, but two do."""
    half = 6
    matrix = np.eye(2 * half, dtype=int)
    for i in range(half):
        for j in range(half):
            if i != j:
                matrix[2 * i, 2 * j + 1] = matrix[2 * j + 1, 2 * i] = 1
    pattern = pattern_of(matrix)
    natural = color_graph(pattern.indptr, pattern.indices, 2 * half, "distance1", "natural")
    assert int(natural.max()) + 1 == half
    chosen = color(pattern, "distance1")
    by_order = [
        int(color_graph(pattern.indptr, pattern.indices, 2 * half, "distance1", order).max()) + 1
        for order in ORDERS
    ]
    assert chosen.ncolors == min(by_order)


@given(drawn=st.tuples(st.integers(1, 6), st.just(0), st.floats(0, 1), st.integers(0, 2**32 - 1)))
def test_what_counts_as_least_can_not_be_beaten(drawn: tuple[int, int, float, int]) -> None:
    """All assignments of one color less, one by one: none is a star coloring."""
    matrix = random_matrix(drawn, symmetric=True)
    pattern = pattern_of(matrix)
    found = color(pattern, "star")
    for ncolors in range(1, found.ncolors + 1):
        if is_least(pattern, found._replace(ncolors=ncolors)):
            assignments = itertools.product(range(ncolors - 1), repeat=len(matrix))
            assert not any(is_star(matrix, list(colors)) for colors in assignments)


def test_a_coloring_that_can_not_be_beaten_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[str] = []
    plain = choice._color_graph

    def counted(*arguments: object) -> torch.Tensor:
        orders.append(str(arguments[-1]))
        return plain(*arguments)

    monkeypatch.setattr(choice, "_color_graph", counted)
    block = banded(300, 1, 1)
    block[:100, :100] = 1
    assert color(pattern_of(block), "star").ncolors == 100
    assert orders == ["natural"]
    for kind in KINDS:
        assert color(pattern_of(np.ones((20, 20), dtype=int)), kind).ncolors == 20
    assert orders == ["natural"]  # a full pattern is known at once


def test_large_cliques_take_a_color_for_each() -> None:
    """Of 2400 vertices in a moment: the work is in proportion to the entries, where it was to rows cubed."""
    pattern = Pattern.from_dense(torch.ones(2400, 2400))
    colors = choice._color_graph(pattern.indptr, pattern.indices, 2400, "star", "natural")
    assert torch.equal(colors.sort().values, torch.arange(2400))


def test_dense_and_empty_patterns() -> None:
    full = Pattern.full((3, 5))
    assert color(full, "distance2_columns").colors.tolist() == [0, 1, 2, 3, 4]
    assert color(full, "distance2_rows").colors.tolist() == [0, 1, 2]
    empty = pattern_of(np.zeros((3, 4), dtype=int))
    assert color(empty, "distance2_columns").colors.tolist() == [0, 0, 0, 0]
    assert color(pattern_of(np.zeros((0, 0), dtype=int)), "star").ncolors == 0


def test_more_than_64_and_128_colors() -> None:
    for n in (64, 65, 130, 200):
        pattern = pattern_of(np.ones((n, n), dtype=int))
        for kind in KINDS:
            assert color(pattern, kind).ncolors == n


def test_unknown_words_are_refused() -> None:
    pattern = pattern_of(np.eye(2, dtype=int))
    with pytest.raises(ValueError, match="kind: expected one of .* got 'rainbow'"):
        color_graph(pattern.indptr, pattern.indices, 2, "rainbow", "natural")
    with pytest.raises(ValueError, match="order: expected one of .* got 'random'"):
        color_graph(pattern.indptr, pattern.indices, 2, "star", "random")


@pytest.mark.parametrize("mode", ["forward", "reverse", "auto"])
@given(drawn=matrices, split=st.integers(0, 9))
def test_jacobian_entries_are_found_among_their_products(
    mode: str, drawn: tuple[int, int, float, int], split: int
) -> None:
    """Of one matrix, and of two side by side that share their products."""
    matrix = random_matrix(drawn, symmetric=False)
    matrix = matrix * np.arange(1, matrix.size + 1).reshape(matrix.shape)
    split = min(split, matrix.shape[1])
    parts = [torch.as_tensor(matrix[:, :split]), torch.as_tensor(matrix[:, split:])]
    recovery = jacobian_recovery([Pattern.from_dense(part) for part in parts], mode)
    assert recovery is not None
    seeds = torch.nn.functional.one_hot(recovery.coloring.colors, max(1, recovery.ncolors)).T
    if recovery.mode == "forward":
        products = [seeds @ torch.as_tensor(matrix).T] * 2
    else:
        products = [seeds @ part for part in parts]
    for i, (part, product) in enumerate(zip(parts, products, strict=True)):
        row, column = recovery.slots(i, torch.device("cpu"))
        pattern = Pattern.from_dense(part)
        assert torch.equal(product[row, column], part[pattern.rows(), pattern.indices])


@given(drawn=matrices)
def test_symmetric_entries_and_diagonals_are_found_among_their_products(
    drawn: tuple[int, int, float, int],
) -> None:
    matrix = random_matrix(drawn, symmetric=True)
    matrix = torch.as_tensor(matrix * (1 + np.add.outer(np.arange(len(matrix)), np.arange(len(matrix))) ** 2))
    pattern = Pattern.from_dense(matrix)
    for diagonal in (False, True):
        recovery = symmetric_recovery(pattern, diagonal=diagonal)
        seeds = torch.nn.functional.one_hot(recovery.coloring.colors, max(1, recovery.ncolors)).T
        products = seeds @ matrix
        row, column = recovery.slots(0, torch.device("cpu"))
        expected = matrix.diagonal() if diagonal else matrix[pattern.rows(), pattern.indices]
        assert torch.equal(products[row, column], expected)


def test_the_cheaper_mode_is_chosen_and_too_many_products_are_refused() -> None:
    tall = np.zeros((60, 3), dtype=int)
    tall[:, 0] = 1
    tall[np.arange(60), 1 + np.arange(60) % 2] = 1
    chosen = jacobian_recovery([pattern_of(tall)])
    assert chosen is not None
    assert (chosen.mode, chosen.ncolors) == ("forward", 2)
    chosen = jacobian_recovery([pattern_of(tall.T)])
    assert chosen is not None
    assert (chosen.mode, chosen.ncolors) == ("reverse", 2)
    assert jacobian_recovery([pattern_of(np.ones((50, 50), dtype=int))], most=20) is None


def test_half_a_symmetric_pattern_is_completed() -> None:
    full = pattern_of(banded(6, 1, 1))
    assert symmetrized(pattern_of(banded(6, 0, 1))) == full
    assert symmetrized(full) is full


@pytest.mark.parametrize("kind", ["distance2_rows", "distance2_columns"])
@given(drawn=matrices)
def test_refining_keeps_a_coloring_valid_and_never_adds_colors(
    kind: str, drawn: tuple[int, int, float, int]
) -> None:
    matrix = random_matrix(drawn, symmetric=False)
    pattern = pattern_of(matrix)
    first = color(pattern, kind)
    better = refined(pattern, first)
    assert better.ncolors <= first.ncolors
    assert VALID[kind](matrix, better.colors.tolist())
    assert better.ncolors == len(set(better.colors.tolist()))


def test_refining_saves_colors_on_a_periodic_stencil() -> None:
    matrix = np.kron(np.ones((2, 2), dtype=int), stencil(16, 16, True))
    pattern = pattern_of(matrix)
    first = color(pattern, "distance2_columns")
    better = refined(pattern, first)
    assert VALID["distance2_columns"](matrix, better.colors.tolist())
    assert better.ncolors < first.ncolors
