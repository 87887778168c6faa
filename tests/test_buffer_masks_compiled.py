"""Writes into a Buffer by a mask, compiled: the tracer doesn't know how many elements it selects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from needs_torch import masked_compiled
from torch import Tensor

from torchzygote import Buffer, gradient

MASK = torch.tensor([True, False, True])
X = torch.tensor([0.3, 0.4, 0.5])
Write = Callable[[Buffer, Tensor], None]


def values(b: Buffer, x: Tensor) -> None:
    b[MASK] = x[MASK].sin()


def added(b: Buffer, x: Tensor) -> None:
    b[MASK] += 1.5 * x[MASK]


def one_for_all(b: Buffer, x: Tensor) -> None:
    b[MASK] = x[1:2].sin()


def number(b: Buffer, x: Tensor) -> None:
    b[MASK] = x[1].sin()


COS = X.cos()
CASES = [
    pytest.param(values, [float(COS[0]), 0.0, float(COS[2])], marks=masked_compiled),
    pytest.param(added, [1.5, 0.0, 1.5], marks=masked_compiled),
    (one_for_all, [0.0, 2 * float(COS[1]), 0.0]),
    (number, [0.0, 2 * float(COS[1]), 0.0]),
]


@pytest.mark.parametrize(("write", "expected"), CASES)
@pytest.mark.parametrize("way", [lambda f, x: gradient(f, x)[0], lambda f, x: torch.func.grad(f)(x)])
def test_masks_are_compiled(
    write: Write, expected: list[float], way: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> None:
    def f(x: Tensor) -> Tensor:
        b = Buffer(x, 3)
        write(b, x)
        return b.copy().sum()

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: way(f, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), torch.tensor(expected))
    value = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value(X), f(X))


@masked_compiled
def test_rows_are_too() -> None:
    x = torch.rand(3, 2)

    def f(x: Tensor) -> Tensor:
        b = Buffer(x, 3, 2)
        b[MASK] = x[MASK] ** 2
        return b.copy().sum()

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gradient(f, x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * x * MASK[:, None])
