"""The check of a plan by tables: the same verdict as by scattering, for right values and for wrong ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchzygote import plan_jacobian
from torchzygote._certificate import Comparison, agreement, probe_rows
from torchzygote._colored import Collected
from torchzygote._plans.check_tables import check_tables
from torchzygote.coloring.recovery import Recovery, jacobian_recovery, symmetric_recovery
from torchzygote.sparsity.pattern import Pattern

CPU = torch.device("cpu")


def matrix(kind: str, n: int = 40) -> Tensor:
    """Random entries in a known structure."""
    generator = torch.Generator().manual_seed(3)
    full = torch.randn(n, n, generator=generator, dtype=torch.float64)
    i, j = torch.arange(n).unsqueeze(1), torch.arange(n)
    if kind == "tridiagonal":
        keep = (i - j).abs() <= 1
    elif kind == "arrow":
        keep = (i == j) | (i == 0) | (j == 0)
    elif kind == "grid":
        keep = (i == j) | ((i - j).abs() == 8) | (((i - j).abs() == 1) & (i // 8 == j // 8))
    else:
        keep = torch.rand(n, n, generator=generator) < 0.05
    return (full + full.T) * (keep | keep.T)


def recovery_of(A: Tensor, mode: str) -> Recovery:
    pattern = Pattern.from_dense(A)
    if mode == "symmetric":
        return symmetric_recovery(pattern)
    if mode == "refined":
        return symmetric_recovery(pattern, refine=True)
    found = jacobian_recovery([pattern], mode)
    assert found is not None
    return found


def collected(A: Tensor, recovery: Recovery) -> Collected:
    """What an evaluation gathers: products by color, values, and the product with the probe."""
    seeds = (recovery.coloring.colors == torch.arange(recovery.ncolors).unsqueeze(1)).to(A)
    side = A if recovery.mode == "reverse" else A.T
    products = seeds @ side
    where = recovery.flat_slots(0, CPU)
    return Collected([products.reshape(-1)[where.long()]], [probe_rows(recovery).to(A) @ side], [products])


def passes(comparisons: list[Comparison]) -> bool:
    return all(bool(one.fine.all()) for one in comparisons)


@pytest.mark.parametrize("mode", ["forward", "reverse", "symmetric", "refined"])
@pytest.mark.parametrize("kind", ["tridiagonal", "arrow", "grid", "random"])
def test_the_verdict_is_that_of_scattering(kind: str, mode: str) -> None:
    A = matrix(kind)
    recovery = recovery_of(A, mode)
    found = collected(A, recovery)
    probes = probe_rows(recovery)
    tables = check_tables(recovery, probes, A.dtype, CPU, 1 << 26)
    assert tables is not None
    assert tables.applies(found)
    rows, columns = A.nonzero(as_tuple=True)
    torch.testing.assert_close(found.values[0], A[rows, columns])
    for branches in (True, False):
        assert passes(tables.check(found, 1e-12, branches))
        for wrong in (found.probed[0] * 1.01, found.probed[0] + 1):
            spoiled = found._replace(probed=[wrong])
            expected = agreement(recovery, spoiled.values, probes, spoiled.probed, 1e-12, False)[0]
            (got,) = tables.check(spoiled, 1e-12, branches)
            assert torch.equal(got.fine, expected.fine)
            assert torch.equal(got.faint, expected.faint)
            assert not bool(expected.fine.all())


@pytest.mark.parametrize("kind", ["tridiagonal", "grid", "random"])
def test_without_factors_the_entries_alone_are_weighed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recovery, "is_compact", lambda self: False)
    A = matrix(kind)
    recovery = recovery_of(A, "symmetric")
    found = collected(A, recovery)._replace(products=None)
    tables = check_tables(recovery, probe_rows(recovery), A.dtype, CPU, 1 << 26)
    assert tables is not None
    assert tables.applies(found)
    assert passes(tables.check(found, 1e-12, True))
    assert not passes(tables.check(found._replace(probed=[found.probed[0] + 1]), 1e-12, True))


def test_a_long_row_of_mirrored_entries_is_left_to_scattering() -> None:
    A = matrix("arrow", 300)
    recovery = recovery_of(A, "symmetric")
    assert check_tables(recovery, probe_rows(recovery), A.dtype, CPU, 1 << 26) is None


def test_a_matrix_without_entries_needs_no_tables() -> None:
    n = 70_000
    nothing = torch.empty(0, dtype=torch.int64)
    recovery = symmetric_recovery(Pattern((n, n), torch.zeros(n + 1, dtype=torch.int64), nothing))
    assert check_tables(recovery, probe_rows(recovery), torch.float64, CPU, 1 << 26) is None


def test_colors_that_meet_once_in_each_row_are_preferred_where_they_are_no_more() -> None:
    pattern = Pattern.from_dense(matrix("tridiagonal"))
    refined = symmetric_recovery(pattern, refine=True)
    assert refined.ncolors == symmetric_recovery(pattern).ncolors == 3
    assert torch.equal(refined.slots(0, CPU)[1], pattern.rows())
    assert refined.is_valid()
    bare = matrix("tridiagonal").fill_diagonal_(0)  # without a diagonal, neighbors may share a color
    assert symmetric_recovery(Pattern.from_dense(bare), refine=True).is_valid()
    arrow = Pattern.from_dense(matrix("arrow"))
    assert symmetric_recovery(arrow, refine=True).ncolors == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_excuse(dtype: torch.dtype) -> None:
    """A tenth of an entry is more than rounding in any dtype."""
    branches = lambda x: x * 2 if x.sum() > 0 else x.flip(0) * 2
    x = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        found = plan_jacobian(branches, x)(-x)[0].to_dense()
    torch.testing.assert_close(found, 2 * torch.eye(3, dtype=dtype).flip(0))
    x = torch.rand(50, dtype=dtype)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        plan_jacobian(lambda x: x + 0.1 * x.roll(1), x, sparsity=torch.eye(50))(x)
