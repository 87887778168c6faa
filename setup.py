"""Builds the native libraries where torch and a C++ compiler are; otherwise the package is pure Python.

The libraries use PyTorch's stable ABI alone (``TORCH_TARGET_VERSION`` 2.10) and no Python at all, so that one
binary serves every torch from 2.10 and every Python from 3.10 on. Environment variables:

``TORCHZYGOTE_NATIVE``
    ``auto``, ``require`` (whatever keeps a library from being built is an error) or ``off``.
``CXX``, ``CUDA_HOME``, ``MAX_JOBS``
    As for PyTorch's own extensions.
``TORCH_CUDA_ARCH_LIST``
    Numbers such as ``8.0;9.0+PTX``, as for PyTorch's own extensions; names such as ``Ampere`` are not known.
``FORCE_CUDA``
    ``1``: no nvcc is an error; ``0``: the CUDA kernels are not compiled.
``TORCHZYGOTE_WERROR``
    ``1``: warnings of the C++ compiler are errors (those of nvcc always are).
``TORCHZYGOTE_SANITIZE``
    ``1``: with ASan and UBSan, for the tests.

Whether this machine has a GPU is never asked.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
ARCHITECTURES = "8.0;8.9;9.0"
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
SETTING = os.environ.get("TORCHZYGOTE_NATIVE") or "auto"
SANITIZE = os.environ.get("TORCHZYGOTE_SANITIZE") == "1"


class Unavailable(Exception):
    """Why a native library can't be built here."""


class Step(NamedTuple):
    """A command that makes ``output`` of ``inputs``."""

    output: Path
    inputs: list[Path]
    command: list[str]


def torch_folder() -> Path:
    """Where the installed torch is; it is looked at, not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable("torch is not installed in the build environment (use --no-build-isolation)")
    folder = Path(spec.origin).parent
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", (folder / "version.py").read_text())
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        version = "of unknown version" if found is None else f"{found[1]}.{found[2]}"
        raise Unavailable(f"expected torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later, got {version}")
    return folder


def cxx() -> list[str]:
    """The C++ compiler."""
    if sys.platform == "win32":
        raise Unavailable("the native library is compiled with GCC or Clang, on Linux and macOS")
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        raise Unavailable("no C++ compiler found (c++, g++, clang++ or $CXX)")
    return [found]


def nvcc() -> str:
    """The CUDA compiler."""
    forced = os.environ.get("FORCE_CUDA", "")
    if forced == "0":
        raise Unavailable("FORCE_CUDA=0")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    found = next((path for path in candidates if path and os.access(path, os.X_OK)), None)
    if found is None:
        raise Unavailable("no nvcc found ($CUDA_HOME, $PATH)")
    return found


def gencode() -> list[str]:
    """Options for the architectures to compile for; the last one also as PTX, for later GPUs."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    names = re.split(r"[;, ]+", given or ARCHITECTURES)
    options = []
    for position, name in enumerate(filter(None, names)):
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+[af]?", number):
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST: expected numbers such as 8.0;9.0+PTX, got {name!r}")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        last = position == len(names) - 1 and not given
        if name.endswith("+PTX") or last:
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


class Toolchain:
    """The commands that compile and link one library."""

    def __init__(self, cuda: bool) -> None:
        self.torch = torch_folder()
        self.cuda = cuda
        includes = ["-isystem", str(self.torch / "include"), "-I", str(ROOT / "csrc")]
        common = ["-std=c++20", "-O1" if SANITIZE else "-O3", TARGET, *includes]
        host = ["-fPIC", "-fvisibility=hidden"]
        host_compiler = cxx()
        program = next(
            (word for word in reversed(host_compiler) if not word.startswith("-")), host_compiler[0]
        )
        if cuda:
            strict = ["-Werror", "all-warnings", "--expt-relaxed-constexpr"]
            self.compiler = [nvcc(), *common, *gencode(), "-DUSE_CUDA", *strict]
            self.compiler += [f"-Xcompiler={','.join(host)}", "-ccbin", program, "-x", "cu"]
            self.linker = [nvcc(), "-shared", "-cudart", "static", "-ccbin", program]
            # libtorch brings in the libraries of the torch that loads this, with CUDA or without
            libraries = ["-Xlinker", "--no-as-needed,--exclude-libs,ALL,-s", "-ltorch"]
        else:
            warnings = ["-Wall", "-Wextra"]
            warnings += ["-Werror"] if os.environ.get("TORCHZYGOTE_WERROR") == "1" else []
            self.compiler = [*host_compiler, *common, *host, *warnings]
            self.linker = [*host_compiler, "-shared"]
            libraries = ["-ltorch_cpu"]
            if SANITIZE:
                sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
                self.compiler += sanitize
                self.linker += sanitize
            elif sys.platform == "linux":
                libraries += ["-s"]
        self.libraries = ["-L", str(self.torch / "lib"), *libraries]

    def steps(self, sources: list[str], folder: Path, library: Path) -> list[Step]:
        """What makes ``library`` of ``sources``; the last step links."""
        headers = sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc").rglob("*.cuh"))
        steps = []
        for source in sources:
            path = ROOT / source
            output = folder / (path.name + ".o")
            command = [*self.compiler, "-c", str(path), "-o", str(output)]
            steps.append(Step(output, [path, *headers], command))
        objects = [step.output for step in steps]
        command = [*self.linker, *map(str, objects), "-o", str(library), *self.libraries]
        return [*steps, Step(library, objects, command)]


def _escape(text: str) -> str:
    return re.sub(r"([$: ])", r"$\1", text)


def run_with_ninja(ninja: str, steps: list[Step], folder: Path) -> None:
    """Run what is out of date."""
    lines = ["rule run", "  command = $line", ""]
    for step in steps:
        inputs = " ".join(_escape(str(path)) for path in step.inputs)
        lines.append(f"build {_escape(str(step.output))}: run {inputs}")
        lines.append("  line = " + shlex.join(step.command).replace("$", "$$"))
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    subprocess.run([ninja, *jobs], cwd=folder, check=True)


def run_in_threads(steps: list[Step]) -> None:
    """Run everything, the last step after all others."""

    def run(step: Step) -> None:
        print(shlex.join(step.command), flush=True)
        subprocess.run(step.command, check=True)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(run, steps[:-1]))
    run(steps[-1])


class BuildNative(build_ext):
    """Compiles the libraries; where one fails, the package still works without it."""

    def build_extensions(self) -> None:
        for extension in self.extensions:
            try:
                self.build_library(extension)
            except (subprocess.CalledProcessError, Unavailable) as error:
                if SETTING == "require" or os.environ.get("FORCE_CUDA") == "1":
                    raise SystemExit(f"torchzygote: {extension.name} could not be built: {error}") from error
                print(
                    f"torchzygote: {extension.name} could not be built, going on without it: {error}",
                    flush=True,
                )

    def build_library(self, extension: Extension) -> None:
        folder = (Path(self.build_temp) / extension.name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        toolchain = Toolchain(cuda=extension.name.endswith("_cuda"))
        steps = toolchain.steps(extension.sources, folder, library)
        library.unlink(missing_ok=True)  # where compiling fails now, nothing old must stay
        ninja = shutil.which("ninja") or shutil.which("ninja", path=str(Path(sys.executable).parent))
        if ninja:
            run_with_ninja(ninja, steps, folder)
        else:
            run_in_threads(steps)


def library(name: str, pattern: str, *more: str) -> Extension:
    """One library of all sources that match."""
    sources = [*more, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))]
    return Extension(name, sources, py_limited_api=True, optional=SETTING != "require")


def libraries() -> tuple[list[Extension], list[str]]:
    """What can be built here, and why the rest can't."""
    if SETTING not in ("auto", "require", "off"):
        raise SystemExit(f"TORCHZYGOTE_NATIVE: expected auto, require or off, got {SETTING!r}")
    if SETTING == "off":
        return [], ["torchzygote: TORCHZYGOTE_NATIVE=off, installing pure Python"]
    try:
        torch_folder()
        cxx()
    except Unavailable as reason:
        if SETTING == "require" or os.environ.get("FORCE_CUDA") == "1":
            raise SystemExit(f"torchzygote: the native library can't be built: {reason}") from reason
        return [], [f"torchzygote: installing pure Python: {reason}"]
    found = [library("torchzygote.native._C", "cpu/*.cpp", "csrc/ops.cpp")]
    if SANITIZE:
        return found, []
    try:
        nvcc()
    except Unavailable as reason:
        if os.environ.get("FORCE_CUDA") == "1":
            raise SystemExit(f"torchzygote: FORCE_CUDA=1, but {reason}") from reason
        return found, [f"torchzygote: the CUDA kernels are not compiled: {reason}"]
    return [*found, library("torchzygote.native._C_cuda", "cuda/*.cu")], []


EXTENSIONS, NOTES = libraries()


class BuildPython(build_py):
    """Says what is left out, in a line."""

    def run(self) -> None:
        for note in NOTES:
            print(note, flush=True)
        super().run()


setup(
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if EXTENSIONS else {},
)
