"""Compiled derivatives of functions that torch.compile can't put into one graph: parts run by themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import (
    Buffer,
    _state,
    diaghessian,
    gradient,
    hessian,
    hook,
    jacobian,
    pullback,
    pushforward,
    withgradient,
)


@torch._dynamo.disable
def opaque(x: Tensor) -> Tensor:
    return x.sin()


def broken(x: Tensor) -> Tensor:
    y = x.sin()
    torch._dynamo.graph_break()
    return (y**2 * x).sum()


def calling_out(x: Tensor) -> Tensor:
    return (opaque(x) ** 2 * x).sum()


def hooked(x: Tensor) -> Tensor:
    return (hook(lambda g: g * 1.0, x.sin()) ** 2 * x).sum()


def buffered(x: Tensor) -> Tensor:
    buf = Buffer(x, 3)
    for i in range(3):
        buf[i] = x[i].sin()
    return (copy.copy(buf) ** 2 * x).sum()


def unbroken(x: Tensor) -> Tensor:
    return (x.sin() ** 2 * x).sum()


Way = Callable[[Callable[[Tensor], Tensor], Tensor], Any]

WAYS: dict[str, Way] = {
    "gradient": lambda f, x: gradient(f, x)[0],
    "withgradient": lambda f, x: withgradient(f, x).grad[0],
    "pullback": lambda f, x: pullback(f, x)[1](torch.ones_like(x[0]))[0],
    "jacobian": lambda f, x: jacobian(lambda x: f(x) * x, x, mode="reverse")[0],
    "pushforward": lambda f, x: pushforward(f, x)(x),
    "hessian": hessian,
    "diaghessian": lambda f, x: diaghessian(f, x)[0],
}

CASES = [
    *((broken, way) for way in WAYS),
    *((f, "gradient") for f in (calling_out, hooked, buffered)),
]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("f", "way"), CASES, ids=[f"{f.__name__}-{way}" for f, way in CASES])
def test_a_compiled_derivative_is_right_where_the_graph_breaks(f: Any, way: str, x: Tensor) -> None:
    differentiate = WAYS[way]
    torch._dynamo.reset()
    found = torch.compile(lambda x: differentiate(f, x), backend="aot_eager")(x)
    torch.testing.assert_close(found, differentiate(unbroken, x))
    assert not _state.deriving()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_comes_after_is_right_too(x: Tensor) -> None:
    """What a broken graph enters while tracing it leaves uncompiled; so it was counted once too often."""
    twice = lambda f, x: gradient(lambda x: pushforward(f, x)(x), x)[0]
    expected = twice(unbroken, x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(lambda x: twice(broken, x), backend="aot_eager")(x), expected)
    assert not _state.deriving()
    torch.testing.assert_close(twice(broken, x), expected)
