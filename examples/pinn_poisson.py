"""A physics-informed network for a Poisson problem with a known solution.

    -(u_xx + u_yy) = f  on the unit square,   u = 0 on its boundary,   u = sin(pi x) sin(2 pi y)

The Laplacian at every point comes from one diaghessian: no point meets another, so the diagonal of the
Hessian of the sum holds each point's second derivatives. It is differentiated again, by the parameters of the
network, as withgradient is around it. The plot shows the network, its error, and the error during training.

    python examples/pinn_poisson.py --points 1024
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchzygote import Params, diaghessian, withgradient

OUTPUT = Path(__file__).parent / "output"
WAVES = torch.tensor([1.0, 2.0])


def exact(z: Tensor) -> Tensor:
    """The solution at points (n, 2)."""
    return torch.sin(torch.pi * WAVES * z).prod(dim=1)


def source(z: Tensor) -> Tensor:
    """The right-hand side f, minus the Laplacian of the solution."""
    return (torch.pi**2 * (WAVES**2).sum()) * exact(z)


class Solution(nn.Module):
    """A small network, times a function that is zero on the boundary: the condition there always holds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        )

    def forward(self, z: Tensor) -> Tensor:
        """Values at points (n, 2)."""
        return (4 * z * (1 - z)).prod(dim=1) * self.net(2 * z - 1).squeeze(1)


def laplacian(u: nn.Module, z: Tensor) -> Tensor:
    """The Laplacian of ``u`` at each of the points (n, 2)."""
    (second,) = diaghessian(lambda z: u(z).sum(), z)
    return second.sum(dim=1)


def grid(n: int) -> Tensor:
    """Points (n * n, 2) that no training has seen."""
    axis = torch.linspace(0, 1, n)
    return torch.cartesian_prod(axis, axis)


def relative_error(u: nn.Module, z: Tensor) -> float:
    """Root mean square of the error over that of the solution."""
    with torch.no_grad():
        return float((u(z) - exact(z)).norm() / exact(z).norm())


def train(u: nn.Module, points: int, steps: int, polish: int, quiet: bool) -> tuple[list[float], list[float]]:
    """Residuals and errors: Adam on fresh points in each step, then L-BFGS on fixed ones."""
    params = Params(u)
    watched = grid(41)
    residuals: list[float] = []
    errors: list[float] = []

    def evaluate(z: Tensor) -> Tensor:
        value, grads = withgradient(lambda: (laplacian(u, z) + source(z)).square().mean(), params)
        grads.assign_()
        return value

    adam = torch.optim.Adam(params, lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(steps, 1))
    progress = tqdm(range(steps), desc="Adam", unit="step", disable=quiet)
    for step in progress:
        residuals.append(float(evaluate(torch.rand(points, 2))))
        adam.step()
        schedule.step()
        if step % 10 == 0:
            errors.append(relative_error(u, watched))
            progress.set_postfix(error=f"{errors[-1]:.1e}")
    z = torch.quasirandom.SobolEngine(2, scramble=True, seed=0).draw(points)
    lbfgs = torch.optim.LBFGS(params, max_iter=10, history_size=50, line_search_fn="strong_wolfe")
    for _ in tqdm(range(polish // 10), desc="L-BFGS", unit="10 steps", disable=quiet):
        residuals.extend([float(lbfgs.step(lambda: evaluate(z)))] * 10)
        errors.append(relative_error(u, watched))
    return residuals, errors


def plot(u: nn.Module, errors: Sequence[float], steps: int, path: Path) -> None:
    """The network's solution, its error, and how the error fell: with Adam for ``steps``, then L-BFGS."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = 101
    z = grid(n)
    with torch.no_grad():
        found = u(z).reshape(n, n).T.numpy()
        error = (u(z) - exact(z)).abs().reshape(n, n).T.numpy()
    figure, places = plt.subplot_mosaic(
        [["found", "error"], ["training", "training"]],
        figsize=(8, 6),
        height_ratios=(3, 2),
        layout="constrained",
    )
    for name, values, title, colors in (
        ("found", found, "the network's u", "RdBu_r"),
        ("error", error, "distance from the exact u", "viridis"),
    ):
        axes = places[name]
        image = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1), cmap=colors)
        figure.colorbar(image, ax=axes, shrink=0.9)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("x")
        axes.set_ylabel("y")
    training = places["training"]
    training.semilogy([10 * i for i in range(len(errors))], errors)
    training.axvline(steps, color="0.5", linewidth=1, linestyle="--")
    training.annotate(" L-BFGS from here", (steps, max(errors)), va="top", fontsize=9)
    training.set_ylabel("relative error")
    training.set_xlabel("step")
    training.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> float:
    """Train, compare with the exact solution, plot; returns the relative error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=256, help="collocation points per step")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, default=150, help="steps of Adam")
    parser.add_argument("--polish", type=int, default=200, help="steps of L-BFGS after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT / "poisson.png", help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="few steps, no progress bar: a smoke test")
    options = parser.parse_args(arguments)
    for name in ("points", "width", "steps", "polish"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    steps, polish = (40, 20) if options.quick else (options.steps, options.polish)
    points = min(options.points, 128) if options.quick else options.points

    torch.manual_seed(options.seed)
    u = Solution(options.width)
    before = relative_error(u, grid(41))
    start = time.perf_counter()
    residuals, errors = train(u, points, steps, polish, options.quick)
    seconds = time.perf_counter() - start
    error = relative_error(u, grid(101))
    print(f"{steps} steps of Adam, {polish} of L-BFGS on {points} points: {seconds:.1f} s")
    print(f"mean squared residual: {residuals[0]:.1e} to {residuals[-1]:.1e}")
    print(f"relative error: {before:.1e} to {error:.1e}")
    plot(u, errors, steps, options.output)
    print(f"solution and error: {options.output}")
    return error


if __name__ == "__main__":
    main()
