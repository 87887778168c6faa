"""Every test starts from the same global state, and must leave it as it was."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

from torchzygote import _layer_rows, _products, _stencil_sums
from torchzygote._curvature import stencil_program
from torchzygote._engine import Linearization

hypothesis.settings.register_profile("default", deadline=None, max_examples=40)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_finish() -> None:
    """Full collections go over all that was imported and collected, time and again: a fifth of the run."""
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, 100)


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """A fixed seed and the default dtype; gradient mode must come out as it went in."""
    # torch.manual_seed formats the stack three times, for devices that aren't there: a millisecond
    torch.default_generator.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)
    assert torch.is_grad_enabled()


@pytest.fixture
def float64() -> Iterator[None]:
    """Numbers become float64 within the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def x() -> torch.Tensor:
    """A point to differentiate at; a file that needs another one has its own ``x``."""
    return torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products each chunk of the test has, pulled back from seeds."""
    counted: list[int] = []
    plain = _products.vjps

    def count(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for chunk in plain(*args, **kwargs):
            counted.append(chunk[1] - chunk[0])
            yield chunk

    monkeypatch.setattr(_products, "vjps", count)
    return counted


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, products: list[int]) -> list[int]:
    """How many products a Jacobian asks for, where layers are looked for in the smallest problem, too."""
    monkeypatch.setattr(_layer_rows, "_pays", lambda *args: True)
    monkeypatch.setattr(_layer_rows, "_LEAST_ROWS", 1)
    for name in ("_LEAST_BYTES", "_LOOK", "_OPERATION", "_TERM"):
        monkeypatch.setattr(_layer_rows, name, 0)
    return products


@pytest.fixture
def pulls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many inputs each pullback of the test was by."""
    counted: list[int] = []
    pull = Linearization.pull

    def counting(self: Linearization, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(self.inputs))
        return pull(self, *args, **kwargs)

    monkeypatch.setattr(Linearization, "pull", counting)
    return counted


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch of products."""
    counts: list[int] = []
    original = _products.batched

    def counted(one: Any, rows: torch.Tensor) -> Any:
        counts.append(rows.shape[0])
        return original(one, rows)

    monkeypatch.setattr(_products, "batched", counted)
    return counts


@pytest.fixture
def grids_taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that a sum over a grid was looked for, whether it was taken."""
    seen: list[bool] = []
    worker = _stencil_sums._attempt

    def noted(way: Any) -> Any:
        found = worker(way)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(_stencil_sums, "_attempt", noted)
    return seen


@pytest.fixture
def grids_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with graphs that nobody has seen, and reads them at once."""
    for kept in ("_programs", "_seen"):
        monkeypatch.setattr(stencil_program, kept, type(getattr(stencil_program, kept))())
    monkeypatch.setattr(stencil_program, "_AT_ONCE", 0)
    monkeypatch.setattr(_stencil_sums, "LEAST_OF_A_JACOBIAN", 0)
