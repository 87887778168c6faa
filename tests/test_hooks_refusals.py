"""What hook refuses, of its arguments and of what fn returns, and what passes it untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import Buffer, gradient, hook, jacobian

func = torch.func


@pytest.mark.parametrize(
    "differentiate",
    [lambda f, x: gradient(f, x), lambda f, x: jacobian(f, x), lambda f, x: func.grad(f)(x)],
)
@pytest.mark.parametrize(
    ("fn", "error", "message"),
    [
        (lambda g: g[..., :1], ValueError, r"expected <lambda> to return a gradient of the shape .*3"),
        (lambda g: 2.0, TypeError, "expected <lambda> to return a tensor, or None.*got float"),
        (lambda g: (g,), TypeError, "expected <lambda> to return a tensor, or None.*got tuple"),
        (lambda g: g * 1j, ValueError, "expected <lambda> to return a real gradient"),
        (
            lambda g: g.to("meta"),
            ValueError,
            "expected <lambda> to return a gradient on cpu, got one on meta",
        ),
    ],
)
def test_what_cannot_be_a_gradient_is_refused(
    fn: Any, error: type[Exception], message: str, differentiate: Any, x: Tensor
) -> None:
    fn.__qualname__ = "<lambda>"
    with pytest.raises(error, match=message):
        differentiate(lambda x: hook(fn, x).sum(), x)


def test_another_structure_is_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="expected .* to return the structure that it got"):
        gradient(lambda x: sum(t.sum() for t in hook(lambda g: g[:1], (x, x))), x)
    with pytest.raises(ValueError, match="gradient of the shape"):
        gradient(lambda x: sum(t.sum() for t in hook(lambda g: (g[0][:1], g[1]), (x, x))), x)


def test_the_function_comes_first(x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"fn: expected a function .* write hook\(fn, x\)"):
        hook(x, torch.neg)


def test_a_buffer_is_refused(x: Tensor) -> None:
    for value in (Buffer(x), [x, Buffer(x)]):
        with pytest.raises(TypeError, match=r"got a Buffer.*copy\(\)"):
            hook(torch.neg, value)


@pytest.mark.parametrize("x", ["text", None, True, 3.0, torch.arange(3), nn.Linear(1, 1), object()])
def test_what_has_no_gradient_passes_untouched(x: object) -> None:
    assert hook(torch.neg, x) is x
