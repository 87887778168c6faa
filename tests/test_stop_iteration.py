"""``StopIteration`` that ``f`` or its backward pass raises reaches the caller, as other exceptions do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import (
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hook,
    jacobian,
    plan_hessian,
    plan_jacobian,
    withhessian,
)

x = torch.linspace(0.5, 1.5, 24)


class Ends:
    """A function that raises from a given call on."""

    def __init__(self, f: Callable[[Tensor], Tensor], after: int) -> None:
        self.f = f
        self.left = after
        self.raised: list[StopIteration] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            self.raised.append(StopIteration("no more"))
            raise self.raised[-1] from KeyError("cause")
        return self.f(x)


def raises(f: Ends, call: Callable[[], Any]) -> None:
    """``call()`` raises what ``f`` did, if it ran so often."""
    caught = None
    try:
        call()
    except StopIteration as error:
        caught = error
    assert (caught is None) == (not f.raised)
    assert caught is None or any(caught is error for error in f.raised)
    assert caught is None or isinstance(caught.__cause__, KeyError)


def scalar(x: Tensor) -> Tensor:
    return (x.roll(1) * x.sin()).sum() * x[0]


def banded(x: Tensor) -> Tensor:
    return (x[1:] * x[:-1]).sin().sum()


def vector(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("n", [1, 3, 24])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_hessians(n: int, after: int, chunk_size: int | None) -> None:
    for way in (
        hessian_dual,
        lambda f, x, **options: hessian(f, x, mode="forward_over_reverse", **options),
        lambda f, x, **options: withhessian(f, x, mode="forward_over_reverse", **options),
    ):
        f = Ends(scalar, after)
        raises(f, lambda way=way, f=f: way(f, x[:n], chunk_size=chunk_size))


@pytest.mark.parametrize("after", [0, 1])
def test_other_matrices(after: int) -> None:
    for g, way in (
        (vector, lambda f: jacobian(f, x, mode="forward")),
        (vector, lambda f: jacobian(f, x, mode="forward", chunk_size=1)),
        (scalar, lambda f: diaghessian(f, x)),
        (scalar, lambda f: hessian_reverse(f, x)),
        (banded, lambda f: hessian(f, x, sparse=True, mode="forward_over_reverse", chunk_size=1)),
    ):
        f = Ends(g, after)
        raises(f, lambda way=way, f=f: way(f))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_plans(after: int) -> None:
    f = Ends(vector, 100)
    plan: Any = plan_jacobian(f, x, mode="forward")
    f.left = after
    raises(f, lambda: plan(x))
    f = Ends(banded, 100)
    plan = plan_hessian(f, x)
    f.left = after
    raises(f, lambda: plan(x))


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("mode", ["reverse", "auto"])
def test_hooks(mode: str, chunk_size: int | None) -> None:
    f = Ends(lambda xbar: xbar, 0)
    raises(f, lambda: jacobian(lambda x: hook(f, x**2).sin(), x[:3], mode=mode, chunk_size=chunk_size))
    raises(f, lambda: hessian_reverse(lambda x: hook(f, x**2).prod(), x[:3], chunk_size=chunk_size))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_forwarddiff(after: int) -> None:
    f = Ends(vector, after)
    raises(f, lambda: gradient(lambda x: forwarddiff(f, x).sum(), x))


def test_it_is_told_what_was_promoted() -> None:
    for chunk_size in (None, 1):
        with pytest.raises(StopIteration) as caught:
            hessian_dual(lambda x: next(iter(())) * x.sum(), torch.tensor([1, 2]), chunk_size=chunk_size)
        notes = "\n".join(getattr(caught.value, "__notes__", [])) + repr(caught.value.__cause__)
        assert "argument 0" in notes


def test_an_error_about_it_from_within_f_stays_what_it_is() -> None:
    def f(x: Tensor) -> Tensor:
        return sum(next(iter(())) for _ in range(2)) + x.sum()

    for way in (gradient, hessian_dual):
        with pytest.raises(RuntimeError, match="generator raised StopIteration"):
            way(f, x[:3])


def test_checkpointed() -> None:
    f = Ends(vector, 0)
    raises(f, lambda: checkpointed(f, x))
    raises(f, lambda: gradient(lambda x: checkpointed(f, x).sum(), x))
