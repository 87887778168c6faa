"""Peak memory and time of a deep network on scikit-learn's digits, with and without checkpoints.

For each depth a fresh process trains for a few steps, and reports the most memory that they needed beyond
what was there before them: the peak of the resident memory as the operating system counts it (VmHWM in
``/proc/self/status``, set back before the steps; elsewhere the peak of the whole process). The time is that
of the fastest step, the two ways taking turns. Dropout is in use, and both ways must come to the same loss: a
checkpoint draws the same random numbers when it runs again.

    python examples/checkpoint_memory.py --depths 4 8 16 32
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torchzygote import Params, checkpointed, withgradient

OUTPUT = Path(__file__).parent / "output"
PROC = Path("/proc/self")
MEGABYTE = 2**20
IMAGES = 512  # in a step


class Measured(TypedDict):
    """What one process reports."""

    megabytes: float
    loss: float


class Block(nn.Module):
    """One of the many: wider inside than at its ends, as in a transformer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(0.1),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Width to width, around a residual connection."""
        return x + self.inside(x)


class Network(nn.Module):
    """Blocks between a first and a last layer, each a checkpoint if so wished."""

    def __init__(self, depth: int, width: int, checkpoint: bool) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.last = nn.Linear(width, 10)
        self.checkpoint = checkpoint

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 64) to scores (n, 10)."""
        x = self.first(x)
        for block in self.blocks:
            x = checkpointed(block, x) if self.checkpoint else block(x)
        return self.last(x)


def resident(field: str) -> float:
    """Megabytes of resident memory, now (VmRSS; RssFile: program code) or at its peak (VmHWM)."""
    if (PROC / "status").exists():
        for line in (PROC / "status").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 / MEGABYTE if sys.platform == "darwin" else 1 / 1024
    )


def forget_peak() -> None:
    """Let the peak begin anew, where the operating system can do that."""
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        print("the peak is that of the whole process here", file=sys.stderr)


def training(depth: int, checkpoint: bool) -> Callable[[], float]:
    """A function that makes one step of training and returns the loss."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[:IMAGES] / 16).float(), torch.from_numpy(labels[:IMAGES])
    model = Network(depth, 64, checkpoint)
    params = Params(model)
    optimizer = torch.optim.SGD(params, lr=0.05)

    def step(x: Tensor, y: Tensor) -> float:
        value, grads = withgradient(lambda: nn.functional.cross_entropy(model(x), y), params)
        grads.assign_()
        optimizer.step()
        return float(value)

    step(x[:2], y[:2])  # what is loaded at the first call isn't to be counted
    return lambda: step(x, y)


def measure(depth: int, checkpoint: bool, steps: int) -> Measured:
    """Train for some steps, in this process."""
    step = training(depth, checkpoint)
    forget_peak()
    before, files = resident("VmRSS"), resident("RssFile")
    for _ in range(steps):
        loss = step()
    loaded = resident("RssFile") - files  # program code that was touched for the first time
    return Measured(megabytes=resident("VmHWM") - before - loaded, loss=loss)


def fastest(depth: int, steps: int) -> tuple[float, float]:
    """Seconds of the fastest step without and with checkpoints, taking turns."""
    ways = training(depth, False), training(depth, True)
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(2 * steps):
        for step, taken in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    return min(seconds[0]), min(seconds[1])


def measure_apart(depth: int, checkpoint: bool, steps: int) -> Measured:
    """The same in a process of its own, whose allocator gives freed memory back at once."""
    environment = {
        **os.environ,
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, __file__, "--measure", json.dumps([depth, checkpoint, steps])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: Measured = json.loads(done.stdout.splitlines()[-1])
    return found


def plot(
    depths: Sequence[int], memory: Sequence[Sequence[float]], times: Sequence[Sequence[float]], path: Path
) -> None:
    """Memory and time over depth, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    for i, (label, color) in enumerate((("everything stored", "tab:orange"), ("checkpointed", "tab:blue"))):
        left.plot(depths, [pair[i] for pair in memory], marker="o", color=color, label=label)
        right.plot(depths, [1e3 * pair[i] for pair in times], marker="o", color=color)
    left.set_ylabel("peak memory of a step [MB]")
    right.set_ylabel("time of a step [ms]")
    left.legend(frameon=False)
    for axes in (left, right):
        axes.set_xlabel("blocks")
        axes.set_xticks(depths)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> float:
    """Measure, compare, plot; returns the share of the memory that the deepest network still needs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 24], help="numbers of blocks")
    parser.add_argument("--steps", type=int, default=3, help="training steps per measurement")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT / "checkpoint_memory.png", help="where the plot goes"
    )
    parser.add_argument("--quick", action="store_true", help="one depth, one step: a smoke test")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(*json.loads(options.measure))))
        return 0.0
    if min(options.depths) < 1 or options.steps < 1:
        parser.error("--depths, --steps: expected at least 1")
    depths, steps = ([8], 1) if options.quick else (sorted(options.depths), options.steps)

    memory, times = [], []
    for depth in depths:
        plain, saved = measure_apart(depth, False, steps), measure_apart(depth, True, steps)
        memory.append((plain["megabytes"], saved["megabytes"]))
        times.append(fastest(depth, steps))
        print(f"{depth} blocks, {memory[-1][0]:.1f} MB and {1e3 * times[-1][0]:.0f} ms a step;", end=" ")
        print(f"checkpointed {memory[-1][1]:.1f} MB and {1e3 * times[-1][1]:.0f} ms;", end=" ")
        print(f"losses differ by {abs(plain['loss'] - saved['loss']):.1e}", flush=True)
    share = memory[-1][1] / memory[-1][0]
    print(f"peak memory with checkpoints: {share:.0%} of that without, {depths[-1]} blocks")
    plot(depths, memory, times, options.output)
    print(f"memory and time: {options.output}")
    return share


if __name__ == "__main__":
    main()
