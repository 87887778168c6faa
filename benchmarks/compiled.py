"""Small derivatives inside torch.compile(fullgraph=True), against torch.func compiled and JAX under jit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchzygote import diaghessian, gradient, hessian, jacobian

from ._harness import Row, compare
from .first_order import ode, three_small_ops
from .peers import jax_contender
from .second_order import logistic, rosenbrock


def compiled(f: Callable[[Tensor], Any], x: Tensor, **options: Any) -> Callable[[], Any]:
    """A call of ``f`` compiled to one graph, warm; it raises where that can't be done."""
    found = torch.compile(f, fullgraph=True, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about itself
        found(x)
    return lambda: found(x)


def floor(x: Tensor) -> Iterator[Row]:
    """What calling a compiled function costs, whatever it computes, and how much of that are guards."""
    work = "compiled x + 1: what a call costs"
    yield compare(work, compiled(lambda x: x + 1, x), {"JAX, jit": jax_contender("add_one")}, rounds=15)
    free = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    jax = {"JAX, jit": jax_contender("ode_jacobian")}
    work = "compiled jacobian 10→10, guards switched off"
    yield compare(work, compiled(lambda x: jacobian(ode, x)[0], x, options=free), jax, rounds=15)


def rows(full: bool = False) -> Iterator[Row]:
    """The table of the compiled functions."""
    torch.compiler.reset()
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
        mine = compiled(ours, x)
        torch.testing.assert_close(mine(), ours(x))
        jax = jax_contender(jax_work)
        yield compare(work, mine, {"JAX, jit": jax}, target=target, rounds=15)
        yield compare(work, mine, {"torch.func, compiled": compiled(theirs, x)}, rounds=15)
    diagonal = compiled(lambda x: diaghessian(rosenbrock, x)[0], x100)
    eager = lambda: diaghessian(rosenbrock, x100)
    yield compare("compiled diaghessian, Rosenbrock n = 100", diagonal, {"eager": eager})
    yield from floor(x10)
