"""Random programs, views and writes in place among them: nothing that is nonzero may be missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detection import detect_hessian, detect_jacobian
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

N = 6
MATRIX = torch.tensor(
    [
        [1, 0, 0, 2, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 3, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1],
        [0] * 6,
    ]
).double()
INDEX = torch.tensor([5, 0, 0, 3, 2, 1])
MASK = torch.tensor([True, False, True, True, False, False])

# Each takes two vectors and gives one.
STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sin": lambda a, b: a.sin(),
    "square": lambda a, b: a * a,
    "add": lambda a, b: a + 0.3 * b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / (2 + b * b),
    "roll": lambda a, b: a.roll(1),
    "flip": lambda a, b: a.flip(0),
    "index": lambda a, b: a[INDEX],
    "halves": lambda a, b: torch.cat([a[3:], b[:3]]),
    "matrix": lambda a, b: MATRIX @ a,
    "where": lambda a, b: torch.where(MASK, a, b),
    "computed where": lambda a, b: torch.where(a > b, a, b.sin()),
    "masked": lambda a, b: a * MASK,
    "cumsum": lambda a, b: a.cumsum(0) * 0.5,
    "mean": lambda a, b: a - b[:3].mean(),
    "square matrix": lambda a, b: (a.view(2, 3) @ b.view(3, 2)).reshape(-1).repeat(2)[:N],
    "transposed": lambda a, b: a.view(2, 3).t().reshape(-1),
    "softmax of part": lambda a, b: torch.cat([a[:3].softmax(0), b[3:]]),
    "sort": lambda a, b: a.sort().values,
    "scatter": lambda a, b: a.scatter_add(0, INDEX, b),
    "prod": lambda a, b: a * b[1:4].prod(),
    "write": lambda a, b: _written(a, b),
    "write into a view": lambda a, b: _written_view(a, b),
    "write back and forth": lambda a, b: _swapped(a, b),
    "complex": lambda a, b: torch.view_as_real(torch.complex(a[:3], b[:3]) ** 2).reshape(-1),
    "real part written": lambda a, b: _real_written(a, b),
    "nested gradient": lambda a, b: torch.func.grad(lambda v: (v[1:] * v[:-1] ** 2).sum())(a),
    "vmap": lambda a, b: torch.func.vmap(lambda u, v: u * v.sum())(a.view(2, 3), b.view(2, 3)).reshape(-1),
}


def _written(a: Tensor, b: Tensor) -> Tensor:
    out = torch.zeros(N, dtype=a.dtype)
    out[1:4] = a[:3]
    out[0] = b[0] * 2
    out[2:] *= 1.5
    return out


def _written_view(a: Tensor, b: Tensor) -> Tensor:
    out = (a * 1).view(2, 3)
    out[:, 1].add_(b[:2])
    out.t()[2].mul_(b[4])
    return out.reshape(-1)


def _swapped(a: Tensor, b: Tensor) -> Tensor:
    out = a * 1
    for i in range(1, N):
        out[i] = out[i - 1] * 0.5 + b[i]
    kept = out[:2].clone()
    out[:2] = 1.0
    return torch.cat([kept, out[2:]])


def _real_written(a: Tensor, b: Tensor) -> Tensor:
    z = torch.zeros(3, dtype=torch.complex128)
    z.real.copy_(a[:3])
    z.imag[1:] = b[:2]
    return torch.view_as_real(z * 1j).reshape(-1)


programs = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=6
)


def run(program: Any, x: Tensor) -> Tensor:
    values = [x]
    for name, first, second in program:
        values.append(STEPS[name](values[-1 - first % len(values)], values[-1 - second % len(values)]))
    return values[-1]


@settings(max_examples=60, deadline=None)
@given(program=programs)
def test_jacobians_of_random_programs_are_covered(program: Any) -> None:
    x = torch.linspace(0.4, 1.1, N, dtype=torch.float64)[torch.tensor([2, 0, 4, 1, 5, 3])]
    (pattern,) = detect_jacobian(lambda x: run(program, x), [x])
    J = torch.autograd.functional.jacobian(lambda x: run(program, x), x)
    assert pattern.unknown == ()
    assert not ((J != 0) & ~pattern.to_dense()).any()


@settings(max_examples=60, deadline=None)
@given(program=programs)
def test_hessians_of_random_programs_are_covered(program: Any) -> None:
    x = torch.linspace(0.4, 1.1, N, dtype=torch.float64)[torch.tensor([2, 0, 4, 1, 5, 3])]
    weights = torch.linspace(0.7, 1.3, N, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (run(program, x) * weights).sum()

    (pattern,) = detect_hessian(loss, [x])
    H = torch.autograd.functional.hessian(loss, x)
    assert pattern.unknown == ()
    assert not ((H != 0) & ~pattern.to_dense()).any()
