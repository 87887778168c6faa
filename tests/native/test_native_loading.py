"""What is loaded, what is said where something isn't, and that the package works in any case."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_samples import needs_library

import torchzygote
from torchzygote import native
from torchzygote.native import _loading

ROOT = Path(__file__).parents[2]
PACKAGE = Path(torchzygote.__file__).parent

REPORT = """
import json, torch
{before}
import torchzygote
from torchzygote import jacobian, native
J = jacobian(lambda x: x**2, torch.arange(3.0), chunk_size=1)[0]
assert J.tolist() == [[0, 0, 0], [0, 2, 0], [0, 0, 4]]
print(json.dumps(native.info()))
"""


def run(folder: Path, setting: str | None, before: str = "") -> subprocess.CompletedProcess[str]:
    """A new process with the package in ``folder``."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("TORCHZYGOTE_NATIVE", None)
    if setting is not None:
        environment["TORCHZYGOTE_NATIVE"] = setting
    command = [sys.executable, "-c", REPORT.format(before=before)]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


def report(folder: Path, setting: str | None, before: str = "") -> dict:
    done = run(folder, setting, before)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def copied(folder: Path, *libraries: str) -> Path:
    """The package with some of its libraries, or files that are none in their place."""
    shutil.copytree(PACKAGE, folder / "torchzygote", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in libraries:
        stem, _, content = name.partition("=")
        target = folder / "torchzygote" / "native" / f"{stem}.abi3.so"
        if content:
            target.write_text(content)
        else:
            shutil.copy(PACKAGE / "native" / target.name, target)
    return folder


def test_info_says_what_is_loaded() -> None:
    info = native.info()
    assert set(info["devices"]) | set(info["missing"]) == {"cpu", "cuda"}
    assert not set(info["devices"]) & set(info["missing"])
    if os.environ.get("TORCHZYGOTE_NATIVE") == "require":
        assert "cpu" in info["devices"]


def test_off_means_plain_pytorch(tmp_path: Path) -> None:
    info = report(copied(tmp_path), "off")
    assert info["devices"] == []
    assert info["missing"] == {"cpu": "TORCHZYGOTE_NATIVE=off", "cuda": "TORCHZYGOTE_NATIVE=off"}


@needs_library
def test_require_is_content_with_what_is_there(tmp_path: Path) -> None:
    assert report(copied(tmp_path, "_C"), "require")["devices"] == ["cpu"]


@pytest.mark.parametrize(
    ("library", "reason"), [(None, "_C was not built"), ("_C=no library", "could not be loaded")]
)
def test_a_missing_or_broken_library_is_a_reason_or_an_error(
    tmp_path: Path, library: str | None, reason: str
) -> None:
    folder = copied(tmp_path, *([library] if library else []))
    info = report(folder, None)
    assert info["devices"] == []
    assert reason in info["missing"]["cpu"]
    done = run(folder, "require")
    assert done.returncode != 0
    assert re.search(rf"ImportError: TORCHZYGOTE_NATIVE=require, but .*{reason}", done.stderr)


def test_an_unknown_setting_is_an_error(tmp_path: Path) -> None:
    done = run(copied(tmp_path), "maybe")
    assert "ValueError: TORCHZYGOTE_NATIVE: expected one of auto, require, off, got 'maybe'" in done.stderr


CUDA_CLAIMED = "torch.cuda.is_available = lambda: True"


@needs_library
@pytest.mark.parametrize("library", ["_C_cuda", "_C_cuda=no library"])
def test_an_unusable_cuda_library_leaves_the_cpu_alone(tmp_path: Path, library: str) -> None:
    """A torch without CUDA lacks what the library needs; so does a file that is no library."""
    if "=" not in library and not (PACKAGE / "native" / "_C_cuda.abi3.so").exists():
        pytest.skip("the CUDA library was not built: no nvcc")
    folder = copied(tmp_path, "_C", library)
    info = report(folder, None, CUDA_CLAIMED)
    if "cuda" not in info["devices"]:  # torch may have CUDA after all
        assert info["devices"] == ["cpu"]
        assert "_C_cuda.abi3.so could not be loaded" in info["missing"]["cuda"]
        assert "TORCHZYGOTE_NATIVE=require, but _C_cuda" in run(folder, "require", CUDA_CLAIMED).stderr


def test_without_cuda_its_library_is_not_looked_at(tmp_path: Path) -> None:
    before = "torch.cuda.is_available = lambda: False"
    libraries = ["_C"] if "cpu" in native.info()["devices"] else []
    info = report(copied(tmp_path, *libraries, "_C_cuda=no library"), None, before)
    assert info["missing"]["cuda"] in (
        "torch.cuda is not available",
        "the CPU library, which defines the operators, is not loaded",
    )


def test_every_operator_has_its_files_and_its_kernels() -> None:
    schemas = set(re.findall(r'"(\w+)\(Tensor', (ROOT / "csrc" / "ops.cpp").read_text()))
    from torchzygote.native._autograd import OPERATORS

    assert schemas == set(OPERATORS)
    registered = {}
    for device in ("cpu", "cuda"):
        files = [*(ROOT / "csrc" / device).glob("*.cpp"), *(ROOT / "csrc" / device).glob("*.cu")]
        registered[device] = {
            name: path.stem for path in files for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())
        }
    assert set(registered["cpu"]) == schemas
    only_cpu = {"unite_sets", "unite_pairs", "expand_pairs", "color_graph"}
    only_cpu |= {"mirrored_blocks", "push_elementwise_"}
    assert registered["cuda"] == {k: v for k, v in registered["cpu"].items() if k not in only_cpu}


def test_the_sources_use_no_newer_headers_than_those_of_the_oldest_torch() -> None:
    """``TORCH_TARGET_VERSION`` doesn't hide these: 2.10 has neither, and the library isn't built there."""
    newer = re.compile(r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b|\.layout\(\)|\bheaderonly::Layout\b")
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert [path.name for path in files if newer.search(path.read_text())] == []
    assert len(files) > 10


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("colors: expected at least -1, got -2"), ValueError),
        (RuntimeError("blocks[0]: expected a matrix, got shape (2)"), ValueError),
        (RuntimeError("can't allocate memory: you tried to allocate 8 bytes"), RuntimeError),
        (torch.OutOfMemoryError("memory: expected more"), torch.OutOfMemoryError),
        (NotImplementedError("out: expected another device"), NotImplementedError),
    ],
)
def test_refusals_are_told_where_their_types_are_lost(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def operator() -> None:
        raise raised

    monkeypatch.setattr(_loading, "_ERRORS_LOSE_TYPES", True)
    with pytest.raises(expected, match=re.escape(str(raised))) as caught:
        _loading.telling_refusals(operator)()
    assert type(caught.value) is expected
    assert caught.value.__context__ is None
