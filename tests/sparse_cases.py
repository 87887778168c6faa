"""Functions with sparse derivatives, for the tests of detection, compressed results and plans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F


def heat(u: Tensor) -> Tensor:
    """A stencil on a grid with u**3 as its source."""
    p = F.pad(u, (1, 1, 1, 1))
    return p[2:, 1:-1] + p[:-2, 1:-1] + p[1:-1, 2:] + p[1:-1, :-2] - 4 * u + u**3


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def brusselator(n: int) -> Callable[[Tensor], Tensor]:
    """Two substances that react at each point of a grid, and diffuse across its edges to the other side."""

    def laplacian(v: Tensor) -> Tensor:
        return v.roll(1, 0) + v.roll(-1, 0) + v.roll(1, 1) + v.roll(-1, 1) - 4 * v

    def f(state: Tensor) -> Tensor:
        u, v = state.view(2, n, n)
        du = 1 + u * u * v - 4.4 * u + 0.02 * laplacian(u)
        dv = 3.4 * u - u * u * v + 0.02 * laplacian(v)
        return torch.stack([du, dv]).view(-1)

    return f


# name: f, shapes of its arguments
JACOBIANS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "band": (lambda x: x[1:] ** 2 * x[:-1], [(9,)]),
    "grid": (heat, [(4, 5)]),
    "elementwise": (torch.sin, [(2, 3, 2)]),
    "wide": (lambda x: x.reshape(3, 4).prod(1), [(12,)]),
    "tall": (lambda x: torch.outer(x.exp(), torch.ones(5, dtype=x.dtype)), [(3,)]),
    "one row": (lambda x: (x**2).sum(), [(7,)]),
    "arrow": (lambda x: torch.cat([x[:1].exp() * x[1:], x.sum().square()[None]]), [(8,)]),
    "two arguments": (lambda a, b: a[1:] * b.sin() + a[:-1], [(6,), (5,)]),
    "three arguments": (lambda a, b, c: (a * b + c[:, None]).relu(), [(3, 4), (4,), (3,)]),
    "one is unused": (lambda a, b: a**2 + 0 * b.detach(), [(4,), (4,)]),
    "0-dim argument": (lambda a, s: a * s, [(4,), ()]),
    "0-dim alone": (lambda s: s.exp() * s, [()]),
    "dense": (lambda x: x.softmax(0), [(6,)]),
    "convolution": (lambda x: F.conv1d(x.view(1, 1, -1), x.new_tensor([[[1.0, -2.0, 1.0]]])).tanh(), [(9,)]),
    "picks": (lambda x: x.sort().values[::2], [(7,)]),
    "nothing listed": (lambda x: torch.zeros_like(x) * x, [(4,)]),
}
# name: f, shape of its argument
HESSIANS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "Rosenbrock": (rosenbrock, (9,)),
    "grid": (lambda u: (heat(u) ** 2).sum(), (4, 5)),
    "arrow": (lambda x: (x[0] * x[1:].sin()).sum() + x.pow(4).sum(), (8,)),
    "separable": (lambda x: x.cosh().sum(), (2, 3, 2)),
    "blocks": (lambda x: x.view(3, 4).prod(1).sum(), (12,)),
    "dense": (lambda x: x.logsumexp(0), (5,)),
    "no diagonal": (lambda x: x[0] * x[1] + x[2] * x[3], (4,)),
    "one element": (lambda x: x.exp().sum(), (1,)),
    "quadratic and linear": (lambda x: (x[:3] ** 2).sum() + x.sum(), (6,)),
    "linear": (lambda x: x.sum(), (4,)),
}


def inputs(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype) + 0.25 for shape in shapes]


@st.composite
def sparse_functions(draw: st.DrawFn) -> tuple[Callable[[Tensor], Tensor], int]:
    """A function whose results each depend on a few elements, some in common, drawn at random."""
    n = draw(st.integers(1, 9))
    m = draw(st.integers(1, 9))
    index = st.lists(st.integers(0, n - 1), min_size=m, max_size=m)
    first, second, third = (torch.tensor(draw(index)) for _ in range(3))
    link = draw(st.sampled_from(["product", "sum", "nested", "scatter", "matrix"]))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=m, max_size=m)))

    def f(x: Tensor) -> Tensor:
        a, b, c = x[first], x[second], x[third]
        y = a * b.sin() if link in ("product", "nested") else a + b**2
        if link == "nested":
            y = torch.where(mask, y, c.exp() * y[second % m])
        if link == "scatter":
            y = x.new_zeros(n).index_add(0, third, y)
        if link == "matrix":
            weights = torch.where(mask, 1.5, 0.0).to(x.dtype)
            y = torch.outer(weights, y.tanh()).diagonal() * c
        return y

    return f, n
