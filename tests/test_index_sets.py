"""Interned index sets, compiled and not: their unions, couplings and largest ones against plain sets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchzygote import native
from torchzygote.native import index_sets, reference_sets
from torchzygote.sparsity._sets import ID, IndexSets


def members(sets: IndexSets, ids: Tensor) -> list[frozenset[int]]:
    bounds = sets.ptr.tolist()
    return [frozenset(sets.members[bounds[i] : bounds[i + 1]].tolist()) for i in ids.reshape(-1).tolist()]


@pytest.mark.parametrize("compiled", [True, False])
def test_unions_against_python_sets(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and not native.info()["devices"]:
        pytest.skip("the native library is not there")
    if not compiled:
        for name in ("unite_pairs", "unite_groups", "expand_pairs"):
            monkeypatch.setattr(index_sets, name, getattr(reference_sets, name))
    for trial in range(30):
        torch.manual_seed(trial)
        sets = IndexSets(trial % 9 + 1, 10**6)
        for _ in range(4):
            a = torch.randint(0, sets.count, (5, 4)).to(ID)
            b = torch.randint(0, sets.count, (4,)).to(ID)
            expected = [x | y for x, y in zip(members(sets, a), members(sets, b.expand(5, 4)), strict=True)]
            assert members(sets, sets.unite(a, b)) == expected
            found = members(sets, a)
            columns = [frozenset().union(*found[j::4]) for j in range(4)]
            assert members(sets, sets.unite_dims(a, [0])) == columns
        everything = [sets.members[sets.ptr[i] : sets.ptr[i + 1]].tolist() for i in range(sets.count)]
        assert everything == [sorted(set(each)) for each in everything]


@pytest.mark.parametrize("blocks", [[0, 9], [0, 4, 9], [0, 3, 3, 6, 9]])
@pytest.mark.parametrize("compiled", [True, False])
def test_couplings_against_a_dense_matrix(blocks: list[int], compiled: bool) -> None:
    expand = index_sets.expand_pairs if compiled else reference_sets.expand_pairs
    for trial in range(20):
        torch.manual_seed(trial)
        sets = IndexSets(9, 10**6)
        sets.unite(torch.randint(0, 10, (30,)).to(ID), torch.randint(0, 10, (30,)).to(ID))
        sets.unite(torch.randint(0, sets.count, (9,)).to(ID), torch.randint(0, sets.count, (9,)).to(ID))
        a, b = torch.randint(0, sets.count, (2, 6))
        indptr, indices = expand(sets.ptr, sets.members, a, b, torch.tensor(blocks), 10**6)
        expected = torch.zeros(9, 9, dtype=torch.bool)
        for first, second in zip(members(sets, a), members(sets, b), strict=True):
            for i in first:
                for j in second:
                    if sum(i >= bound for bound in blocks) == sum(j >= bound for bound in blocks):
                        expected[i, j] = expected[j, i] = True
        rows = torch.repeat_interleave(torch.arange(9), indptr.diff())
        found = torch.zeros(9, 9, dtype=torch.bool)
        found[rows, indices] = True
        assert torch.equal(found, expected)
        assert indices.numel() == int(expected.sum())
        assert expand(sets.ptr, sets.members, a, b, torch.tensor(blocks), 0)[0].numel() in (0, 10)


@pytest.mark.parametrize("members_each", [3, 200])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_compiled_couplings_are_those_of_the_specification(members_each: int, index: torch.dtype) -> None:
    """Rows with few columns far apart, and with many close ones; several parts of them."""
    size = 9000
    starts = torch.randint(0, size - 800, (60,))
    found = [start + torch.randperm(800)[:members_each].sort().values for start in starts]
    ptr = torch.tensor([0, 0, *(members_each * (k + 1) for k in range(60))])
    m = torch.cat(found).to(index)
    a, b = torch.randint(0, 61, (2, 25))
    for bounds in (torch.tensor([0, size]), torch.tensor([0, 100, 4500, 4500, size])):
        expected = reference_sets.expand_pairs(ptr, m, a, b, bounds, 10**8)
        indptr, indices = index_sets.expand_pairs(ptr, m, a, b, bounds, 10**8)
        assert torch.equal(indptr, expected[0])
        assert torch.equal(indices, expected[1])
        assert index_sets.expand_pairs(ptr, m, a, b, bounds, int(indptr[-1]) // 9)[0].numel() == 0


def test_compiled_couplings_refuse_what_does_not_fit() -> None:
    if not native.info()["devices"]:
        pytest.skip("the native library is not there")
    ptr, m, bounds = torch.tensor([0, 0, 1]), torch.tensor([3], dtype=ID), torch.tensor([0, 2])
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="set_members: expected values from 0 to 1, got 3"):
        index_sets.expand_pairs(ptr, m, one, one, bounds, 10)
    with pytest.raises(ValueError, match="first"):
        index_sets.expand_pairs(ptr, m, torch.tensor([5]), one, torch.tensor([0, 4]), 10)
    with pytest.raises(ValueError, match="second: expected shape"):
        index_sets.expand_pairs(ptr, m, one, torch.tensor([1, 1]), torch.tensor([0, 4]), 10)


def test_equal_sets_do_not_take_each_other_for_larger_ones() -> None:
    sets = IndexSets(3, 1000, nested=True)
    ids = torch.tensor([[1, 2], [2, 3], [1, 3]], dtype=ID)
    a = sets.unite(sets.unite(ids[:1, 0], ids[:1, 1]), ids[1:2, 1])
    b = sets.unite(sets.unite(ids[1:2, 0], ids[1:2, 1]), ids[:1, 0])
    sets.unite(a, b)
    sets.unite(b, a)
    coupled = torch.zeros(sets.count, dtype=torch.bool)
    coupled[[int(a), int(b), 1, 2]] = True
    outermost = sets.outermost(coupled)
    assert members(sets, outermost[[int(a)]]) == [frozenset({0, 1, 2})]
    assert members(sets, outermost[[1, 2]]) == [frozenset({0, 1, 2})] * 2


@pytest.mark.parametrize("compiled", [True, False])
def test_a_large_set_is_searched_for_small_ones(compiled: bool) -> None:
    if compiled and not native.info()["devices"]:
        pytest.skip("the native library is not there")
    module = index_sets if compiled else reference_sets
    # 1 to 300: one member each; 301: the even ones up to 400; 302: three of them; 303: two and an odd one
    large = list(range(0, 400, 2))
    rows = [[], *([i] for i in range(300)), large, [0, 8, 398], [2, 4, 399]]
    ptr = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    m = torch.tensor([i for row in rows for i in row], dtype=ID)

    def result(found: tuple[Tensor, Tensor, Tensor]) -> list[list[int]]:
        ids, sizes, new = found
        known = [*rows, *(part.tolist() for part in new.split(sizes.tolist()))]
        return [known[i] for i in ids.tolist()]

    singles = torch.arange(1, 301, dtype=ID)
    first, second = torch.cat([singles, torch.tensor([302, 301, 303], dtype=ID)]), torch.full((303,), 301)
    second[301] = 302
    unions = [sorted({*rows[i], *rows[j]}) for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    found = module.unite_pairs(ptr, m, first, second.to(ID), 10**6)
    assert result(found) == unions
    assert (found[0] == 301).sum() == 152
    groups = torch.tensor([1, 3, 301, 301, 1, 2, 302, 301, 303, 301, 0, 0, 301, 301], dtype=ID)
    ends = torch.tensor([0, 4, 8, 10, 12, 14])
    found = module.unite_groups(ptr, m, ends, groups, 10**6)
    expected = [large, sorted({*large, 1}), sorted({*large, 399}), [], large]
    assert [*result(found)[:3], *result(found)[3:]] == expected
    assert found[0][[0, 3, 4]].tolist() == [301, 0, 301]


@pytest.mark.parametrize("compiled", [True, False])
def test_what_is_read_is_limited_too(compiled: bool) -> None:
    """Unions that are all one and the same are stored once, and yet each takes its time."""
    if compiled and not native.info()["devices"]:
        pytest.skip("the native library is not there")
    module = index_sets if compiled else reference_sets
    n, count = 20_000, 1500
    whole = torch.arange(n, dtype=ID)  # sets 1 and on: all but one member, which is another one each time
    m = torch.cat([whole[whole != i] for i in range(count)])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(count + 1) * (n - 1)])
    first = torch.arange(1, count, dtype=ID)
    assert module.unite_pairs(ptr, m, first, first + 1, 10**5)[0].numel() == 0
    few = first[:20]
    ids, sizes, _ = module.unite_pairs(ptr, m, few, few + 1, 10**5)
    assert sizes.tolist() == [n]
    assert ids.unique().numel() == 1
