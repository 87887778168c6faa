"""Where no gradient arrives at a hook: fn is called once with None, by the outermost differentiation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import (
    checkpointed,
    forwarddiff,
    gradient,
    hessian_dual,
    hessian_reverse,
    hook,
    ignore_derivatives,
    jacobian,
    pullback,
    pushforward,
)

func = torch.func


def test_where_nothing_arrives_fn_is_called_once_with_none_at_the_end(x: Tensor) -> None:
    seen: list[object] = []

    def f(x: Tensor) -> Tensor:
        hook(lambda g: seen.append(("unused", g)), x * 2)
        hook(lambda g: seen.append(("constant", g)), torch.ones(2))
        hook(lambda g: seen.append(("number", g)), 3.0)
        return (hook(lambda g: seen.append("used"), x) * 2).sum()

    gradient(f, x)
    assert seen == ["used", ("unused", None), ("constant", None), ("number", None)]


def test_it_is_the_outermost_differentiation_that_reports(x: Tensor) -> None:
    seen: list[object] = []

    def inner(x: Tensor) -> Tensor:
        def f(y: Tensor) -> Tensor:
            hook(seen.append, y)
            return (y**2).sum()

        g = gradient(f, x)[0]
        assert not seen
        return g.sum()

    gradient(inner, x)
    assert seen == [None]


def test_a_pullback_reports_after_the_first_pull(x: Tensor) -> None:
    seen: list[object] = []
    _, back = pullback(lambda x: (hook(seen.append, x), x * 2)[1], x)
    assert not seen
    back(torch.ones_like(x))
    back(torch.ones_like(x))
    assert seen == [None]


@pytest.mark.parametrize("fn", [torch.neg, lambda g: g.norm(), lambda g: -g])
def test_an_error_for_the_none_is_ignored(fn: Any, x: Tensor) -> None:
    torch.testing.assert_close(gradient(lambda x: (hook(fn, x), (x**2).sum())[1], x)[0], 2 * x)


def test_other_errors_for_the_none_are_not() -> None:
    def fn(g: Tensor | None) -> None:
        if g is None:
            raise LookupError("nothing arrived")

    with pytest.raises(LookupError, match="nothing arrived"):
        gradient(lambda x: (hook(fn, x), 2 * x)[1], 1.0)


@pytest.mark.parametrize("nested", [False, True])
def test_after_an_error_for_a_none_the_others_are_told(nested: bool, x: Tensor) -> None:
    """The first error is raised; inside of a checkpoint that runs again, too."""
    told: list[str] = []

    def failing(name: str) -> Any:
        def fn(g: Tensor | None) -> None:
            if g is None:
                told.append(name)
                raise LookupError(name)

        return fn

    def f(x: Tensor) -> Tensor:
        for fn in failing("first"), failing("second"), lambda g: told.append("third"):
            hook(fn, x * 2)
        return x.sum()

    with pytest.raises(LookupError, match="first"):
        gradient((lambda x: torch.func.vmap(lambda x: checkpointed(f, x))(x).sum()) if nested else f, x)
    assert told == ["first", "second", "third"]


def test_forward_mode_and_plain_calls_report_nothing(x: Tensor) -> None:
    seen: list[object] = []

    def f(x: Tensor) -> Tensor:
        hook(seen.append, x)
        return x**2

    f(x)
    pushforward(f, x)(x)
    jacobian(f, x, mode="forward")
    func.jacfwd(f)(x)
    ignore_derivatives(lambda: f(x))
    gradient(lambda x: (x * ignore_derivatives(lambda: f(x))).sum(), x)
    assert not seen


@pytest.mark.parametrize(
    "outer",
    [
        lambda f, x: jacobian(f, x, mode="forward"),
        lambda f, x: jacobian(f, x, mode="forward", chunk_size=1),
        lambda f, x: jacobian(f, x, mode="forward", sparse=True),
        lambda f, x: jacobian(f, x, mode="reverse", chunk_size=1),
        lambda f, x: pushforward(f, x)(x),
        lambda f, x: gradient(lambda x: forwarddiff(f, x).sum(), x),
        lambda f, x: jacobian(lambda x: jacobian(f, x, mode="forward")[0], x, mode="forward"),
    ],
)
def test_a_gradient_inside_of_forward_mode_reports_once(outer: Any, x: Tensor) -> None:
    seen: list[object] = []

    def f(x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            hook(lambda g: seen.append(("unused", g)), y)
            return (hook(lambda g: None, y) ** 3).sum()

        return gradient(inner, x)[0]

    outer(f, x)
    assert seen == [("unused", None)]


def test_a_hessian_in_chunks_reports_once(x: Tensor) -> None:
    for hessian_way in (hessian_dual, hessian_reverse):
        seen: list[object] = []

        def f(x: Tensor, seen: list[object] = seen) -> Tensor:
            hook(seen.append, x)
            return (x**3).sum()

        hessian_way(f, x, chunk_size=1)
        assert seen == [None]
