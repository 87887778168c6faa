"""Choosing mode and chunk: arithmetic on sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchzygote import _cost_model, set_memory_budget

CPU = torch.device("cpu")


@given(rows=st.integers(1, 10**6), row_bytes=st.integers(0, 10**8))
def test_a_chunk_is_at_least_one_row_and_at_most_all(rows: int, row_bytes: int) -> None:
    assert 1 <= _cost_model.choose_chunk(None, rows, _cost_model.RowCost(row_bytes, 1), CPU) <= rows


@given(rows=st.integers(1, 10**6), row_bytes=st.integers(1, 10**8), budget=st.integers(1, 2**32))
def test_a_chunk_fits_the_budget_or_is_one_row(rows: int, row_bytes: int, budget: int) -> None:
    set_memory_budget(budget)
    try:
        chunk = _cost_model.choose_chunk(None, rows, _cost_model.RowCost(row_bytes, 1), CPU)
    finally:
        set_memory_budget(None)
    assert chunk == 1 or chunk * row_bytes <= max(budget, _cost_model._SMALL)


@pytest.mark.parametrize(("rows", "row_bytes"), [(1000, 32_000), (5000, 12_345), (700, 40_000)])
def test_chunks_that_are_not_the_whole_are_whole_registers(rows: int, row_bytes: int) -> None:
    chunk = _cost_model.choose_chunk(None, rows, _cost_model.RowCost(row_bytes, 1), CPU)
    assert chunk < rows
    assert chunk % 32 == 0


def test_a_given_chunk_size_is_kept() -> None:
    assert _cost_model.choose_chunk(7, 100, _cost_model.RowCost(10**12, 1), CPU) == 7
    assert _cost_model.choose_chunk(700, 100, _cost_model.RowCost(1, 1), CPU) == 100


@pytest.mark.parametrize(
    ("rows", "columns", "complex_input", "expected"),
    [
        (10, 10, False, "reverse"),
        (10_000, 3, False, "forward"),
        (10_000, 3, True, "reverse"),
        (0, 3, False, "reverse"),
    ],
)
def test_the_cheaper_mode_is_chosen(rows: int, columns: int, complex_input: bool, expected: str) -> None:
    assert _cost_model.choose_mode("auto", rows, columns, complex_input) == expected
    assert _cost_model.choose_mode("forward", rows, columns, complex_input) == "forward"


@pytest.mark.parametrize("setting", ["²", "much", "-1", "0", "1e9", "1.5"])
def test_an_environment_variable_that_is_no_number_of_bytes_is_named(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHZYGOTE_MEMORY_BUDGET", setting)
    with pytest.raises(
        ValueError, match=f"TORCHZYGOTE_MEMORY_BUDGET: expected a number of bytes, got {setting!r}"
    ):
        _cost_model.memory_budget(torch.device("cpu"))


def test_the_environment_sets_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHZYGOTE_MEMORY_BUDGET", "4096")
    assert _cost_model.memory_budget(torch.device("cpu")) == 4096
