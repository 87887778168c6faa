"""Derivatives by other means: central differences in float64, torch.func and torch.autograd.functional.

They share no code with the package. Complex arguments are perturbed along both axes; the results follow the
convention of PyTorch (and Zygote): df/d(re) + i df/d(im).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def to_double(x: Tensor) -> Tensor:
    """The same values in double precision."""
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64)


def fd_jacobian(f: Callable[..., Tensor], *args: Tensor, step: float = 1e-6) -> list[Tensor]:
    """Central differences: for each argument a matrix (y.numel(), argument.numel())."""
    xs = [to_double(x) for x in args]
    matrices = []
    for which, x in enumerate(xs):
        columns = []
        directions = (1.0, 1.0j) if x.is_complex() else (1.0,)
        for i in range(x.numel()):
            column = 0
            for direction in directions:
                ends = []
                for sign in (1, -1):
                    moved = x.clone()
                    moved.view(-1)[i] += sign * step * direction
                    with torch.no_grad():
                        ends.append(f(*xs[:which], moved, *xs[which + 1 :]).reshape(-1))
                column = column + direction * (ends[0] - ends[1]) / (2 * step)
            columns.append(column)
        if columns:
            matrices.append(torch.stack(columns, dim=1))
        else:
            with torch.no_grad():
                rows = f(*xs).numel()
            matrices.append(torch.zeros((rows, 0), dtype=x.dtype))
    return matrices


def fd_gradient(f: Callable[..., Tensor], *args: Tensor, step: float = 1e-6) -> list[Tensor]:
    """Central differences of a scalar function, in the shapes of the arguments."""
    return [J.reshape(x.shape) for J, x in zip(fd_jacobian(f, *args, step=step), args, strict=True)]


def fd_hessian(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-4) -> Tensor:
    """Second central differences, (x.numel(), x.numel())."""
    x = to_double(x)
    n = x.numel()

    def at(i: int, a: float, j: int, b: float) -> Tensor:
        moved = x.clone()
        moved.view(-1)[i] += a
        moved.view(-1)[j] += b
        with torch.no_grad():
            return f(moved)

    H = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(n):
            corners = (
                at(i, step, j, step) - at(i, step, j, -step) - at(i, -step, j, step) + at(i, -step, j, -step)
            )
            H[i, j] = corners / (4 * step * step)
    return H


def func_jacobian(f: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """``torch.func.jacrev`` in the layout of this package."""
    rows = f(*args).numel()
    found: Any = torch.func.jacrev(f, argnums=tuple(range(len(args))))(*args)
    return [J.reshape(rows, x.numel()) for J, x in zip(found, args, strict=True)]


def func_hessian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``torch.func.hessian`` in the layout of this package."""
    H: Tensor = torch.func.hessian(f)(x)
    return H.reshape(x.numel(), x.numel())


def true_jacobian(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    """Which entries ``torch.autograd.functional`` finds to be nonzero, as a matrix."""
    J = torch.autograd.functional.jacobian(f, x)
    return J.reshape(-1, x.numel()) != 0


def true_hessian(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(f, x).reshape(x.numel(), x.numel()).abs() > 1e-10


def covers(found: Tensor, expected: Tensor) -> bool:
    """Whether a pattern lists all that it must."""
    return not bool((expected & ~found).any())


def recorded_names(root: Tensor) -> list[str]:
    """The names of all nodes of the recorded graph below, one for each node."""
    stack, seen = [root.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return [node.name() for node in seen]
