"""Pairs of Grads to calculate with, the operators as functions, and a comparison by key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchzygote import Grads, Params

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
}


def add_(a: Any, b: Any) -> Any:
    a += b
    return a


def sub_(a: Any, b: Any) -> Any:
    a -= b
    return a


def mul_(a: Any, b: Any) -> Any:
    a *= b
    return a


def div_(a: Any, b: Any) -> Any:
    a /= b
    return a


def pow_(a: Any, b: Any) -> Any:
    a **= b
    return a


IN_PLACE = {"+": add_, "-": sub_, "*": mul_, "/": div_, "**": pow_}


def two(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Grads, Grads]:
    """Two parameters, and two Grads of positive values."""
    w, b = torch.rand(2, 3, dtype=dtype), torch.rand((), dtype=dtype)
    ps = Params([w, b])
    grads = [Grads(ps, [torch.rand_like(w) + 0.5, torch.rand_like(b) + 0.5]) for _ in range(2)]
    return w, b, grads[0], grads[1]


def close(g: Mapping[Tensor, Any], expected: Mapping[Tensor, Any]) -> None:
    assert len(g) == len(expected)
    for key, value in expected.items():
        torch.testing.assert_close(g[key], value)
