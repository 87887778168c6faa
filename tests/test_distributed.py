"""Training on several processes: what ``processes.py`` does in two of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="PyTorch was built without gloo")
def test_two_processes_find_what_one_does() -> None:
    script = HERE / "processes.py"
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cases = re.search(r"^CASES = \((.*)\)$", script.read_text(), re.MULTILINE)
    assert cases is not None
    expected = cases[1].split(", ")
    assert [line for line in done.stdout.splitlines() if line in expected] == expected  # Gloo prints, too
