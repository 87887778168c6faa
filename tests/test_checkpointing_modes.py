"""Checkpointing changes no value and no derivative: a table of functions and modes of differentiation."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    pullback,
    pushforward,
)
from torchzygote.checkpointing import checkpointed

Function = Callable[[Tensor], Tensor]
Checkpoint = Callable[..., Any]


def plainly(f: Callable[..., Any], *xs: Any, **kwargs: Any) -> Any:
    return f(*xs, **kwargs)


# ---- functions: each takes a checkpoint (or none), a tensor to close over, and gives a function of x -------


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * g * ctx.saved_tensors[0] ** 2

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 3 * t * ctx.saved_tensors[0] ** 2


class Scale:
    def __init__(self, w: Tensor) -> None:
        self.parts = {"w": [w]}

    def __call__(self, x: Tensor) -> Tensor:
        return (x * self.parts["w"][0]).sin() * x

    def method(self, x: Tensor) -> Tensor:
        return self(x).exp()


Point = namedtuple("Point", "a b")

LAYER = nn.Linear(3, 3, dtype=torch.float64)


def a_lambda(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(lambda x: (x * w).sin() * x, x)


def an_argument(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(lambda x, w: (x * w).sin() * x, x, w)


def a_keyword(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(
        lambda x, *, debug, function: (x * debug).sin() * x * function, x, debug=w, function=2
    )


def a_callable_object(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(checkpoint, Scale(w))


def a_bound_method(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(checkpoint, Scale(w).method)


def a_partial(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(checkpoint, functools.partial(lambda w, x: (x * w).tanh() * x, w))


def a_default_argument(checkpoint: Checkpoint, w: Tensor) -> Function:
    def f(x: Tensor, w: Tensor = w) -> Tensor:
        return (x * w).cos() * w

    return functools.partial(checkpoint, f)


def functional_call(checkpoint: Checkpoint, w: Tensor) -> Function:
    def f(x: Tensor) -> Tensor:
        return torch.func.functional_call(LAYER, {"bias": w}, (x,)).tanh() * x

    return functools.partial(checkpoint, f)


def an_argument_that_is_closed_over(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(lambda y: (y * w).sin() * x, x)


def the_same_argument_twice(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(lambda a, b: (a * w).sin() * b**2, x, x)


def what_depends_on_what_is_closed_over(checkpoint: Checkpoint, w: Tensor) -> Function:
    """The argument depends on w, and f uses w: the way through the argument must not be counted twice."""

    def f(x: Tensor) -> Tensor:
        h = x * w
        u = w**2
        return checkpoint(lambda h: (h * w).sin() * u, h)

    return f


def structures(checkpoint: Checkpoint, w: Tensor) -> Function:
    def inner(d: dict[str, Any], n: int, text: str) -> Any:
        assert (n, text) == (2, "text")
        return Point({"s": (d["x"] * d["more"][0]).sin(), "n": n}, [d["x"] ** 2, None, text])

    def f(x: Tensor) -> Tensor:
        out = checkpoint(inner, {"x": x, "more": (w, None)}, 2, text="text")
        assert isinstance(out, Point)
        assert out.a["n"] == 2
        assert out.b[1:] == [None, "text"]
        return out.a["s"] * out.b[0]

    return f


def an_unused_output(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(lambda x: (x.exp() * w, (x * w).sin() * x), x)[1]


def the_identity(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(lambda x: x, x) * checkpoint(lambda: w) ** 2 * x


def views(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: (
        checkpoint(lambda x: x.reshape(3, 1).expand(3, 2)[:, 0], x) ** 2 * checkpoint(lambda: w[:3])
    )


def writing_into_its_own(checkpoint: Checkpoint, w: Tensor) -> Function:
    def f(x: Tensor) -> Tensor:
        y = x * w
        y += x
        z = torch.zeros_like(y)
        z[1:] = y[1:].sin()
        z[0] = x[0] ** 3
        return z.mul_(w)

    return functools.partial(checkpoint, f)


def written_afterwards(checkpoint: Checkpoint, w: Tensor) -> Function:
    return lambda x: checkpoint(lambda x: (x * w).sin() + x, x).mul_(2).add_(1) ** 2


def a_custom_function(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(checkpoint, lambda x: Cube.apply(x * w) + Cube.apply(w))


def vmap_inside(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(
        checkpoint, lambda x: vmap(lambda a: (a * x).sin().sum())(w) * vmap(lambda a: a**2)(x)
    )


def torch_func_inside(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(
        checkpoint, lambda x: grad(lambda y: (y**3 * w).sum())(x) * jacrev(lambda v: v**2)(w).sum(0)
    )


def our_gradient_inside(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(
        checkpoint, lambda x: gradient(lambda y, v: (y**3 * v**2).sum(), x, w, create_graph=True)[0] * w
    )


def our_pushes_inside(checkpoint: Checkpoint, w: Tensor) -> Function:
    return functools.partial(
        checkpoint, lambda x: jacobian(lambda y: y**3 * x * w, x, mode="forward", create_graph=True)[0].sum(0)
    )


def nested(checkpoint: Checkpoint, w: Tensor) -> Function:
    def outer(x: Tensor) -> Tensor:
        y = checkpoint(lambda x: (x * w).sin(), x)
        return checkpoint(lambda y: checkpoint(lambda y: (y * w).exp(), y) * x, y) + y

    return functools.partial(checkpoint, outer)


def a_chain(checkpoint: Checkpoint, w: Tensor) -> Function:
    def f(x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(lambda x: (x * w).tanh() + x / 2, x)
        return x

    return f


def a_chain_with_what_it_starts_from(checkpoint: Checkpoint, w: Tensor) -> Function:
    def f(x: Tensor) -> Tensor:
        y = x
        for _ in range(3):
            y = checkpoint(lambda y: y.sin() * w + x, y)
        return y

    return f


BODIES = [
    a_lambda,
    an_argument,
    a_keyword,
    a_callable_object,
    a_bound_method,
    a_partial,
    a_default_argument,
    functional_call,
    an_argument_that_is_closed_over,
    the_same_argument_twice,
    what_depends_on_what_is_closed_over,
    structures,
    an_unused_output,
    the_identity,
    views,
    writing_into_its_own,
    written_afterwards,
    a_custom_function,
    vmap_inside,
    torch_func_inside,
    our_gradient_inside,
    our_pushes_inside,
    nested,
    a_chain,
    a_chain_with_what_it_starts_from,
]


# ---- modes: each takes F(x, w), a vector-valued function, and gives derivatives ----------------------------


def of_one(f: Any) -> Function:
    return lambda z: f(z[:3], z[3:])


def scalar(f: Any) -> Any:
    return lambda *args: (f(*args) ** 2).sum()


def along(h: Function) -> Function:
    return lambda z: jvp(h, (z,), (torch.ones_like(z),))[1]


def on_tape(f: Any, x: Tensor, w: Tensor) -> Any:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(scalar(f)(x, w), (x, w))


def twice_on_tape(f: Any, x: Tensor, w: Tensor) -> Any:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    first = torch.autograd.grad(scalar(f)(x, w), (x, w), create_graph=True)
    second = torch.autograd.grad((first[0] * first[1]).sum(), (x, w), create_graph=True)
    return torch.autograd.grad((second[0] * second[1]).sum(), (x, w))


def vmap_on_tape(f: Any, x: Tensor, w: Tensor) -> Any:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    X = torch.stack([x, x**2])
    first = torch.autograd.grad((vmap(lambda x: f(x, w))(X) ** 2).sum(), (x, w), create_graph=True)
    return *first, *torch.autograd.grad((first[0] * first[1]).sum(), (x, w))


def a_vmapped_closure_on_tape(f: Any, x: Tensor, w: Tensor) -> Any:
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    W = torch.stack([w, w**2])
    return torch.autograd.grad((vmap(lambda w: f(x, w))(W) ** 2).sum(), (x, w))


def transforms_on_tape(f: Any, x: Tensor, w: Tensor) -> Any:
    """The tape records through torch.func, as it does for the parameters of a model."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    first = grad(lambda x: scalar(f)(x, w))(x)
    return torch.autograd.grad((first**2).sum() + (along(lambda x: f(x, w))(x) ** 2).sum(), (x, w))


def tape_in_transform(f: Any, x: Tensor, w: Tensor) -> Any:
    """What was recorded outside is pulled back inside of torch.func."""
    _, back = pullback(f, x, w)
    return grad(lambda v: sum((g**2).sum() for g in back(v)))(x), jacrev(lambda v: back(v)[1])(x)


def by_parameters(f: Any, x: Tensor, w: Tensor) -> Any:
    ps = Params([x, w])
    return gradient(lambda: scalar(f)(x, w), ps).to_vector(), *jacobian(lambda: f(x, w), ps).values()


def by_parameters_in_transform(f: Any, x: Tensor, w: Tensor) -> Any:
    return jacrev(lambda x: gradient(lambda: scalar(f)(x, w), Params([w]))[w])(x)


MODES: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "value": lambda f, x, w: f(x, w),
    "gradient": lambda f, x, w: gradient(scalar(f), x, w),
    "jacobian, reverse": lambda f, x, w: jacobian(f, x, w, mode="reverse"),
    "jacobian, forward": lambda f, x, w: jacobian(f, x, w, mode="forward"),
    "pushforward": lambda f, x, w: pushforward(f, x, w)(w, x),
    "hessian": lambda f, x, w: hessian(scalar(of_one(f)), torch.cat([x, w])),
    "hessian_dual": lambda f, x, w: hessian_dual(scalar(of_one(f)), torch.cat([x, w])),
    "hessian_reverse": lambda f, x, w: hessian_reverse(scalar(of_one(f)), torch.cat([x, w])),
    "diaghessian": lambda f, x, w: diaghessian(scalar(f), x, w),
    "third order": lambda f, x, w: jacobian(
        lambda z: hessian(scalar(of_one(f)), z), torch.cat([x, w]), mode="reverse"
    ),
    "func.grad": lambda f, x, w: grad(scalar(f), argnums=(0, 1))(x, w),
    "func.jacrev": lambda f, x, w: jacrev(f, argnums=(0, 1))(x, w),
    "func.jacfwd": lambda f, x, w: jacfwd(f, argnums=(0, 1))(x, w),
    "func.vjp": lambda f, x, w: vjp(f, x, w)[1](x),
    "func.hessian": lambda f, x, w: torch.func.hessian(scalar(of_one(f)))(torch.cat([x, w])),
    "reverse over reverse": lambda f, x, w: jacrev(jacrev(of_one(f)))(torch.cat([x, w])),
    "reverse over forward": lambda f, x, w: jacrev(jacfwd(of_one(f)))(torch.cat([x, w])),
    "forward over forward": lambda f, x, w: along(along(of_one(f)))(torch.cat([x, w])),
    "reverse, forward, reverse, each by rows": lambda f, x, w: jacrev(
        torch.func.hessian(lambda x: f(x, w).sum())
    )(x),
    "three forward": lambda f, x, w: along(along(along(of_one(f))))(torch.cat([x, w])),
    "three reverse": lambda f, x, w: grad(scalar(grad(scalar(grad(scalar(of_one(f)))))))(torch.cat([x, w])),
    "reverse, forward, reverse": lambda f, x, w: jacrev(along(grad(scalar(of_one(f)))))(torch.cat([x, w])),
    "vmap": lambda f, x, w: vmap(f)(torch.stack([x, w]), torch.stack([w, x])),
    "vmap of grad": lambda f, x, w: vmap(grad(scalar(f), argnums=(0, 1)), in_dims=(1, None))(
        torch.stack([x, w], 1), w
    ),
    "grad of vmap": lambda f, x, w: grad(lambda X: (vmap(lambda x: f(x, w))(X) ** 2).sum())(
        torch.stack([x, w])
    ),
    "hessian of vmap": lambda f, x, w: hessian(
        lambda w: (vmap(lambda x: f(x, w))(torch.stack([x, x**2])) ** 2).sum(), w
    ),
    "vmap of hessian": lambda f, x, w: vmap(lambda x: hessian(lambda x: scalar(f)(x, w), x))(
        torch.stack([x, w])
    ),
    "vmap of vmap of grad": lambda f, x, w: vmap(
        lambda x: vmap(lambda w: grad(scalar(f), argnums=(0, 1))(x, w))(torch.stack([x, w]))
    )(torch.stack([x, w])),
    "tape": on_tape,
    "tape, third order": twice_on_tape,
    "vmap on the tape": vmap_on_tape,
    "vmap by w on the tape": a_vmapped_closure_on_tape,
    "torch.func on the tape": transforms_on_tape,
    "the tape in torch.func": tape_in_transform,
    "Params": by_parameters,
    "Params in torch.func": by_parameters_in_transform,
}


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)


@pytest.fixture
def w() -> Tensor:
    return torch.tensor([0.9, 1.2, -0.4], dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("body", BODIES)
def test_all_is_as_without_it(body: Any, mode: str, x: Tensor, w: Tensor) -> None:
    expected = MODES[mode](lambda x, w: body(plainly, w)(x), x, w)
    found = MODES[mode](lambda x, w: body(checkpointed, w)(x), x, w)
    torch.testing.assert_close(found, expected)
    assert not x.requires_grad
    assert not w.requires_grad
