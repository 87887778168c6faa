"""Checkpointing: values and derivatives as without it, in every mode and order; runs counted; errors."""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hook,
    isderiving,
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
    nested,
    a_chain,
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


# ---- how often f runs --------------------------------------------------------------------------------------


class Counted:
    """A layer that counts its runs."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.runs += 1
        return (x.sin() * x).exp()


@pytest.mark.parametrize(
    ("derivative", "runs"),
    [
        (lambda f, x: f(x), 1),
        (lambda f, x: gradient(scalar(f), x), 2),
        (lambda f, x: jacobian(f, x, mode="reverse"), 2),
        (lambda f, x: jacobian(f, x, mode="reverse", chunk_size=1), 1 + 3),
        (lambda f, x: jacobian(f, x, mode="reverse", chunk_size=2), 1 + 2),
        (lambda f, x: pushforward(f, x)(x), 1),
        (lambda f, x: hessian_reverse(scalar(f), x), 1 + 2),
        (lambda f, x: grad(scalar(f))(x), 2),
        (lambda f, x: jacrev(f)(x), 2),
        (lambda f, x: jacrev(f, chunk_size=2)(x), 1 + 2),
        (lambda f, x: jacfwd(f)(x), 1),
        (lambda f, x: torch.func.hessian(scalar(f))(x), 2),
        (lambda f, x: vmap(grad(scalar(f)))(torch.stack([x, x])), 2),
    ],
)
def test_f_runs_once_more_per_backward_pass_never_once_per_row(derivative: Any, runs: int, x: Tensor) -> None:
    f = Counted()
    derivative(lambda x: checkpointed(f, x), x)
    assert f.runs == runs


def test_each_pullback_runs_f_once_more(x: Tensor) -> None:
    f = Counted()
    _, back = pullback(lambda x: checkpointed(f, x), x)
    first = back(x)
    assert f.runs == 2
    torch.testing.assert_close(back(x), first)
    assert f.runs == 3


def test_nothing_runs_again_without_a_backward_pass(x: Tensor) -> None:
    f = Counted()
    with torch.no_grad():
        checkpointed(f, x.requires_grad_())
    checkpointed(f, x.detach())
    assert f.runs == 2


# ---- what is stored ----------------------------------------------------------------------------------------


def differentiate(looked: Function, where: str, x: Tensor) -> None:
    if where == "tape":
        looked(x.requires_grad_()).backward()
    elif where == "vmap on the tape":
        vmap(looked)(torch.stack([x, x])).sum().backward()
    elif where == "grad on the tape":
        grad(looked)(x).sum().backward()
    elif where == "grad":
        grad(looked)(x)
    elif where == "vjp":
        vjp(looked, x)[1](torch.ones((), dtype=x.dtype))
    else:
        jacrev(jacrev(looked))(x)


@pytest.mark.parametrize(
    "where", ["tape", "grad", "vjp", "vmap on the tape", "grad on the tape", "jacrev of jacrev"]
)
@pytest.mark.parametrize("nested", [False, True])
def test_the_inside_is_gone_when_f_returns(where: str, nested: bool, x: Tensor, w: Tensor) -> None:
    inside: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    w.requires_grad_("tape" in where)

    def f(x: Tensor) -> Tensor:
        for _ in range(5):
            x = (x * w).sin()
            inside.append(weakref.ref(x))
        return x * x

    def looked(checkpoint: Checkpoint, x: Tensor) -> Tensor:
        y = checkpoint(functools.partial(checkpoint, f), x) if nested else checkpoint(f, x)
        gc.collect()
        alive.append(sum(ref() is not None for ref in inside))
        return (y**2).sum()

    for checkpoint in (checkpointed, plainly):
        inside.clear()
        differentiate(functools.partial(looked, checkpoint), where, x)
    assert alive[0] == 0
    if "vmap" not in where:  # where what is saved is not what f sees
        assert alive[-1] > 0


def test_a_backward_pass_through_a_chain_holds_one_link_at_a_time() -> None:
    """The most that is alive at once, where each of 20 links makes ten tensors."""
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = 0

    def link(x: Tensor) -> Tensor:
        nonlocal most
        for _ in range(10):
            x = x.sin()
            alive.add(x)
            most = max(most, len(alive))
        return x

    def chain(checkpoint: Checkpoint, x: Tensor) -> Tensor:
        for _ in range(20):
            x = checkpoint(link, x)
        return x.sum()

    x = torch.randn(4)
    expected = grad(functools.partial(chain, plainly))(x)
    assert most >= 200
    for derivative in (lambda f: gradient(f, x)[0], lambda f: grad(f)(x)):
        most = 0
        torch.testing.assert_close(derivative(functools.partial(chain, checkpointed)), expected)
        assert most <= 20 + 2 * 10


# ---- the same in every run ---------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True) * torch.rand(3, dtype=x.dtype) * x


RANDOM: dict[str, Callable[[Function, Tensor], Any]] = {
    "gradient": lambda f, x: gradient(scalar(f), x),
    "jacobian": lambda f, x: jacobian(f, x, mode="reverse", chunk_size=2),
    "hessian": lambda f, x: hessian(scalar(f), x),
    "grad": lambda f, x: grad(scalar(f))(x),
    "jacrev": lambda f, x: vjp(f, x)[1](x),
    "vmap, same": lambda f, x: vmap(grad(scalar(f)), randomness="same")(torch.stack([x, x])),
    "vmap, different": lambda f, x: vmap(grad(scalar(f)), randomness="different")(torch.stack([x, x])),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f, randomness="different")(x).pow(2).sum())(
        torch.stack([x, x])
    ),
    "grad of vmap of nothing batched": lambda f, x: grad(
        lambda x: vmap(lambda i: f(x), randomness="different")(torch.arange(4)).pow(2).sum()
    )(x),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("derivative", RANDOM)
def test_random_numbers_are_drawn_once(derivative: str, nested: bool, x: Tensor) -> None:
    torch.manual_seed(3)
    expected = RANDOM[derivative](noisy, x)
    after = torch.rand(())
    torch.manual_seed(3)
    f = functools.partial(checkpointed, functools.partial(checkpointed, noisy)) if nested else noisy
    found = RANDOM[derivative](lambda x: checkpointed(f, x), x)
    assert torch.equal(torch.rand(()), after)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("derivative", [lambda f, x: gradient(f, x)[0], lambda f, x: grad(f)(x)])
def test_autocast_and_default_device_are_as_they_were(derivative: Any) -> None:
    seen: list[Any] = []
    layer = nn.Linear(4, 4)

    def f(x: Tensor) -> Tensor:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return layer(x).float()

    def autocast_inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return checkpointed(f, x).sum()

    x = torch.randn(4)
    found = derivative(autocast_inside, x)
    assert seen == [(True, torch.bfloat16)] * 2
    torch.testing.assert_close(found, layer.weight.detach().bfloat16().float().sum(0), atol=1e-2, rtol=1e-2)

    seen.clear()

    def outside(x: Tensor) -> Tensor:
        with torch.device("meta"):
            return checkpointed(lambda x: (seen.append(torch.rand(1).device.type), x.sin())[1], x).sum()

    torch.testing.assert_close(derivative(outside, x), x.cos())
    assert seen == ["meta"] * 2


@pytest.mark.parametrize("tape", [True, False])
def test_gradients_inside_are_differentiable_whenever_it_runs(tape: bool, x: Tensor, w: Tensor) -> None:
    """f takes a derivative; whether that is differentiable depends on what surrounds the first run."""

    def f(x: Tensor) -> Tensor:
        return gradient(lambda y: (y**3 * w).sum(), x)[0]

    outer: Any = gradient if tape else lambda f, x: (grad(f)(x),)
    found = outer(lambda x: (checkpointed(f, x) ** 2).sum(), x)[0]
    torch.testing.assert_close(found, 36 * x**3 * w**2)
    w.requires_grad_()
    expected = torch.autograd.grad(grad(lambda x: (f(x) ** 2).sum())(x).sum(), w)
    found = torch.autograd.grad(grad(lambda x: (checkpointed(f, x) ** 2).sum())(x).sum(), w)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("transform", [False, True])
def test_hooks_inside_report_once_and_what_gets_nothing_reports_none(transform: bool, x: Tensor) -> None:
    def counted(seen: list[Any], derivative: Any, checkpoint: Checkpoint) -> Any:
        def note(g: Tensor | None) -> None:
            seen.append(None if g is None else tuple(g.shape))

        def f(x: Tensor) -> Tensor:
            assert isderiving()
            hook(note, x * 5)
            return hook(note, x * 2).sin()

        return derivative(lambda x: checkpoint(f, x).sum(), x)

    def in_transform(f: Function, x: Tensor) -> Any:
        return gradient(lambda y: grad(f)(x).sum() + y, torch.tensor(1.0))

    def unused(f: Function, x: Tensor) -> Any:
        return gradient(lambda y: grad(lambda x: (f(x), x.sum())[1])(x).sum() + y, torch.tensor(1.0))

    for derivative in (in_transform, unused) if transform else (gradient, lambda f, x: hessian(f, x)):
        expected: list[Any] = []
        found: list[Any] = []
        value = counted(expected, derivative, plainly)
        torch.testing.assert_close(counted(found, derivative, checkpointed), value)
        assert sorted(found, key=str) == sorted(expected, key=str)


# ---- what f may and may not do -----------------------------------------------------------------------------

DERIVATIVES = {
    "gradient": lambda f, x: gradient(scalar(f), x)[0],
    "jacobian": lambda f, x: jacobian(f, x, mode="reverse")[0],
    "grad": lambda f, x: grad(scalar(f))(x),
    "jacrev": lambda f, x: jacrev(f)(x),
}


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_a_function_that_changes_is_refused(derivative: str, x: Tensor) -> None:
    sizes = iter(range(3, 100))

    def impure(x: Tensor) -> Tensor:
        return (x[0] * torch.ones(next(sizes), dtype=x.dtype) * x[1]).sin()

    with pytest.raises(
        RuntimeError, match=r"checkpointed: expected .*impure to do the same when it ran again"
    ):
        DERIVATIVES[derivative](lambda x: checkpointed(impure, x), x)
    again = iter([True, False, False, False, False])

    def shorter(x: Tensor) -> Tensor:
        return x.sin().cos().exp() if next(again) else torch.ones_like(x)

    with pytest.raises(RuntimeError):
        DERIVATIVES["gradient"](lambda x: checkpointed(shorter, x), x)


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_writing_into_what_the_backward_pass_needs_is_refused(derivative: str, x: Tensor) -> None:
    """PyTorch refuses it without a checkpoint, and gives wrong gradients with one."""

    def f(x: Tensor) -> Tensor:
        y = x.exp()
        z = y * y
        y.mul_(3)
        return y.sin() + z

    with pytest.raises(RuntimeError, match=r"in place|inplace"):
        DERIVATIVES[derivative](lambda x: checkpointed(f, x), x)


def test_an_error_of_f_comes_through_and_changes_nothing(x: Tensor) -> None:
    class Boom(Exception):
        pass

    def bad(x: Tensor) -> Tensor:
        torch.rand(3)
        raise Boom

    for derivative in DERIVATIVES.values():
        with pytest.raises(Boom):
            derivative(lambda x: checkpointed(bad, x), x)
    assert not x.requires_grad
    torch.testing.assert_close(gradient(lambda x: checkpointed(torch.sin, x).sum(), x)[0], x.cos())


def test_a_tensor_that_cannot_be_found_is_no_gradient_lost(x: Tensor, w: Tensor) -> None:
    """A scripted function hides what it holds; its inside is stored then, and the gradient is right."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)

        class Hidden(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w = nn.Parameter(w.clone())

            def forward(self, x: Tensor) -> Tensor:
                return x * self.w

        scripted = torch.jit.script(Hidden())

        def f(x: Tensor) -> Tensor:
            return grad(lambda x: (checkpointed(lambda x: scripted(x).sin(), x) ** 2).sum())(x)

        with pytest.warns(UserWarning, match="can't be found from outside"):
            y = f(x)
        (found,) = torch.autograd.grad(y.sum(), list(scripted.parameters()))
        v = w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(grad(lambda x: ((x * v).sin() ** 2).sum())(x).sum(), v)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["lstm", "attention", "norm", "convolution"])
def test_modules_get_their_gradients(kind: str) -> None:
    modules: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
        "lstm": (nn.LSTM(4, 4), (3, 2, 4)),
        "attention": (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), (3, 2, 4)),
        "norm": (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GELU()), (5, 4)),
        "convolution": (nn.Conv1d(2, 3, 2), (2, 2, 5)),
    }
    module, shape = modules[kind]
    module.double()
    x = torch.randn(shape, dtype=torch.float64)

    def loss(checkpoint: Checkpoint, module: Any, x: Tensor) -> Tensor:
        y = checkpoint(module, x)
        return ((y[0] if isinstance(y, tuple) else y) ** 2).sum()

    expected = gradient(functools.partial(loss, plainly), module, x)
    found = gradient(functools.partial(loss, checkpointed), module, x)
    torch.testing.assert_close(found, expected)
    if kind != "norm":  # which writes into its statistics, and vmap and grad refuse that in themselves
        torch.testing.assert_close(
            grad(functools.partial(loss, checkpointed, module))(x),
            grad(functools.partial(loss, plainly, module))(x),
        )


def test_threads_share_what_they_close_over() -> None:
    layer = nn.Linear(3, 3).double()
    X = torch.randn(4, 3, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (checkpointed(lambda x: layer(x).tanh() * x, x) ** 2).sum()

    def work(x: Tensor) -> Any:
        return gradient(f, x)[0], hessian_dual(f, x), jacrev(jacrev(f))(x)

    expected = [work(x) for x in X]
    wrong: list[Any] = []

    def often(i: int) -> None:
        for _ in range(10):
            try:
                torch.testing.assert_close(work(X[i]), expected[i])
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=often, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- inside torch.compile ----------------------------------------------------------------------------------


def compiled(f: Any) -> Any:
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_under_compile(x: Tensor, w: Tensor) -> None:
    def f(x: Tensor) -> Tensor:
        return checkpointed(lambda x, *, debug: {"y": (x * debug).sin() * x}, x, debug=w)["y"].exp()

    y = compiled(f)(x.clone().requires_grad_())
    torch.testing.assert_close(y.detach(), f(x))
    leaf = x.clone().requires_grad_()
    found = torch.autograd.grad(compiled(f)(leaf).sum(), leaf)
    torch.testing.assert_close(found, torch.autograd.grad(f(leaf).sum(), leaf))
    for derivative in (
        lambda x: gradient(scalar(f), x)[0],
        lambda x: hessian(scalar(f), x),
        lambda x: vmap(grad(scalar(f)))(torch.stack([x, w])),
    ):
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(derivative)(x), derivative(x))
    torch._dynamo.reset()
