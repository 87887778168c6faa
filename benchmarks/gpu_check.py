"""One command on a machine with a GPU: is everything right there, and how fast is it.

    python -m benchmarks.gpu_check            on the GPU: operators and public derivatives against the CPU in
                                              float64, compute-sanitizer over the kernels, kernels against the
                                              bytes that they move, public functions against torch.func
    python -m benchmarks.gpu_check --cpu      the same checks with the CPU in the GPU's place, nothing timed
    python -m benchmarks.gpu_check --build    compile the native libraries first

Prints one table; the exit status is 1 where a value is wrong or a sanitizer complains.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._gpu_cases import DERIVATIVES, OPERATORS, Case
from ._harness import ROOT

BANDWIDTH_TARGET = 1.3


class Line(NamedTuple):
    """One row of the table."""

    work: str
    result: str
    good: bool | None  # None: measured, not judged


def moved(value: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """Tensors on another device; floating ones in another precision."""
    if isinstance(value, Tensor):
        if dtype is not None and value.is_floating_point():
            return value.to(device, dtype)
        return value.to(device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(x, device, dtype) for x in value)
    return value


def flattened(value: Any) -> list[Tensor]:
    """All tensors of a result, dense and on the CPU."""
    if isinstance(value, Tensor):
        return [(value.to_dense() if value.layout != torch.strided else value).detach().cpu()]
    if isinstance(value, (list, tuple)):
        return [x for entry in value for x in flattened(entry)]
    if isinstance(value, dict):
        return [x for entry in value.values() for x in flattened(entry)]
    return []


def check(case: Case, device: str, dtype: torch.dtype) -> Line:
    """The case on the device in this precision, against the CPU in float64."""
    name = f"{case.name}, {str(dtype).removeprefix('torch.')}"
    torch.manual_seed(0)
    inputs = moved(case.inputs(), "cpu", dtype)  # both sides start from the same rounded numbers
    try:
        wanted = flattened(case.run(*moved(inputs, "cpu", torch.float64)))
        found = flattened(case.run(*moved(inputs, device)))
    except Exception as error:
        return Line(name, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}", False)
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape:
            return Line(name, f"shape {tuple(a.shape)}, expected {tuple(b.shape)}", False)
        if a.numel() == 0:
            continue
        kind = torch.complex128 if b.is_complex() else torch.float64
        scale = max(1.0, float(b.abs().max()))
        worst = max(worst, float((a.to(kind) - b.to(kind)).abs().max()) / scale)
    limit = case.tolerance(dtype)
    return Line(name, f"error {worst:.1e}, at most {limit:.0e}", worst <= limit)


def checks(device: str) -> Iterator[Line]:
    """Every operator in every precision, every public derivative in two."""
    for case in OPERATORS:
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            yield check(case, device, dtype)
    for case in DERIVATIVES:
        for dtype in (torch.float64, torch.float32):
            yield check(case, device, dtype)


def other_streams(device: str) -> Iterator[Line]:
    """Operators follow the current stream, and work on a device that isn't the current one."""
    from torchzygote import native

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        source = torch.ones(64, 1000, device=device)
        block = torch.zeros(64, 1000, device=device)
        native.scatter_rows_([block], [source], 0)
    stream.synchronize()
    yield Line("scatter_rows_ on a stream of its own", "", bool((block == 1).all()))
    last = torch.cuda.device_count() - 1
    if last > 0:
        seeds = native.seed_rows(0, 4, 8, dtype=torch.float32, device=f"cuda:{last}")
        yield Line(f"seed_rows on cuda:{last} while cuda:0 is current", "", bool(seeds.cpu().trace() == 4))


def seconds(run: Callable[[], object]) -> float:
    """Median over runs, by the GPU's own clock."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(11):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 5e3)
    return statistics.median(taken)


def kernel_times(device: str) -> Iterator[Line]:
    """Kernels against their bytes over the bandwidth that ``copy_`` reaches."""
    from torchzygote import native

    source = torch.randn(1 << 28, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / seconds(lambda: target.copy_(source))
    yield Line("copy_", f"{bandwidth / 1e9:.0f} GB/s", None)
    rows, columns = 256, 1 << 18
    block = target[: 2 * rows * columns].view(2 * rows, columns)
    products = source[: rows * columns].view(rows, columns)
    half = products.half()
    colors = torch.arange(columns, device=device) % rows
    out = torch.zeros(columns, device=device)
    size = 4 * rows * columns
    work: dict[str, tuple[Callable[[], object], int]] = {
        "seed_rows": (
            lambda: torch.ops.torchzygote.seed_rows_(block[:rows], 0, None),
            size,
        ),
        "seed_rows by colors": (
            lambda: torch.ops.torchzygote.seed_rows_(block[:rows], 0, colors),
            size + 8 * columns,
        ),
        "scatter_rows_": (lambda: native.scatter_rows_([block], [products], rows), 2 * size),
        "scatter_rows_ of 4 arguments": (
            lambda: native.scatter_rows_(
                list(block.split(columns // 4, 1)), list(products.split(columns // 4, 1)), rows
            ),
            2 * size,
        ),
        "scatter_rows_ float16 to float32": (
            lambda: native.scatter_rows_([block], [half], rows),
            size + size // 2,
        ),
        # a sector of 32 bytes for each entry read
        "gather_diagonal by colors": (
            lambda: native.gather_diagonal(products, 0, out=out, colors=colors),
            (32 + 8 + 4) * columns,
        ),
    }
    for name, (run, moved_bytes) in work.items():
        ratio = seconds(run) / (moved_bytes / bandwidth)
        yield Line(f"{name}: time over bytes / bandwidth", f"{ratio:.2f}", ratio <= BANDWIDTH_TARGET)


def public_times(device: str) -> Iterator[Line]:
    """Public functions against torch.func, on the same GPU."""
    from torchzygote import diaghessian, hessian, jacobian

    weights = torch.randn(512, 512, device=device) / 512**0.5

    def f(x: Tensor) -> Tensor:
        return torch.tanh(weights @ torch.tanh(weights @ x))

    def g(x: Tensor) -> Tensor:
        return f(x).square().sum()

    x = torch.randn(512, device=device)
    pairs: dict[str, tuple[Callable[[], object], dict[str, Callable[[], object]]]] = {
        "jacobian, 512 to 512": (lambda: jacobian(f, x), {"jacrev": lambda: torch.func.jacrev(f)(x)}),
        "hessian, n = 512": (
            lambda: hessian(g, x),
            {
                "torch.func.hessian": lambda: torch.func.hessian(g)(x),
                "jacrev(jacrev)": lambda: torch.func.jacrev(torch.func.jacrev(g))(x),
            },
        ),
        "diaghessian, n = 512": (
            lambda: diaghessian(g, x),
            {"diagonal of torch.func.hessian": lambda: torch.func.hessian(g)(x).diagonal()},
        ),
    }
    for name, (ours, peers) in pairs.items():
        mine = seconds(ours)
        best = min(peers, key=lambda peer: seconds(peers[peer]))
        ratio = mine / seconds(peers[best])
        yield Line(name, f"{1e3 * mine:.2f} ms, {ratio:.2f} of {best}", None)


def sanitized() -> Line:
    """The operators once more under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(tool, os.X_OK):
        return Line("compute-sanitizer", "not installed", None)
    command = [tool, "--error-exitcode", "9", "--target-processes", "all", sys.executable]
    command += ["-m", "benchmarks.gpu_check", "--operators-only"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line]
    return Line(
        "compute-sanitizer",
        said[-1].strip("= ") if said else f"status {done.returncode}",
        not done.returncode,
    )


def show(line: Line) -> bool:
    """Print a row; whether it is good."""
    mark = "" if line.good is None else "ok" if line.good else "WRONG"
    print(f"{line.work:60}  {line.result:48}  {mark}", flush=True)
    return line.good is not False


def main(arguments: list[str] | None = None) -> int:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check")
    parser.add_argument("--cpu", action="store_true", help="the CPU in the GPU's place, nothing timed")
    parser.add_argument("--build", action="store_true", help="compile the native libraries first")
    parser.add_argument("--operators-only", action="store_true", help="the kernels alone")
    options = parser.parse_args(arguments)
    if options.build:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=ROOT, check=True, env={**os.environ, "TORCHZYGOTE_NATIVE": "require"})
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    from torchzygote import native

    device = "cpu" if options.cpu else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("torch.cuda is not available; --cpu runs the checks on the CPU", file=sys.stderr)
        return 2
    info = native.info()
    name = "CPU" if options.cpu else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {name}, native {info['devices']}, missing {info['missing']}\n")
    start = time.perf_counter()
    good = show(Line(f"native library for {device}", "", device in info["devices"]))
    for line in (
        (check(c, device, d) for c in OPERATORS for d in (torch.float32, torch.float16))
        if (options.operators_only)
        else checks(device)
    ):
        good &= show(line)
    if device == "cuda" and not options.operators_only:
        for part in (other_streams(device), iter([sanitized()]), kernel_times(device), public_times(device)):
            for line in part:
                good &= show(line)
    print(f"\n{'all good' if good else 'NOT all good'}; {time.perf_counter() - start:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
