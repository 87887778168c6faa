"""Hooks inside a compiled ``forwarddiff``, whose first derivative passes them by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs_torch import hooks_compiled, hooks_compiled_twice
from torch import Tensor

from torchzygote import forwarddiff, gradient, hessian_reverse, hook, jacobian, pushforward

X = torch.tensor([0.3, 0.4])


def of_dict(fn: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
    def f(a: Tensor) -> Tensor:
        d = hook(fn, {"a": a, "b": (a**2,)})
        return (d["a"] * d["b"][0]).sum()

    return f


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dict": of_dict(lambda g: g),
    "bent dict": of_dict(lambda g: {"a": -g["a"], "b": (g["b"][0] * 3,)}),
    "tensor": lambda a: (hook(torch.neg, a) * a**2).sum(),
    "unbent": lambda a: (hook(lambda g: None, a) * a**2).sum(),
}
WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "forwarddiff": lambda f, x: gradient(lambda v: forwarddiff(f, v), x)[0],
    "pushforward": lambda f, x: pushforward(f, x)(torch.ones_like(x)),
    "jacobian": lambda f, x: jacobian(f, x, mode="forward")[0],
    "gradient": lambda f, x: gradient(f, x)[0],
    "gradient of pushforward": lambda f, x: gradient(lambda v: pushforward(f, v)(torch.ones_like(v)), x)[0],
    "hessian_reverse": lambda f, x: hessian_reverse(f, x),
}
MARKS: dict[str, Any] = {"pushforward": (), "jacobian": hooks_compiled, "gradient": hooks_compiled}


@hooks_compiled_twice
def test_a_linear_function_has_no_second_derivative_to_bend() -> None:
    f = torch.compile(
        lambda x: gradient(lambda v: forwarddiff(lambda a: (3 * hook(torch.neg, a)).sum(), v), x)[0],
        fullgraph=True,
        backend="aot_eager",
    )
    torch.testing.assert_close(f(X), torch.full((2,), 3.0))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=MARKS.get(way, hooks_compiled_twice)) for way in WAYS]
)
def test_they_do_what_they_do_uncompiled(name: str, way: str) -> None:
    torch._dynamo.reset()
    f = FUNCTIONS[name]
    compiled = torch.compile(lambda x: WAYS[way](f, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), WAYS[way](f, X))
