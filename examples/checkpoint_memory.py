"""Peak memory and time of a deep network on scikit-learn's digits, with and without checkpoints.

For each depth a fresh process trains for a few steps, and reports the time of the fastest and the most memory
that they needed beyond what was there before them: the peak of the resident memory as the operating system
counts it (VmHWM in /proc/self/status, set back before the steps; elsewhere the peak of the whole process).
Dropout is in use, and both ways must come to the same loss: a checkpoint draws the same random numbers when
it runs again.

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
from collections.abc import Sequence
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
    seconds: float
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
    """Megabytes of resident memory, now (VmRSS) or at its peak (VmHWM)."""
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


def measure(depth: int, checkpoint: bool, steps: int) -> Measured:
    """Train for some steps, in this process."""
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
    forget_peak()
    before = resident("VmRSS")
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = step(x, y)
        times.append(time.perf_counter() - start)
    return Measured(megabytes=resident("VmHWM") - before, seconds=min(times), loss=loss)


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


def plot(depths: Sequence[int], plain: Sequence[Measured], saved: Sequence[Measured], path: Path) -> None:
    """Memory and time over depth, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    for rows, label, color in (
        (plain, "everything stored", "tab:orange"),
        (saved, "checkpointed", "tab:blue"),
    ):
        left.plot(depths, [row["megabytes"] for row in rows], marker="o", color=color, label=label)
        right.plot(depths, [1e3 * row["seconds"] for row in rows], marker="o", color=color)
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

    plain, saved = [], []
    for depth in depths:
        plain.append(measure_apart(depth, False, steps))
        saved.append(measure_apart(depth, True, steps))
        a, b = plain[-1], saved[-1]
        print(
            f"{depth:3d} blocks: {a['megabytes']:6.1f} MB, {1e3 * a['seconds']:6.0f} ms a step; checkpointed "
            f"{b['megabytes']:6.1f} MB, {1e3 * b['seconds']:6.0f} ms; difference of the losses "
            f"{abs(a['loss'] - b['loss']):.1e}"
        )
    share = saved[-1]["megabytes"] / plain[-1]["megabytes"]
    print(f"peak memory with checkpoints: {share:.0%} of that without, {depths[-1]} blocks")
    plot(depths, plain, saved, options.output)
    print(f"memory and time: {options.output}")
    return share


if __name__ == "__main__":
    main()
