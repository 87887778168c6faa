"""Train a small network on scikit-learn's handwritten digits, with implicit parameters.

Each step accumulates the gradients of a few micro-batches by plain arithmetic, clips them by their norm
and hands them to AdamW. A plot of loss and gradient norm is written to ``examples/output/digits.png``.

    python examples/train_digits.py --epochs 60
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

from torchzygote import Params, withgradient

OUTPUT = Path(__file__).parent / "output"


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; the 8 by 8 pixels as a vector in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part) for part in parts)
    return train_x.float(), train_y, test_x.float(), test_y


def batches(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples in random order, ``size`` at a time; a smaller rest is left out."""
    order = torch.randperm(len(x))
    for start in range(0, len(x) - size + 1, size):
        chosen = order[start : start + size]
        yield x[chosen], y[chosen]


def train(
    model: nn.Module, x: Tensor, y: Tensor, *, epochs: int, batch: int, micro: int, quiet: bool
) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of every step."""
    params = Params(model)
    optimizer = torch.optim.AdamW(params, lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * (len(x) // batch))
    losses, norms = [], []
    progress = tqdm(range(epochs), desc="training", unit="epoch", disable=quiet)
    for _ in progress:
        for images, labels in batches(x, y, batch):
            total, grads = 0.0, None
            for part, target in zip(images.split(micro), labels.split(micro), strict=True):
                value, g = withgradient(lambda: nn.functional.cross_entropy(model(part), target), params)
                share = len(part) / len(images)
                total += share * float(value)
                grads = share * g if grads is None else grads + share * g
            norm = grads.clip_norm_(2.0)
            grads.assign_()
            optimizer.step()
            schedule.step()
            losses.append(total)
            norms.append(float(norm))
        progress.set_postfix(loss=f"{losses[-1]:.4f}", norm=f"{norms[-1]:.2f}")
    return losses, norms


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images that the network, in evaluation mode, gets right."""
    model.eval()
    with torch.no_grad():
        return (model(x).argmax(dim=1) == y).float().mean().item()


def plot(losses: Sequence[float], norms: Sequence[float], path: Path) -> None:
    """Loss and gradient norm over the steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(2, sharex=True, figsize=(8, 5), layout="constrained")
    window = min(20, len(losses))
    for axes, values, label, color in zip(
        both,
        (losses, norms),
        ("cross entropy", "gradient norm\nbefore clipping"),
        ("tab:blue", "tab:orange"),
        strict=True,
    ):
        means = torch.tensor(values).log().unfold(0, window, 1).mean(dim=1).exp()
        axes.semilogy(values, color=color, linewidth=0.8, alpha=0.4, label="each step")
        axes.semilogy(
            range(window // 2, window // 2 + len(means)), means, color=color, label=f"mean of {window} steps"
        )
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    both[1].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, test, plot; returns the test accuracy."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch", type=int, default=128, help="examples per step")
    parser.add_argument("--micro", type=int, default=32, help="examples per gradient")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT / "digits.png", help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="a few epochs, no progress bar: a smoke test")
    options = parser.parse_args(arguments)
    epochs = 3 if options.quick else options.epochs

    torch.manual_seed(options.seed)
    train_x, train_y, test_x, test_y = load()
    if not 0 < options.batch <= len(train_x):
        parser.error(f"--batch: expected 1 to {len(train_x)} examples, got {options.batch}")
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    start = time.perf_counter()
    losses, norms = train(
        model, train_x, train_y, epochs=epochs, batch=options.batch, micro=options.micro, quiet=options.quick
    )
    seconds = time.perf_counter() - start
    plot(losses, norms, options.output)
    found = accuracy(model, test_x, test_y)
    print(f"test accuracy: {found:.2%} on {len(test_x)} images, after {len(losses)} steps in {seconds:.1f} s")
    print(f"loss and gradient norm: {options.output}")
    return found


if __name__ == "__main__":
    main()
