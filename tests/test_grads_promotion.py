"""Arithmetic of Grads with 0-dim tensors and odd numbers: dtypes and values as of plain tensors."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import GradDict, Grads, Params

OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "**": operator.pow,
}
VALUES = {
    "0-dim": torch.tensor(3.0),
    "vector": torch.tensor([1.0, 2.0]),
    "half": torch.tensor([1.0, 2.0], dtype=torch.float16),
    "integers": torch.tensor([2**24 + 1, 3]),
    "0-dim integer": torch.tensor(2**24 + 1),
    "0-dim complex": torch.tensor(1 + 2j),
}
SCALARS = [
    torch.tensor(2.0, dtype=torch.float64),
    torch.tensor(2.0),
    torch.tensor(2, dtype=torch.int32),
    torch.tensor(2.0, dtype=torch.bfloat16),
]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda s: str(s.dtype))
@pytest.mark.parametrize("symbol", OPERATORS)
@pytest.mark.parametrize("which", [*([name] for name in VALUES), list(VALUES)], ids=str)
def test_0_dim_tensors_promote_as_tensors_do(symbol: str, which: list[str], scalar: Tensor) -> None:
    op = OPERATORS[symbol]
    g = GradDict({torch.zeros(()): VALUES[name] for name in which})
    for left, right in ((g, scalar), (scalar, g)):
        found = list(op(left, right).values())
        expected = [op(VALUES[n], scalar) if left is g else op(scalar, VALUES[n]) for n in which]
        assert [x.dtype for x in found] == [x.dtype for x in expected]
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("symbol", ["+", "-", "*"])
@pytest.mark.parametrize("number", [math.inf, -math.inf, complex(math.inf, 1), 2.0])
def test_infinite_and_complex_numbers(symbol: str, number: complex) -> None:
    op = OPERATORS[symbol]
    for z in (torch.tensor([1 + 2j, -1 - 0.5j]), torch.tensor([1.0, -2.0])):
        g = GradDict({z: z})
        torch.testing.assert_close(op(g, number)[z], op(z, number), equal_nan=True)
        torch.testing.assert_close(op(number, g)[z], op(number, z), equal_nan=True)


def test_nonfinite_passes_over_whole_numbers() -> None:
    a, b, c, d = (torch.zeros(2) for _ in range(4))
    values = [torch.tensor([1, 2]), torch.tensor([1.0, math.nan]), None, torch.tensor([True, False])]
    (found,) = Grads(Params([a, b, c, d]), values).nonfinite()
    assert found is b


@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_nonfinite_makes_few_calls() -> None:
    keys = [torch.zeros(3) for _ in range(40)]
    values = [x.double() if i % 2 else x for i, x in enumerate(keys)]
    values[7] = torch.full((3,), math.inf, dtype=torch.float64)
    grads = Grads(Params(keys), values)
    with torch.profiler.profile() as profile:
        (found,) = grads.nonfinite()
    assert found is keys[7]
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_foreach_norm"] == calls["aten::stack"] == 2
    assert calls.get("aten::isinf", 0) + calls.get("aten::isfinite", 0) <= 2
