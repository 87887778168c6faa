"""What records programs: ``make_fx`` follows derivatives, ``torch.export`` and ``torch.jit.trace`` don't."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from needs_torch import needs_torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from torchzygote import (
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hook,
    jacobian,
    pullback,
    pushforward,
)

W = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)
X, OTHER = torch.tensor([[0.3, -0.5, 0.7], [1.1, 0.2, -0.4]], dtype=torch.float64)


def layer(x: Tensor) -> Tensor:
    return torch.tanh(W @ x)


def energy(x: Tensor) -> Tensor:
    return (layer(x) ** 2).sum() + (x**4).sum()


REVERSE: dict[str, Callable[[Tensor], Any]] = {
    "gradient": lambda x: gradient(energy, x)[0],
    "pullback": lambda x: pullback(layer, x)[1](x)[0],
    "jacobian": lambda x: jacobian(layer, x)[0],
    "hessian": lambda x: hessian(energy, x),
    "hessian_dual": lambda x: hessian_dual(energy, x),
    "diaghessian": lambda x: diaghessian(energy, x)[0],
    "hook": lambda x: gradient(lambda t: energy(hook(lambda g: 2 * g, t)), x)[0],
    "checkpointed": lambda x: gradient(lambda t: checkpointed(energy, t), x)[0],
    "forwarddiff": lambda x: gradient(lambda t: forwarddiff(energy, t), x)[0],
}
FORWARD: dict[str, Callable[[Tensor], Any]] = {"pushforward": lambda x: pushforward(layer, x)(x)}


class Calls(nn.Module):
    def __init__(self, f: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Any:
        return self.f(x)


def traced(f: Callable[[Tensor], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit is deprecated, and what is traced constant
        return torch.jit.trace(f, (X,), check_trace=False)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("name", {**REVERSE, **FORWARD})
def test_make_fx_records_the_derivative(name: str) -> None:
    f = (REVERSE | FORWARD)[name]
    torch.testing.assert_close(make_fx(f)(X)(OTHER), f(OTHER))


@pytest.mark.parametrize("name", REVERSE)
def test_export_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.export doesn't follow derivatives"):
        torch.export.export(Calls(REVERSE[name]), (X,), strict=False)


@pytest.mark.parametrize("name", REVERSE)
def test_jit_trace_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace doesn't follow derivatives"):
        traced(REVERSE[name])


@pytest.mark.parametrize("name", FORWARD)
def test_jit_trace_records_forward_mode(name: str) -> None:
    f = FORWARD[name]
    torch.testing.assert_close(traced(f)(OTHER), f(OTHER))


@needs_torch("2.12", "torch.export loses what jvp is given")
@pytest.mark.parametrize("name", FORWARD)
def test_export_records_forward_mode(name: str) -> None:
    f = FORWARD[name]
    exported = torch.export.export(Calls(f), (X,), strict=False)
    torch.testing.assert_close(exported.module()(OTHER), f(OTHER))
