"""The 2-D Brusselator, a stiff reaction and diffusion on a grid, solved by SciPy with sparse Jacobians.

    u_t = 1 + u² v - 4.4 u + a (u_xx + u_yy) + s(t, x, y),    v_t = 3.4 u - u² v + a (v_xx + v_yy)

on the unit square, periodic; at t = 1.1 a disk begins to be fed (s = 5 in it). SciPy's BDF method needs the
Jacobian of the right-hand side now and then. Three ways to get it: SciPy's finite differences, one call for
each unknown; the same with the structure given by hand, so that many unknowns are moved at once; and a plan,
which finds the structure by itself and gives exact values. All three are compared with a far more accurate
solution.

The pictures show u and the work, and which entries of the Jacobian share a product.

    python examples/brusselator.py --size 48
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from torchzygote import JacobianPlan, plan_jacobian

OUTPUT = Path(__file__).parent / "output"
END = 11.5
SHOWN = (0.0, 1.1, 2.0, END)
Array = np.ndarray[Any, Any]


class Brusselator:
    """Right-hand side on a grid of ``size`` by ``size`` points; it counts its calls."""

    def __init__(self, size: int, diffusion: float) -> None:
        self.size = size
        self.calls = 0
        axis = torch.arange(size, dtype=torch.float64) / size
        self.x, self.y = torch.meshgrid(axis, axis, indexing="ij")
        self.fed = 5.0 * ((self.x - 0.3) ** 2 + (self.y - 0.6) ** 2 <= 0.01)
        self.strength = diffusion * size**2

    def start(self) -> Tensor:
        """U and v at t = 0, shape (2, size, size)."""
        u = 22 * self.y * (1 - self.y) ** 1.5
        v = 27 * self.x * (1 - self.x) ** 1.5
        return torch.stack([u, v])

    def __call__(self, z: Tensor, t: float) -> Tensor:
        """The time derivative of ``z``, shape (2, size, size)."""
        self.calls += 1
        u, v = z[0], z[1]
        around = z.roll(1, 1) + z.roll(-1, 1) + z.roll(1, 2) + z.roll(-1, 2) - 4 * z
        reaction = u**2 * v
        source = self.fed if float(t) >= 1.1 else 0.0
        change = torch.stack([1 + reaction - 4.4 * u + source, 3.4 * u - reaction])
        return change + self.strength * around

    def flat(self, t: float, z: Array) -> Array:
        """The same in NumPy, as SciPy wants it."""
        return self(torch.from_numpy(z).view(2, self.size, self.size), t).numpy().reshape(-1)


class Run(NamedTuple):
    """A solution and what it took."""

    name: str
    times: Array
    states: Array
    calls: int
    jacobians: int
    products: int
    seconds: float

    def __str__(self) -> str:
        products = f" and {self.products} products" if self.products else ""
        return (
            f"{self.name}: {self.seconds:.2f} s, {self.jacobians} Jacobians, "
            f"{self.calls} calls of the right-hand side{products}"
        )


def solve(name: str, rhs: Brusselator, tolerance: float, plan: JacobianPlan | None = None, **how: Any) -> Run:
    """SciPy's BDF, with Jacobians from ``plan`` if there is one."""
    products = 0

    def jacobian(t: float, z: Array) -> Any:
        nonlocal products
        assert plan is not None
        products += plan.ncolors + 1  # one of them for the check
        (J,) = plan(torch.from_numpy(z).view(2, rhs.size, rhs.size), t)[:1]
        parts = (J.values().numpy(), J.col_indices().numpy(), J.crow_indices().numpy())
        return scipy.sparse.csr_matrix(parts, shape=tuple(J.shape))

    if plan is not None:
        how["jac"] = jacobian
    rhs.calls = 0
    start = time.perf_counter()
    found = solve_ivp(
        rhs.flat,
        (0, END),
        rhs.start().numpy().reshape(-1),
        method="BDF",
        t_eval=np.array(SHOWN),
        rtol=tolerance,
        atol=tolerance / 10,
        **how,
    )
    seconds = time.perf_counter() - start
    if not found.success:
        raise RuntimeError(found.message)
    return Run(name, found.t, found.y.T, rhs.calls, found.njev, products, seconds)


def largest_difference(one: Run, other: Run) -> float:
    """Between two solutions at the end, over the size of the solution."""
    return float(np.abs(one.states[-1] - other.states[-1]).max() / np.abs(other.states[-1]).max())


def plot(runs: Sequence[Run], accurate: Run, size: int, path: Path) -> None:
    """U at some times, and what each way took, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(8, 4.4), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(1.15, 1))
    axes = above.subplots(1, len(SHOWN))
    bars = below.subplots()
    fields = [state.reshape(2, size, size)[0] for state in accurate.states]
    largest = max(float(u.max()) for u in fields)
    for ax, t, u in zip(axes, accurate.times, fields, strict=False):
        image = ax.imshow(u.T, origin="lower", extent=(0, 1, 0, 1), cmap="magma", vmin=0, vmax=largest)
        ax.set_title(f"u at t = {t:g}", fontsize=10)
        ax.set_xlabel("x")
        ax.set_xticks([0, 1])
        ax.set_yticks([0, 1] if ax is axes[0] else [])
    axes[0].set_ylabel("y")
    above.colorbar(image, ax=list(axes), shrink=0.8, pad=0.01)
    names = [run.name.replace(", ", ",\n") for run in runs]
    bars.barh(names, [run.seconds for run in runs], color=["tab:gray", "tab:orange", "tab:purple"])
    for i, run in enumerate(runs):
        products = f" + {run.products} products" if run.products else ""
        text = f" {run.seconds:.1f} s, {run.calls} calls{products}"
        bars.annotate(text, (run.seconds, i), va="center", fontsize=9)
    bars.set_xlim(0, 1.3 * max(run.seconds for run in runs))
    title = "seconds, calls of the right-hand side and products of plans, with Jacobians from"
    bars.set_title(title, fontsize=10)
    bars.spines[["top", "right"]].set_visible(False)
    bars.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    """Solve, compare, plot; returns the runs by name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=24, help="grid points along each side")
    parser.add_argument("--diffusion", type=float, default=0.01)
    parser.add_argument("--tolerance", type=float, default=1e-5, help="relative tolerance of the solver")
    parser.add_argument("--output", type=Path, default=OUTPUT / "brusselator.png", help="where the plot goes")
    parser.add_argument("--quick", action="store_true", help="a coarse grid: a smoke test")
    options = parser.parse_args(arguments)
    size = min(options.size, 10) if options.quick else options.size
    if size < 3:
        parser.error(f"--size: expected at least 3, got {size}")
    if not 0 < options.tolerance < 1:
        parser.error(f"--tolerance: expected a number between 0 and 1, got {options.tolerance}")

    torch.set_num_threads(1)  # thousands of small operations: more threads only wait for each other
    rhs = Brusselator(size, options.diffusion)
    began = time.perf_counter()
    plan = plan_jacobian(rhs, rhs.start(), 0.0, argnums=0)
    made = time.perf_counter() - began
    print(f"{repr(plan).splitlines()[0]}, found in {1e3 * made:.0f} ms")
    plan(rhs.start(), 0.0)  # what PyTorch loads at the first call isn't to be timed

    (pattern,) = plan.patterns
    ones = np.ones(pattern.nnz)
    by_hand = scipy.sparse.csr_matrix((ones, pattern.indices.numpy(), pattern.indptr.numpy()))
    runs = [
        solve("finite differences", rhs, options.tolerance),
        solve("finite differences, structure given", rhs, options.tolerance, jac_sparsity=by_hand),
        solve("plan", rhs, options.tolerance, plan),
    ]
    accurate = solve("accurate", rhs, options.tolerance * 1e-3, plan)
    for run in runs:
        print(f"{run}; distance from the solution {largest_difference(run, accurate):.1e}")
    blind, told, ours = runs
    print(
        f"with the plan: {blind.seconds / ours.seconds:.1f} times as fast as by differences, "
        f"{told.seconds / ours.seconds:.1f} times where these are given the structure"
    )
    plot(runs, accurate, size, options.output)
    structure = options.output.with_name(f"{options.output.stem}_structure.png")
    plan.spy(structure)
    print(f"solution and work: {options.output}")
    print(f"structure and colors: {structure}")
    return {run.name: run for run in runs}


if __name__ == "__main__":
    main()
