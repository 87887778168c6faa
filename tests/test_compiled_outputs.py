"""Compiled derivatives of functions that return more than tensors, or nothing that depends on the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchzygote import (
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    pullback,
    pushforward,
    withgradient,
    withhessian,
    withjacobian,
)


def mixed(z: Tensor) -> dict[str, Any]:
    return {"sine": z.sin(), "count": 3, "rest": (z.cos(), None, "text")}


PROGRAMS: dict[str, Callable[[Tensor], Any]] = {
    "auxiliary int": lambda x: withgradient(lambda z: (z.sum(), 3), x),
    "auxiliary structure": lambda x: withgradient(
        lambda z: (z.prod(), {"a": z * 2, "b": "text", "c": None}), x
    ),
    "auxiliary indices": lambda x: withgradient(lambda z: (z.sum(), z.argmax()), x),
    "gradient of a number": lambda x: gradient(lambda z: 3.0, x),
    "gradient of a bool": lambda x: gradient(lambda z: True, x),
    "gradient of an index": lambda x: gradient(lambda z: z.argmax(), x),
    "value of a number": lambda x: withgradient(lambda z: 3.0, x),
    "jacobian of a number": lambda x: jacobian(lambda z: 3.0, x),
    "jacobian of indices": lambda x: jacobian(lambda z: z.argsort(), x),
    "withjacobian": lambda x: withjacobian(lambda z: z * 2, x),
    "hessian of a number": lambda x: hessian(lambda z: 3.0, x),
    "withhessian of a number": lambda x: withhessian(lambda z: 3.0, x),
    "diaghessian of a number": lambda x: diaghessian(lambda z: 3.0, x),
    "pullback": lambda x: pullback(torch.sin, x)[1](torch.ones(3)),
    "pullback of a structure": lambda x: pullback(mixed, x)[1](
        {"sine": torch.ones(3), "count": None, "rest": (torch.ones(3), None, None)}
    ),
    "pullback of a number": lambda x: pullback(lambda z: 3.0, x)[1](1.0),
    "value of a structure": lambda x: pullback(mixed, x)[0],
    "pushforward of a structure": lambda x: pushforward(lambda z: (z * 2, 3), x)(x),
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_compiled_gives_what_uncompiled_gives(program: Callable[[Tensor], Any]) -> None:
    x = torch.tensor([1.0, 3.0, 2.0])
    expected, spec = pytree.tree_flatten(program(x))
    torch.compiler.reset()
    found, same = pytree.tree_flatten(torch.compile(program, backend="aot_eager", fullgraph=True)(x))
    assert same == spec
    for a, b in zip(found, expected, strict=True):
        if isinstance(b, Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b


CHUNKED: dict[str, Callable[[Tensor], Tensor]] = {
    "jacobian": lambda x: jacobian(torch.sin, x, chunk_size=2)[0],
    "jacobian, forward": lambda x: jacobian(torch.sin, x, chunk_size=2, mode="forward")[0],
    "hessian": lambda x: hessian(lambda z: z.sin().prod(), x, chunk_size=2),
    "hessian_dual": lambda x: hessian_dual(lambda z: z.sin().prod(), x, chunk_size=2),
    "diaghessian": lambda x: diaghessian(lambda z: z.sin().prod(), x, chunk_size=2)[0],
}


@pytest.mark.parametrize("name", CHUNKED)
def test_in_chunks(name: str) -> None:
    x = torch.linspace(0.5, 1.5, 5)
    torch.testing.assert_close(
        torch.compile(CHUNKED[name], backend="eager", fullgraph=True)(x), CHUNKED[name](x)
    )


@pytest.mark.parametrize("dynamic", [None, True])
def test_integers_that_vary(dynamic: bool | None) -> None:
    """The second one is a symbol to the tracer."""
    torch.compiler.reset()
    square = torch.compile(
        lambda n: gradient(lambda a: a**2, n)[0], fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    assert [float(square(n)) for n in (3, 4, 5)] == [6, 8, 10]
