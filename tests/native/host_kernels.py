"""The CUDA kernels compiled for the CPU: their sources as they are, ``cuda_on_host/`` in the place of CUDA.

The operators are those of the namespace ``NAMESPACE``, for tensors on the CPU.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import native_samples
import pytest
import torch

from torchzygote import native
from torchzygote.native._loading import telling_refusals

ROOT = Path(__file__).parents[2]
STAND_IN = Path(__file__).parent / "cuda_on_host"
NAMESPACE = "torchzygote_cuda_on_host"
# How the threads of a launch take turns, and at most how many blocks there are (cuda_on_host/cuda_runtime.h).
WAYS = {
    "cuda forward": {"CUDA_ON_HOST_ORDER": "forward"},
    "cuda reverse": {"CUDA_ON_HOST_ORDER": "reverse"},
    "cuda interleaved": {"CUDA_ON_HOST_ORDER": "interleaved", "CUDA_ON_HOST_BLOCKS": "2"},
}
_FUNCTIONS = {
    native._rows: ("seed_rows_", "scatter_rows_", "gather_diagonal_"),
    native._colored: ("decompress_", "decompress_dense_", "compress_"),
}


@contextmanager
def run_by(way: str) -> Iterator[None]:
    """Functions of torchzygote.native, and native_samples.raw, call the CUDA kernels, in one of the WAYS."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in WAYS[way].items():
            patch.setenv(name, value)
        patch.setattr(native_samples, "namespace", NAMESPACE)
        for module, names in _FUNCTIONS.items():
            for name in names:
                patch.setattr(module, f"_{name}", telling_refusals(native_samples.raw(name)), raising=False)
        yield


def missing() -> str:
    """Why the kernels can't be compiled here; empty where they can."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "the sources of the kernels are not here"
    return "" if compiler() else "no C++ compiler found (c++, g++, clang++ or $CXX)"


def compiler() -> list[str]:
    """The C++ compiler, as setup.py finds it; empty where there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return [found] if found else []


def options() -> list[str]:
    """The C++ standard and torch's oldest version from setup.py, and warnings as errors."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    shared = re.findall(r'"(-std=[^"]+|-DTORCH_TARGET_VERSION=[^"]+)"', setup)
    assert len(shared) == 2
    torch_headers = Path(torch.__file__).parent / "include"
    found = [*shared, "-DUSE_CUDA", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    found += ["-I", str(STAND_IN), "-I", str(ROOT / "csrc"), "-isystem", str(torch_headers)]
    return found + sanitizers()


def sanitizers() -> list[str]:
    """What setup.py compiles with for the same environment variable."""
    if os.environ.get("TORCHZYGOTE_SANITIZE") != "1":
        return []
    return ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]


def build(folder: Path) -> Path:
    """The library, compiled in this folder; processes that share it compile it once."""
    library = folder / "cuda_on_host.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_all(folder, library)
    return library


def compile_all(folder: Path, library: Path) -> None:
    # what is preloaded for the sanitizers is none of the compiler's business
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def run(command: list[str]) -> None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"

    def object_of(source: Path) -> Path:
        made = folder / f"{source.name}.o"
        names = [] if source.name == "torch.cpp" else ["-include", str(STAND_IN / "names.h")]
        run([*compiler(), *options(), *names, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    kernels = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), STAND_IN / "probe.cu"]
    sources = [*kernels, ROOT / "csrc" / "ops.cpp", STAND_IN / "torch.cpp"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1) as pool:
        objects = list(pool.map(object_of, sources))
    unfinished = library.with_suffix(".unfinished")
    torch_libraries = str(Path(torch.__file__).parent / "lib")
    link = [*compiler(), "-shared", *sanitizers(), *map(str, objects), "-L", torch_libraries, "-ltorch_cpu"]
    run([*link, "-o", str(unfinished)])
    unfinished.rename(library)
