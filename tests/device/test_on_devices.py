"""Tensors on devices, without one: what ``on_devices.py`` says of each case, with a ``cuda`` of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import fake_cuda
import pytest
from all_cases import CASES

SCRIPT = Path(__file__).parent / "on_devices.py"


class Report(NamedTuple):
    """What went wrong in each case that was run, and what the process said beside that."""

    errors: dict[str, str]
    said: str


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    if reason := fake_cuda.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers have it in common
    library = fake_cuda.build(folder / "fake_cuda")
    command = [sys.executable, str(SCRIPT), str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    errors = dict(json.loads(line) for line in done.stdout.splitlines())
    return Report(errors, f"exit status {done.returncode}\n{done.stderr[-4000:]}")


@pytest.mark.parametrize("name", CASES)
def test_as_on_the_cpu(report: Report, name: str) -> None:
    assert name in report.errors, report.said
    assert not report.errors[name], report.errors[name]
