"""The diagonal of a Hessian in a million dimensions, exact, in the time of thirty to fifty gradients.

A scalar field on a lattice of 1000 by 1000 sites, its energy with neighbors coupled twice, linearly and not:

    E = sum over sites of  w (p² - 1)² / 4  +  sum over neighbors p, q of  (p - q)² / 2 + k p² q²

The Hessian has 10¹² entries; its diagonal is what preconditioners and score matching want. diaghessian finds
which entries can be nonzero, colors them, and takes a few Hessian-vector products; a plan keeps what was
found. The result is compared with the formula, and with Hutchinson's estimate by random signs. The plot shows
the field, the diagonal, how the time grows, and how slowly the estimate converges.

    python examples/laplacian.py --side 1000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchzygote import diaghessian, plan_hessian

OUTPUT = Path(__file__).parent / "output"
WELL, COUPLING = 2.0, 0.3


def energy(p: Tensor) -> Tensor:
    """The energy of a periodic lattice."""
    total = WELL / 4 * ((p**2 - 1) ** 2).sum()
    for dim in (0, 1):
        q = p.roll(1, dim)
        total = total + 0.5 * ((p - q) ** 2).sum() + COUPLING * (p**2 * q**2).sum()
    return total


def formula(p: Tensor) -> Tensor:
    """The diagonal of its Hessian, by hand."""
    around = sum(p.roll(step, dim) ** 2 for step in (1, -1) for dim in (0, 1))
    return WELL * (3 * p**2 - 1) + 4 + 2 * COUPLING * around


def field(side: int) -> Tensor:
    """Waves and noise."""
    axis = torch.arange(side, dtype=torch.float64) * (2 * torch.pi / side)
    waves = torch.sin(3 * axis)[:, None] + torch.cos(2 * axis)[None, :] * torch.sin(axis)[:, None]
    return waves + 0.1 * torch.randn(side, side, dtype=torch.float64)


def gradient_by_autograd(p: Tensor) -> Tensor:
    """Plain PyTorch."""
    x = p.clone().requires_grad_()
    (g,) = torch.autograd.grad(energy(x), x)
    return g


def timed(work: Callable[[], Tensor], rounds: int) -> tuple[float, Tensor]:
    """Seconds of the fastest of some rounds, and the result."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - start)
    return min(taken), result


class Times(NamedTuple):
    """Seconds for one size."""

    unknowns: int
    gradient: float
    whole: float
    planned: float
    products: int


def measure(side: int) -> tuple[Times, Tensor]:
    """Seconds of a gradient, of the diagonal with all that it takes, and with a plan; the diagonal."""
    p = field(side)
    gradient, _ = timed(lambda: gradient_by_autograd(p), 3)
    whole, diagonal = timed(lambda: diaghessian(energy, p)[0], 1 if side > 500 else 3)
    plan = plan_hessian(energy, p)
    planned, again = timed(lambda: plan.diagonal(p), 3)
    if not torch.allclose(diagonal, again, rtol=1e-12):
        raise RuntimeError("the plan gives another diagonal")
    return Times(p.numel(), gradient, whole, planned, plan.ncolors), diagonal


def hutchinson(p: Tensor, products: int) -> list[float]:
    """Relative error of the estimate by random signs, after each product."""
    exact = formula(p)
    x = p.clone().requires_grad_()
    (g,) = torch.autograd.grad(energy(x), x, create_graph=True)
    total = torch.zeros_like(p)
    errors = []
    for count in range(1, products + 1):
        signs = torch.randint(0, 2, p.shape, dtype=p.dtype) * 2 - 1
        (Hv,) = torch.autograd.grad(g, x, signs, retain_graph=True)
        total += signs * Hv
        errors.append(float((total / count - exact).norm() / exact.norm()))
    return errors


def plot(
    p: Tensor, diagonal: Tensor, times: Sequence[Times], errors: Sequence[float], exact: float, path: Path
) -> None:
    """Field, diagonal, times over size, and the error of estimates, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
    axes = grid.ravel()
    for ax, values, title, colors in (
        (axes[0], p, "field", "RdBu_r"),
        (axes[1], diagonal, "diagonal of the Hessian", "viridis"),
    ):
        coarse = torch.nn.functional.avg_pool2d(values[None], max(1, len(values) // 200))[0]
        image = ax.imshow(coarse.numpy(), cmap=colors)
        figure.colorbar(image, ax=ax, shrink=0.85)
        ax.set_title(title, fontsize=10)
        ax.set_xticks([])
        ax.set_yticks([])
    sizes = [t.unknowns for t in times]
    for label, values, color, style in (
        ("diaghessian", [t.whole for t in times], "tab:purple", "o-"),
        ("plan.diagonal", [t.planned for t in times], "tab:orange", "s-"),
        ("one gradient", [t.gradient for t in times], "tab:gray", "o--"),
    ):
        axes[2].loglog(sizes, values, style, markersize=4, linewidth=1.2, color=color, label=label)
    axes[2].set_xlabel("unknowns")
    axes[2].set_title("seconds", fontsize=10)
    axes[2].legend(frameon=False, fontsize=9)
    axes[3].loglog(range(1, len(errors) + 1), errors, linewidth=1.2, color="tab:red", label="Hutchinson")
    label = f"diaghessian, {times[-1].products} colors"
    axes[3].axhline(max(exact, 1e-17), linewidth=1.2, color="tab:purple", label=label)
    axes[3].set_xlabel("Hessian-vector products")
    axes[3].set_title("relative error of the diagonal", fontsize=10)
    axes[3].legend(frameon=False, fontsize=9)
    for ax in axes[2:]:
        ax.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> float:
    """Measure, compare, plot; returns the relative error of the diagonal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=1000, help="sites along each side of the lattice")
    parser.add_argument("--estimates", type=int, default=20, help="products for Hutchinson's estimate")
    parser.add_argument("--output", type=Path, default=OUTPUT / "laplacian.png", help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="a small lattice: a smoke test")
    options = parser.parse_args(arguments)
    if options.side < 10:
        parser.error(f"--side: expected at least 10, got {options.side}")
    if options.estimates < 1:
        parser.error(f"--estimates: expected at least 1, got {options.estimates}")
    side = min(options.side, 100) if options.quick else options.side
    estimates = min(options.estimates, 5) if options.quick else options.estimates

    times = []
    for part in (10, 3, 1):
        torch.manual_seed(0)
        found, diagonal = measure(side // part)
        times.append(found)
        print(
            f"{found.unknowns:8d} unknowns: gradient {1e3 * found.gradient:.1f} ms; diaghessian "
            f"{1e3 * found.whole:.0f} ms ({found.whole / found.gradient:.0f} gradients); with a plan "
            f"{1e3 * found.planned:.1f} ms ({found.planned / found.gradient:.0f} gradients)"
        )
    torch.manual_seed(0)
    p = field(side)
    error = float((diagonal - formula(p)).norm() / formula(p).norm())
    print(f"relative error against the formula: {error:.1e}")
    errors = hutchinson(p, estimates)
    print(f"Hutchinson's estimate from {estimates} products: {errors[-1]:.1e}")
    plot(p, diagonal, times, errors, error, options.output)
    print(f"field, diagonal and times: {options.output}")
    return error


if __name__ == "__main__":
    main()
