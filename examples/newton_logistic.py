"""Logistic regression on scikit-learn's breast-cancer data: Newton's method against L-BFGS.

Newton's method takes value, gradient and Hessian of each point from one call of withhessian, and converges
quadratically: close to the minimum each step doubles the digits that are right. The plot shows the distance
to the minimum step by step, and against the time that it took.

    python examples/newton_logistic.py --penalty 1e-3
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from torchzygote import withgradient, withhessian

OUTPUT = Path(__file__).parent / "output"
Loss = Callable[[Tensor], Tensor]


class Steps(NamedTuple):
    """The points that a method went through, and the seconds that it had taken at each."""

    points: list[Tensor]
    seconds: list[float]

    def distances(self, minimum: Tensor) -> list[float]:
        """How far each point is from the minimum."""
        return [float((point - minimum).norm()) for point in self.points]


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training features and labels, test features and labels: standardised, with a column of ones."""
    features, labels = load_breast_cancer(return_X_y=True)
    parts = train_test_split(features, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = (torch.from_numpy(part).double() for part in parts)
    mean, deviation = train_x.mean(dim=0), train_x.std(dim=0)

    def prepared(x: Tensor) -> Tensor:
        return torch.cat([(x - mean) / deviation, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)

    return prepared(train_x), train_y, prepared(test_x), test_y


def logistic_loss(x: Tensor, y: Tensor, penalty: float) -> Loss:
    """Mean cross entropy and a penalty on the weights, not on the constant."""
    return lambda w: binary_cross_entropy_with_logits(x @ w, y) + 0.5 * penalty * (w[:-1] ** 2).sum()


def newton(loss: Loss, start: Tensor, steps: int) -> Steps:
    """Newton's method with a step that is halved until the loss falls enough."""
    path = Steps([start], [0.0])
    began = time.perf_counter()
    w = start
    for _ in range(steps):
        value, grad, hess = withhessian(loss, w)
        direction = torch.linalg.solve(hess, grad)
        decrement = float(grad @ direction)
        if decrement < 1e-30:  # the next step would only move rounding errors about
            break
        size = 1.0
        while loss(w - size * direction) > value - 0.25 * size * decrement and size > 1e-3:
            size /= 2
        w = w - size * direction
        path.points.append(w)
        path.seconds.append(time.perf_counter() - began)
    return path


def lbfgs(loss: Loss, start: Tensor, steps: int) -> Steps:
    """SciPy's L-BFGS with the same gradients, stopped by nothing but the number of steps."""
    path = Steps([start], [0.0])

    def value_and_gradient(w: np.ndarray) -> tuple[float, np.ndarray]:
        value, (grad,) = withgradient(loss, w)
        return float(value), grad.numpy()

    def note(w: np.ndarray) -> None:
        path.points.append(torch.from_numpy(w.copy()))
        path.seconds.append(time.perf_counter() - began)

    began = time.perf_counter()
    minimize(
        value_and_gradient,
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        callback=note,
        options={"maxiter": steps, "maxfun": 10 * steps, "ftol": 0, "gtol": 0},
    )
    return path


def order(distances: Sequence[float]) -> float:
    """The last order of convergence that rounding errors don't blur: the distance goes as its power."""
    clear = [d for d in distances if d > 1e-12]
    a, b, c = clear[-3:]
    return math.log(c / b) / math.log(b / a)


def plot(paths: dict[str, Steps], minimum: Tensor, path: Path) -> None:
    """Distance from the minimum over steps and over time, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(8, 3.8), layout="constrained")
    for (name, found), color in zip(paths.items(), ("tab:blue", "tab:orange"), strict=True):
        distances = [max(d, 1e-16) for d in found.distances(minimum)]
        left.semilogy(distances, marker="o", markersize=3, linewidth=1.2, color=color, label=name)
        right.semilogy(
            [1e3 * s for s in found.seconds],
            distances,
            marker="o",
            markersize=3,
            linewidth=1.2,
            color=color,
        )
    left.set_ylim(3e-17, 1e2)
    left.set_xlabel("step")
    left.set_ylabel("distance from the minimum")
    left.legend(frameon=False)
    right.set_xlabel("milliseconds")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> float:
    """Minimize both ways, plot; returns the order of convergence of Newton's method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--penalty", type=float, default=1e-2, help="weight of the squared coefficients")
    parser.add_argument("--steps", type=int, default=120, help="steps of L-BFGS")
    parser.add_argument("--output", type=Path, default=OUTPUT / "newton.png", help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="few steps of L-BFGS: a smoke test")
    options = parser.parse_args(arguments)
    if options.penalty <= 0:
        parser.error(f"--penalty: expected a positive number, got {options.penalty}")

    train_x, train_y, test_x, test_y = load()
    loss = logistic_loss(train_x, train_y, options.penalty)
    start = torch.zeros(train_x.shape[1], dtype=torch.float64)
    withhessian(loss, start)  # what PyTorch loads at the first call isn't to be timed
    paths = {
        "Newton, withhessian": newton(loss, start, 30),
        "L-BFGS": lbfgs(loss, start, 15 if options.quick else options.steps),
    }
    minimum = newton(loss, paths["Newton, withhessian"].points[-1], 3).points[-1]
    for name, found in paths.items():
        print(f"{name}: {len(found.points) - 1} steps, {1e3 * found.seconds[-1]:.0f} ms")
        for step, distance in enumerate(found.distances(minimum)):
            if step < 12 or step == len(found.points) - 1:
                print(f"  step {step:3d}: {distance:.1e} from the minimum")
    found_order = order(paths["Newton, withhessian"].distances(minimum))
    accuracy = ((test_x @ minimum > 0) == (test_y > 0.5)).double().mean().item()
    print(f"order of convergence of Newton's method: {found_order:.2f} (2 is quadratic)")
    print(f"test accuracy: {accuracy:.2%}")
    plot(paths, minimum, options.output)
    print(f"distances from the minimum: {options.output}")
    return found_order


if __name__ == "__main__":
    main()
