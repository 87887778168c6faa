"""Two devices ``cuda`` for a PyTorch without CUDA: the library of ``fake_cuda.cpp``, built and switched on.

Imports nothing of torch: the library has to be there before torch is. (Nor what compiles the native tests'
library, which imports torch, and goes with them where they run apart from the others.)
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parent / "fake_cuda.cpp"
COUNT = 2
# What the emulation was tried with: it implements interfaces of PyTorch's that are nobody's promise.
VERSIONS = ("2.13",)

# What the device was waited for since waits() began, with the place in the package that did it.
_log: list[str] | None = None


def missing() -> str:
    """Why there is no such device here; empty where there can be one."""
    from torch import version

    number = version.__version__
    if not number.startswith(tuple(f"{known}." for known in VERSIONS)):
        return f"the emulation of a device was tried with PyTorch {', '.join(VERSIONS)}, not with {number}"
    if version.cuda or version.hip:
        return "the emulation of a device needs a PyTorch that is built for the CPU alone"
    if sys.platform != "linux":
        return "the emulation of a device was tried on Linux alone"
    return "" if compiler() else "no C++ compiler found (c++, g++, clang++ or $CXX)"


def compiler() -> list[str]:
    """The C++ compiler, as setup.py finds it; empty where there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    return [found] if found else []


def _torch() -> Path:
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def build(folder: Path) -> Path:
    """The library, compiled in this folder; processes that share it compile it once."""
    library = folder / "fake_cuda.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            headers = _torch() / "include"
            options = ["-std=c++20", "-O0", "-fPIC", "-shared"]
            for path in (headers, headers / "torch" / "csrc" / "api" / "include"):
                options += ["-isystem", str(path)]
            unfinished = library.with_suffix(".unfinished")
            linked = ["-L", str(_torch() / "lib"), "-lc10", "-ltorch_cpu", "-o", str(unfinished)]
            command = [*compiler(), *options, str(SOURCE), *linked]
            # what is preloaded for sanitizers is none of the compiler's business
            environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
            unfinished.rename(library)
    return library


def switch_on(library: str) -> None:
    """Have ``cuda:0`` and ``cuda:1`` in this process, in which torch must not have been imported before."""
    assert "torch" not in sys.modules, "torch asks once which devices there are, as it is imported"
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(_torch() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    loaded = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    loaded.fake_cuda_tell(_note)
    import torch

    torch.ops.load_library(library)
    _patch(torch.cuda, torch.ops.fake_cuda)


@contextlib.contextmanager
def unavailable() -> Iterator[None]:
    """``torch.cuda.is_available()`` says no."""
    import torch

    before = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = before


def _patch(cuda: Any, ops: Any) -> None:
    """What ``torch.cuda`` asks parts of torch that a build without CUDA lacks."""
    import torch
    from torch.utils._python_dispatch import _disable_current_modes

    def index(device: Any = None) -> int:
        if isinstance(device, int):
            return device
        found = None if device is None else torch.device(device).index
        return int(ops.current_device()) if found is None else found

    @contextlib.contextmanager
    def plainly() -> Iterator[None]:
        """Generators know nothing of transforms and modes."""
        with torch._C._DisableFuncTorch(), torch._C.DisableTorchFunction(), _disable_current_modes():
            yield

    def get_rng_state(device: Any = "cuda") -> Any:
        with plainly():
            return ops.get_state(index(device))

    def set_rng_state(state: Any, device: Any = "cuda") -> None:
        with plainly():
            ops.set_state(index(device), state.clone())

    def set_rng_state_all(states: Any) -> None:
        for i, state in enumerate(states):
            set_rng_state(state, i)

    def manual_seed_all(seed: int) -> None:
        for i in range(COUNT):
            ops.seed(i, int(seed))

    class Current:
        """``torch.cuda.device``."""

        def __init__(self, device: Any) -> None:
            self._index = index(device)

        def __enter__(self) -> None:
            self._before = ops.exchange_device(self._index)

        def __exit__(self, *error: object) -> None:
            ops.exchange_device(self._before)

    patches: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: COUNT,
        "current_device": lambda: int(ops.current_device()),
        "device": Current,
        "_exchange_device": ops.exchange_device,
        "_maybe_exchange_device": ops.exchange_device,
        "synchronize": lambda device=None: None,
        "mem_get_info": lambda device=None: (8 << 30, 16 << 30),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }
    random: dict[str, Callable[..., Any]] = {
        "get_rng_state": get_rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [get_rng_state(i) for i in range(COUNT)],
        "set_rng_state_all": set_rng_state_all,
        "manual_seed": lambda seed: ops.seed(index(), int(seed)),
        "manual_seed_all": manual_seed_all,
    }
    cuda._initialized = True
    for name, value in {**patches, **random}.items():
        setattr(cuda, name, value)
    for name, value in random.items():
        setattr(cuda.random, name, value)


@ctypes.CFUNCTYPE(None, ctypes.c_char_p)
def _note(what: bytes) -> None:
    if _log is not None:
        ours = [f for f in traceback.extract_stack() if "/torchzygote/" in f.filename]
        _log.append(what.decode() + "".join(f" at {Path(f.filename).name}:{f.lineno}" for f in ours[-1:]))


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    """What has the CPU wait for the device, or copies between them, while it is entered; in all threads."""
    global _log
    before, _log = _log, []
    try:
        yield _log
    finally:
        _log = before
