"""Unions of index sets and colorings: the compiled ones agree with the plain ones, for any input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_samples import INDEX_DTYPES, needs_library

from torchzygote import native
from torchzygote.coloring import greedy
from torchzygote.native import index_sets, reference, reference_sets

pytestmark = needs_library

some_sets = st.lists(st.frozensets(st.integers(0, 30), min_size=1, max_size=12), max_size=12, unique=True)
groups_of = st.lists(st.lists(st.integers(0, 10**6), max_size=25), max_size=30)


def pointers(lists: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.tensor([0] + [len(entry) for entry in lists]).cumsum(0)
    return ends, torch.tensor([x for entry in lists for x in entry], dtype=torch.int64)


@given(some_sets, st.booleans(), groups_of)
def test_unions_agree_with_the_reference(
    sets: list[frozenset[int]], with_empty: bool, groups: list[list[int]]
) -> None:
    ordered = ([[]] if with_empty else []) + [sorted(members) for members in sets]
    ptr, members = pointers(ordered)
    chosen = [[i % len(ordered) for i in group] if ordered else [] for group in groups]
    group_ptr, ids = pointers(chosen)
    found = native.unite_sets(ptr, members, group_ptr, ids)
    expected = reference.unite_sets(ptr, members, group_ptr, ids)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    united_ids, new_ptr, new_members = (x.tolist() for x in found)
    for group, i in zip(chosen, united_ids, strict=True):
        union = frozenset().union(*(ordered[s] for s in group)) if group else frozenset()
        assert new_members[new_ptr[i] : new_ptr[i + 1]] == sorted(union)


@given(some_sets, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), max_size=40))
def test_pairs_agree_with_the_reference(sets: list[frozenset[int]], pairs: list[tuple[int, int]]) -> None:
    ordered = [[]] + [sorted(members) for members in sets]
    ptr, members = pointers(ordered)
    members = members.to(torch.int32)
    first = torch.tensor([a % len(ordered) for a, _ in pairs], dtype=torch.int32)
    second = torch.tensor([b % len(ordered) for _, b in pairs], dtype=torch.int32)
    ids, sizes, new = index_sets.unite_pairs(ptr, members, first, second, 10**6)
    other_ids, other_sizes, other = reference_sets.unite_pairs(ptr, members, first, second, 10**6)
    assert sizes.sum() == other_sizes.sum()
    assert sizes.numel() == other_sizes.numel()

    def meant(ids: torch.Tensor, sizes: torch.Tensor, new: torch.Tensor) -> list[list[int]]:
        ends = torch.cat([ptr, ptr[-1] + sizes.cumsum(0)]).tolist()
        everything = torch.cat([members, new]).tolist()
        return [everything[ends[i] : ends[i + 1]] for i in ids.tolist()]

    assert meant(ids, sizes, new) == meant(other_ids, other_sizes, other)


def test_a_limit_on_new_members_gives_nothing() -> None:
    ptr, members = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 5], dtype=torch.int32)
    one, two = torch.tensor([1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    assert index_sets.unite_pairs(ptr, members, one, two, 2)[0].tolist() == [3]
    assert index_sets.unite_pairs(ptr, members, one, two, 1)[0].numel() == 0


def test_many_batches_of_large_and_small_groups_share_their_unions() -> None:
    count = 100_000
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(201)])
    members = torch.arange(200, dtype=torch.int32)
    first = torch.randint(1, 201, (count,), dtype=torch.int32)
    second = torch.randint(1, 201, (count,), dtype=torch.int32)
    ids, sizes, _ = index_sets.unite_pairs(ptr, members, first, second, 10**7)
    keys = torch.stack([torch.minimum(first, second), torch.maximum(first, second)], 1)
    assert sizes.numel() == keys[first != second].unique(dim=0).shape[0]
    assert torch.equal(ids[first == second], first[first == second])
    wide = torch.arange(200, dtype=torch.int32)
    ends = torch.arange(count // 200 + 1) * 200
    again = (wide + 1).repeat(count // 200)
    ids, sizes, _ = index_sets.unite_groups(ptr, members, ends, again, 10**7)
    assert sizes.tolist() == [200]
    assert ids.unique().numel() == 1


@given(
    st.integers(0, 25),
    st.integers(0, 25),
    st.floats(0, 1),
    st.integers(0, 10**6),
    st.sampled_from(INDEX_DTYPES),
)
def test_colorings_agree_with_the_plain_ones(
    rows: int, columns: int, density: float, seed: int, index: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pattern = torch.rand(rows, columns, generator=generator) < density
    square = torch.rand(rows, rows, generator=generator) < density**2
    for kind in greedy.KINDS:
        chosen = pattern if kind.startswith("distance2") else square | square.t()
        ptr = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
        indices = chosen.nonzero()[:, 1].to(index)
        for order in greedy.ORDERS:
            found = native.color_graph(ptr, indices, chosen.shape[1], kind, order)
            assert found is not None
            assert torch.equal(found, greedy.color_graph(ptr, indices, chosen.shape[1], kind, order))


def test_long_rows_are_colored_as_short_ones_are() -> None:
    pattern = torch.rand(300, 400) < 0.9
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), pattern.sum(1).cumsum(0)])
    indices = pattern.nonzero()[:, 1].contiguous()
    for kind in ("distance2_rows", "distance2_columns"):
        found = native.color_graph(ptr, indices, 400, kind, "largest_first")
        assert found is not None
        assert torch.equal(found, greedy.color_graph(ptr, indices, 400, kind, "largest_first"))


@pytest.mark.parametrize("order", greedy.ORDERS)
@pytest.mark.parametrize("permuted", [False, True])
def test_stars_of_long_rows_are_colored_as_those_of_short_ones(order: str, permuted: bool) -> None:
    """A clique, vertices that meet far more colors than they have neighbors, and a part at random."""
    matrix = torch.zeros(900, 900, dtype=torch.bool)
    matrix[:600, :600] = True
    for v in range(600, 640):
        matrix[v, torch.randperm(600)[:70]] = True
    matrix[640:, 640:] = torch.rand(260, 260) < 0.4
    matrix[640:, :640] = torch.rand(260, 640) < 0.01
    matrix |= matrix.t().clone()
    if permuted:
        places = torch.randperm(900)
        matrix = matrix[places][:, places]
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), matrix.sum(1).cumsum(0)])
    indices = matrix.nonzero()[:, 1].contiguous()
    found = native.color_graph(ptr, indices, 900, "star", order)
    assert found is not None
    assert torch.equal(found, greedy.color_graph(ptr, indices, 900, "star", order))


def graph(**changes: object) -> dict:
    sample = {
        "indptr": torch.tensor([0, 1, 2]),
        "indices": torch.tensor([1, 0]),
        "ncols": 2,
        "kind": "star",
        "order": "natural",
    }
    return {**sample, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (graph(kind="rainbow"), "kind: expected one of .* got 'rainbow'"),
        (graph(order="random"), "order: expected one of .* got 'random'"),
        (graph(indptr=torch.tensor([0, 3, 2])), "indptr: expected ascending values from 0 to 2"),
        (graph(indptr=torch.tensor([0, 1, 3])), "indptr: expected ascending values from 0 to 2"),
        (graph(indices=torch.tensor([1, 2])), "indices: expected less than 2, got 2"),
        (graph(indices=torch.tensor([1, -1])), "indices: expected at least 0, got -1"),
        (graph(indices=torch.tensor([1.0, 0.0])), "indices: expected int64 or int32"),
        (graph(ncols=3), "ncols: expected a square pattern"),
        (graph(indptr=torch.tensor([0, 1, 2, 2]), indices=torch.tensor([2, 2]), ncols=3), "symmetric"),
    ],
)
def test_colorings_refuse_what_is_no_pattern(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        native.color_graph(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_ids": torch.tensor([0, 2])}, "group_ids: expected less than 2, got 2"),
        ({"group_ids": torch.tensor([0, -1])}, "group_ids: expected at least 0, got -1"),
        ({"group_ptr": torch.tensor([0, 3])}, "group_ptr: expected ascending values from 0 to 2"),
        ({"group_ptr": torch.tensor([2, 1])}, "group_ptr: expected ascending values from 0 to 2"),
        ({"set_ptr": torch.tensor([0, 5, 2])}, "set_ptr: expected ascending values from 0 to 2"),
        ({"set_ptr": torch.tensor([0.0, 1.0, 2.0])}, "set_ptr: expected int64"),
        ({"set_members": torch.tensor([3.0, 5.0])}, "set_members: expected int64 or int32"),
    ],
)
def test_unions_refuse_what_is_no_set(changes: dict, message: str) -> None:
    sample = {
        "set_ptr": torch.tensor([0, 1, 2]),
        "set_members": torch.tensor([3, 5]),
        "group_ptr": torch.tensor([0, 2]),
        "group_ids": torch.tensor([0, 1]),
    }
    with pytest.raises(ValueError, match=message):
        native.unite_sets(**{**sample, **changes})
