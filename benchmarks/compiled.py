"""Small derivatives inside torch.compile(fullgraph=True), against torch.func compiled and JAX under jit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchzygote import diaghessian, gradient, hessian, jacobian

from ._harness import Row, compare
from .first_order import ode, three_small_ops
from .peers import jax_contender
from .second_order import logistic, rosenbrock


def compiled(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """One graph, or an error."""
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True)


def rows(full: bool = False) -> Iterator[Row]:
    """The table of the compiled functions."""
    torch.manual_seed(0)
    x10, x100 = torch.randn(10), torch.randn(100)
    cases: list[tuple[str, Callable[[Tensor], Any], Callable[[Tensor], Any], Tensor, str, float | None]] = [
        (
            "compiled jacobian, ODE right-hand side 10→10",
            lambda x: jacobian(ode, x)[0],
            torch.func.jacfwd(ode),
            x10,
            "ode_jacobian",
            1.5,
        ),
        (
            "compiled gradient, three small operations",
            lambda x: gradient(three_small_ops, x)[0],
            torch.func.grad(three_small_ops),
            x10,
            "gradient_small",
            None,
        ),
        (
            "compiled hessian, Rosenbrock n = 100",
            lambda x: hessian(rosenbrock, x),
            torch.func.hessian(rosenbrock),
            x100,
            "rosenbrock_hessian",
            None,
        ),
    ]
    if full:
        loss, w = logistic()
        cases.append(
            (
                "compiled hessian, logistic regression n = 500",
                lambda w: hessian(loss, w),
                torch.func.hessian(loss),
                w,
                "logistic_hessian",
                None,
            )
        )
    for work, ours, theirs, x, jax_work, target in cases:
        mine, func = compiled(ours), torch.compile(theirs, fullgraph=True)
        torch.testing.assert_close(mine(x), ours(x))
        jax = jax_contender(jax_work)
        yield compare(work, lambda mine=mine, x=x: mine(x), {"JAX, jit": jax}, target=target, rounds=15)
        compiled_peer = {"torch.func, compiled": lambda func=func, x=x: func(x)}
        yield compare(work, lambda mine=mine, x=x: mine(x), compiled_peer, rounds=15)
    diagonal = compiled(lambda x: diaghessian(rosenbrock, x)[0])
    eager = lambda: diaghessian(rosenbrock, x100)
    yield compare("compiled diaghessian, Rosenbrock n = 100", lambda: diagonal(x100), {"eager": eager})
