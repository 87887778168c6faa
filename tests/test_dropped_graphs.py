"""Closures that refer to what is computed with them: Python's collector doesn't see autograd's nodes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import (
    Buffer,
    Params,
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hook,
    ignore_derivatives,
    jacobian,
    plan_jacobian,
    pullback,
    withgradient,
    withhessian,
)

X = torch.linspace(0.5, 1.5, 4)
Inner = Callable[[Tensor, list[Any]], Tensor]


def normalised(x: Tensor, seen: list[Any]) -> Tensor:
    y = hook(lambda g: g / y.norm(), x.sin())
    seen.append(y)
    return y


def normalised_structure(x: Tensor, seen: list[Any]) -> Tensor:
    both = hook(lambda gs: [g / both[0].norm() for g in gs], [x.sin(), x.cos()])
    seen.extend(both)
    return both[0] + both[1]


def recurrence(x: Tensor, seen: list[Any]) -> Tensor:
    rows = Buffer(x, 3, len(x))
    rows[0] = x
    for i in (1, 2):
        rows[i] = checkpointed(lambda i=i: rows[i - 1].sin())
    y = rows.copy().sum(0)
    seen.append(y)
    return y


class Stateful:
    def __init__(self) -> None:
        self.state = torch.zeros(())

    def step(self, x: Tensor) -> Tensor:
        return x.sin()

    def __call__(self, x: Tensor) -> Tensor:
        self.state = checkpointed(self.step, x)
        return self.state


def method(x: Tensor, seen: list[Any]) -> Tensor:
    y = Stateful()(x)
    seen.append(y)
    return y


INNERS: dict[str, Inner] = {
    "a hook": normalised,
    "a hook of a structure": normalised_structure,
    "checkpoints in a Buffer": recurrence,
    "a checkpointed method": method,
}


def _by_params(f: Callable[[Tensor], Tensor]) -> Any:
    w = X.clone().requires_grad_()
    return gradient(lambda: f(w).square().sum(), Params([w]))


def _pulled_back(f: Callable[[Tensor], Tensor]) -> Any:
    y, back = pullback(f, X)
    back(y)
    return back(2 * y)


class Watched:
    """A function whose values are watched."""

    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.alive: list[weakref.ref[Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        seen: list[Any] = []
        y = self.inner(x, seen)
        self.alive.extend(map(weakref.ref, seen))
        return y


def _by_plan(f: Watched) -> Any:
    plan = plan_jacobian(f, X, mode="reverse")
    f.alive.clear()
    plan(2 * X)


CALLS: dict[str, Callable[[Watched], Any]] = {
    "gradient": lambda f: gradient(lambda x: f(x).square().sum(), X),
    "gradient by Params": _by_params,
    "withgradient": lambda f: withgradient(lambda x: f(x).square().sum(), X),
    "gradient of gradient": lambda f: gradient(
        lambda x: gradient(lambda x: f(x).square().sum(), x)[0].sum(), X
    ),
    "jacobian": lambda f: jacobian(f, X, mode="reverse"),
    "jacobian, chunks": lambda f: jacobian(f, X, mode="reverse", chunk_size=2),
    "hessian": lambda f: hessian(lambda x: f(x).square().sum(), X),
    "withhessian": lambda f: withhessian(lambda x: f(x).square().sum(), X),
    "diaghessian": lambda f: diaghessian(lambda x: f(x).square().sum(), X),
    "a plan": _by_plan,
    "pullback": _pulled_back,
}


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("call", CALLS)
def test_what_closures_refer_to_is_freed(call: str, inner: str) -> None:
    f = Watched(INNERS[inner])
    CALLS[call](f)
    assert f.alive
    assert not any(y() is not None for y in f.alive)


@pytest.mark.parametrize("inner", INNERS)
def test_of_a_graph_that_is_kept_nothing_is_dropped(inner: str) -> None:
    f = lambda x: INNERS[inner](x, []).square().sum()
    x = X.clone().requires_grad_()
    (g,) = gradient(f, x, create_graph=True)
    (found,) = torch.autograd.grad(g.square().sum(), x)
    (expected,) = gradient(lambda x: gradient(f, x)[0].square().sum(), X)
    torch.testing.assert_close(found, expected)
    y, back = pullback(lambda x: INNERS[inner](x, []), X)
    for _ in range(3):
        torch.testing.assert_close(back(y)[0], jacobian(lambda x: INNERS[inner](x, []), X)[0].T @ y)


def hooked(x: Tensor) -> Tensor:
    return hook(lambda g: 2 * g, x.sin())


def rerun(x: Tensor) -> Tensor:
    return checkpointed(lambda x: x.sin().exp(), x)


@pytest.mark.parametrize("inner", [hooked, rerun])
def test_graphs_that_somebody_keeps_are_pulled_back_after_the_call(inner: Callable[[Tensor], Tensor]) -> None:
    w = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(inner(w).sum(), w)
    kept: dict[str, Any] = {}

    def branch(x: Tensor) -> Tensor:
        kept["loss"] = inner(w).sum()
        return x.sum()

    gradient(branch, X)
    torch.testing.assert_close(torch.autograd.grad(kept["loss"], w)[0], expected)

    def cached(x: Tensor) -> Tensor:
        if "weight" not in kept:
            kept["weight"] = inner(w)
        return (kept["weight"] * x).sum()

    gradient(cached, X)
    torch.testing.assert_close(gradient(lambda: cached(torch.ones(4)), Params([w]))[w], expected)

    def ignored(x: Tensor) -> Tensor:
        ignore_derivatives(lambda: gradient(lambda v: v.square().sum(), X))
        return inner(x).square().sum()

    (g,) = gradient(ignored, w, create_graph=True)
    (found,) = torch.autograd.grad(g.sum(), w)
    torch.testing.assert_close(found, gradient(lambda x: gradient(ignored, x)[0].sum(), X)[0])

    def pulled(x: Tensor) -> Tensor:
        _, kept["back"] = pullback(inner, x)
        return x.sum()

    gradient(pulled, X)
    torch.testing.assert_close(kept["back"](torch.ones(4))[0].detach(), expected)


def test_a_copy_of_a_pullback_keeps_the_graph_and_results_that_are_differentiated_do() -> None:
    w = X.clone().requires_grad_()
    y, back = pullback(hooked, X)
    twin = copy.copy(back)
    del back
    first, second = twin(y), twin(y)
    torch.testing.assert_close(first, second)
    backs = [pullback(lambda: rerun(w), Params([w]))[1]]
    g = gradient(lambda: backs[0](torch.ones(4))[w].square().sum(), Params([w]), create_graph=True)[w]
    backs.clear()
    assert torch.autograd.grad(g.sum(), w)[0].isfinite().all()


def test_what_a_pullback_refers_to_may_refer_to_its_owner() -> None:
    class Owner:
        def fn(self, g: Tensor) -> None: ...

        def f(self, x: Tensor) -> Tensor:
            hook(self.fn, x.sin())
            return x * 2

    owner = Owner()
    owner.y, owner.back = pullback(owner.f, X)  # type: ignore[attr-defined]
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(("inner", "name"), [("a hook", "hook"), ("a checkpointed method", "checkpointed")])
def test_a_graph_that_is_dropped_says_so(inner: str, name: str) -> None:
    kept: list[Tensor] = []
    jacobian(lambda x: INNERS[inner](x, kept), X, mode="reverse")
    with pytest.raises(RuntimeError, match=f"{name}: the derivative .* is over, .* create_graph=True keeps"):
        kept[0].sum().backward()
