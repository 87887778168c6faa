"""The public API as a type checker sees it from a user's side: the marker is shipped, nothing is untyped."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

TYPING = Path(__file__).resolve().parent / "typing"
ROOT = TYPING.parent.parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the second run needn't read again: PyTorch."""
    return tmp_path_factory.mktemp("mypy")


def mypy(file: Path, tmp_path: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={cache}"]
    command += ["--follow-imports=silent", "--ignore-missing-imports", str(file)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)


def test_the_typed_marker_is_there() -> None:
    assert resources.files("torchzygote").joinpath("py.typed").is_file()


@pytest.mark.slow
def test_a_users_code_passes_strict_checking(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("mypy")
    done = mypy(TYPING / "user_code.py", tmp_path, cache)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_mistake_is_found(tmp_path: Path, cache: Path) -> None:
    """The other test would pass too if everything were ``Any``."""
    pytest.importorskip("mypy")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "import torch\n"
        "import torchzygote as tz\n"
        "tz.set_memory_budget('much')\n"
        "H: int = tz.hessian(torch.sin, 1.0)\n"
        "tz.jacobian(torch.sin, 1.0, chunksize=3)\n"
        "p: str = tz.Params([torch.ones(1)])\n"
        "tz.no_such_name\n"
        "n: int = tz.hook(print, torch.ones(1))\n"
        "n = tz.checkpointed(torch.sin, torch.ones(1))\n"
        "d: dict[str, int] = tz.gradient(torch.sin, tz.Params([torch.ones(1)]))\n"
    )
    done = mypy(wrong, tmp_path, cache)
    found = {line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line}
    assert found == {*"3456789", "10"}
