"""Functions whose elements depend on elements at the same distances everywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

D = torch.float64
X = torch.linspace(0.3, 1.9, 42, dtype=D)
ZERO, ONE = torch.zeros(1, dtype=D), torch.ones(1, dtype=D)


C = torch.linspace(-1, 2, 42, dtype=D)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def on_torus(x: Tensor) -> Tensor:
    u = x.view(6, 7)
    return ((u.roll(1, 0) + u.roll(-1, 0) + u.roll(1, 1) + u.roll(-1, -1) - 4 * u) * u.exp()).reshape(-1)


def with_borders(x: Tensor) -> Tensor:
    u = F.pad(x.view(6, 7), (1, 1, 1, 1))
    return (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - 4 * u[1:-1, 1:-1]).sin().reshape(-1)


def burgers(x: Tensor) -> Tensor:
    for _ in range(3):
        x = x - 0.1 * x * (x.roll(-1) - x.roll(1)) + 0.1 * (x.roll(1) - 2 * x + x.roll(-1))
    return x


# the function, and how many entries its Jacobian has
VALUES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "neighbors": (lambda x: x[1:] * x[:-1].sin(), 82),
    "three neighbors": (lambda x: x[2:] - x[1:-1] * x[:-2], 120),
    "differences of differences": (lambda x: x.diff().square().diff(), 120),
    "around": (lambda x: x.roll(1) * (x.roll(-1) - x.roll(2)) - x.sin(), 168),
    "around, far": (lambda x: x.roll(40) * x.roll(-43), 84),
    "the same place twice": (lambda x: x.roll(20) * x.roll(-22), 42),
    "padded": (lambda x: F.pad(x, (2, 1)) * F.pad(x, (1, 2)).exp(), 84),
    "cut": (lambda x: F.pad(x, (-1, -2)), 39),
    "borders": (lambda x: torch.cat([x[:1], x[1:].square()]) * torch.cat([x, ONE])[:-1], 42),
    "a border of unknown size": (lambda x: torch.cat([ZERO, x]) * torch.cat([x, ONE]), 84),
    "upwind": (lambda x: torch.where(x[1:] > 1, x[1:] - x[:-1], x[:-1] ** 2), 82),
    "a limiter": (lambda x: torch.maximum(x[2:] - x[1:-1], x[1:-1] - x[:-2]).clamp(min=0.01), 120),
    "on a torus": (on_torus, 210),
    "with borders": (with_borders, 184),
    "time steps": (burgers, 42 * 7),
    "a grid in a row and back": (lambda x: (x.view(6, 7)[1:] * x.view(6, 7)[:-1]).sin(), 70),
    "from a row": (lambda x: (x.view(6, 7).roll(1, 0).reshape(-1) * x).view(6, 7).roll(1, 1), 84),
}
SUMS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "rosenbrock": (lambda x: (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum(), 124),
    "bending": (lambda x: x.diff().diff().square().sum() + x.exp().mean(), 204),
    "a field": (
        lambda x: (x.view(6, 7).diff(dim=0) ** 4).sum() + x.view(6, 7).diff(dim=1).cos().sum(),
        42 + 2 * (35 + 36),
    ),
    "around": (lambda x: (x * x.roll(1)).sin().sum(), 126),
    "two terms of other weights": (lambda x: (x[1:] * x[:-1]).sum() * 3 - x.log().sum(), 124),
}


@st.composite
def programs(draw: st.DrawFn) -> Callable[[Tensor], Tensor]:
    """Random moves and products of values of one length, on a line or a grid."""
    shape = draw(st.sampled_from([(42,), (6, 7), (2, 3, 7)]))
    steps = draw(
        st.lists(st.tuples(st.sampled_from("rspcmd"), st.integers(0, 2), st.integers(-3, 3)), max_size=7)
    )

    def cut(u: Tensor, axis: int, by: int) -> Tensor:
        """Moved, with zeros where nothing comes from."""
        n = u.shape[axis]
        by = max(-n, min(n, by))
        part = u.narrow(axis, max(0, -by), n - abs(by))
        pad = [0, 0] * (u.dim() - 1 - axis) + [max(0, by), max(0, -by)]
        return F.pad(part, pad)

    def run(x: Tensor) -> Tensor:
        u = first = x.view(shape)
        for what, axis, by in steps:
            axis %= len(shape)
            if what == "r":
                u = u.roll(by, axis)
            elif what == "s":
                u = cut(u, axis, by)
            elif what == "p":
                u = u * cut(first, axis, -by)
            elif what == "c":
                size = min(abs(by), u.shape[axis])
                parts = u.split([size, u.shape[axis] - size], axis)
                u = torch.cat([u.narrow(axis, size, u.shape[axis] - size).sin(), parts[0]], axis)
            elif what == "m":
                u = u.sin() + first
            else:
                u = u.reshape(-1).view(shape) - u.roll(by, axis)
        return u.reshape(-1)

    return run
