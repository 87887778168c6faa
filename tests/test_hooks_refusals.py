"""What hook refuses, of its arguments and of what fn returns, and what passes it untouched."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from needs_torch import hooks_compiled, messages_with_sizes_compiled
from torch import Tensor, nn

from torchzygote import Buffer, GradDict, Grads, Params, gradient, hook, jacobian, showgrad

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
    with pytest.raises(ValueError, match=r"that it got, \{'a': \*\}, got \(\*, \*\)"):
        gradient(lambda x: hook(lambda g: (g["a"], g["a"]), {"a": x})["a"].sum(), x)
    with pytest.raises(ValueError, match="gradient of the shape"):
        gradient(lambda x: sum(t.sum() for t in hook(lambda g: (g[0][:1], g[1]), (x, x))), x)


class Formatted(NamedTuple):
    a: Tensor

    def __repr__(self) -> str:
        return f"{self.a:.2f}"


def test_structures_that_print_numbers(x: Tensor) -> None:
    with pytest.raises(ValueError, match="to return the structure that it got"):
        gradient(lambda x: hook(lambda g: (g[0], g[0]), Formatted(x))[0].sum(), x)


X = torch.arange(6.0).reshape(2, 3) + 1
SHAPE = "to return a gradient of the shape that it got, "
STRUCTURE = "to return the structure that it got, "


@hooks_compiled
@pytest.mark.parametrize(
    ("f", "message", "dynamic"),
    [
        (lambda x: hook(lambda g: g.T, x), SHAPE, False),
        (lambda x: hook(lambda g: (g[0].T,), (x,))[0], SHAPE, False),
        pytest.param(
            lambda x: hook(lambda g: (g[0].T,), (x,))[0], SHAPE, True, marks=messages_with_sizes_compiled
        ),
        (lambda x: sum(t.sum() for t in hook(lambda g: (g[1], g[0]), (x, x[0] * 2))), SHAPE, False),
        (lambda x: hook(lambda g: [g[0]], (x,))[0], STRUCTURE, False),
        (lambda x: sum(t.sum() for t in hook(lambda g: (g[0],), (x, x))), STRUCTURE, False),
        (lambda x: hook(lambda g: 2.0, x), "to return a tensor, or None", False),
        (lambda x: hook(lambda g: [2.0], [x])[0], "to return a tensor, or None", False),
        (lambda x: hook(lambda g: g * 1j, x), "to return a real gradient of dtype torch.float32", False),
        (lambda x: hook(lambda g: [g[0] * 1j], [x])[0], "to return a real gradient", False),
    ],
)
def test_compiled_it_refuses_the_same_in_the_same_words(f: Any, message: str, dynamic: bool) -> None:
    # Not a plain match of the message: what Dynamo says quotes these lines.
    words = f"hook: expected .*<lambda> {message}"
    loss = lambda x: (f(x) * X).sum()
    with pytest.raises((ValueError, TypeError), match=words):
        gradient(loss, X)
    compiled = torch.compile(
        lambda x: gradient(loss, x)[0], fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        compiled(X)


def test_the_function_comes_first(x: Tensor) -> None:
    with pytest.raises(TypeError, match=r"fn: expected a function .* write hook\(fn, x\)"):
        hook(x, torch.neg)


def test_a_buffer_is_refused(x: Tensor) -> None:
    for value in (Buffer(x), [x, Buffer(x)]):
        with pytest.raises(TypeError, match=r"got a Buffer.*copy\(\)"):
            hook(torch.neg, value)


NETWORK = nn.Linear(3, 1)


@pytest.mark.parametrize("held", [NETWORK, Params(NETWORK), Grads(Params(NETWORK), [None, None]), GradDict()])
def test_what_holds_tensors_by_identity_is_refused(held: Any, x: Tensor) -> None:
    for value in (held, [x, held], {"m": held}):
        for name, use in (("hook", lambda value: hook(torch.neg, value)), ("showgrad", showgrad)):
            with pytest.raises(TypeError, match=rf"{name}: x: .*got a {type(held).__name__}.*give"):
                gradient(lambda x: (use(value), x.sum())[1], x)


def test_compiled_a_module_is_refused(x: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        return hook(torch.neg, NETWORK)(x.float()).sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="got a Linear"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("pack", [lambda buf, x: buf, lambda buf, x: [x, buf]])
def test_compiled_a_buffer_is_refused(pack: Any, x: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x)
        buf[0] = x[0]
        hook(torch.neg, pack(buf, x))
        return buf.copy().sum()

    with pytest.raises(torch._dynamo.exc.Unsupported, match="expected a tensor or .* got a Buffer"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(x)


@pytest.mark.parametrize("x", ["text", None, True, 3.0, torch.arange(3), nn.ReLU(), object()])
def test_what_has_no_gradient_passes_untouched(x: object) -> None:
    assert hook(torch.neg, x) is x
