"""Checkpointing: what is the same in every run, what functions may do, errors."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jacrev, vjp, vmap

from torchzygote import (
    gradient,
    hessian,
    hessian_dual,
    hook,
    isderiving,
    jacobian,
)
from torchzygote.checkpointing import checkpointed

Function = Callable[[Tensor], Tensor]
Checkpoint = Callable[..., Any]


def plainly(f: Callable[..., Any], *xs: Any, **kwargs: Any) -> Any:
    return f(*xs, **kwargs)


def scalar(f: Any) -> Any:
    return lambda *args: (f(*args) ** 2).sum()


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -0.8, 1.1], dtype=torch.float64)


@pytest.fixture
def w() -> Tensor:
    return torch.tensor([0.9, 1.2, -0.4], dtype=torch.float64)


# ---- the same in every run ---------------------------------------------------------------------------------


def noisy(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=True) * torch.rand(3, dtype=x.dtype) * x


RANDOM: dict[str, Callable[[Function, Tensor], Any]] = {
    "gradient": lambda f, x: gradient(scalar(f), x),
    "jacobian": lambda f, x: jacobian(f, x, mode="reverse", chunk_size=2),
    "hessian": lambda f, x: hessian(scalar(f), x),
    "grad": lambda f, x: grad(scalar(f))(x),
    "jacrev": lambda f, x: vjp(f, x)[1](x),
    "func.jacrev": lambda f, x: jacrev(f)(x),
    "func.jacrev twice": lambda f, x: jacrev(jacrev(f))(x),
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


def test_what_f_catches_is_not_the_end_of_its_second_run(x: Tensor) -> None:
    caught: list[Exception] = []

    def f(x: Tensor) -> Tensor:
        try:
            return x.sin() * x  # the second run ends in here
        except Exception as error:
            caught.append(error)
            return x

    torch.testing.assert_close(
        gradient(lambda x: checkpointed(f, x).exp().sum(), x), gradient(lambda x: f(x).exp().sum(), x)
    )
    assert not caught


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


# ---- what PyTorch's checkpoint asks for around -------------------------------------------------------------


def test_debugging_of_pytorchs_checkpoints_is_theirs(x: Tensor) -> None:
    """It keeps them from watching with contexts of others."""
    inside: list[bool | None] = []
    switch = torch.utils.checkpoint

    def f(x: Tensor) -> Tensor:
        inside.append(switch._checkpoint_debug_enabled)
        return x.sin()

    with switch.set_checkpoint_debug_enabled(True):
        (found,) = gradient(lambda x: checkpointed(f, x).sum(), x)
        assert switch._checkpoint_debug_enabled
    torch.testing.assert_close(found, x.cos())
    assert inside == [True, True]
    assert switch._checkpoint_debug_enabled is None


def test_tensors_of_inference_mode_are_passed_on(x: Tensor) -> None:
    with torch.inference_mode():
        constant = torch.arange(3, dtype=torch.float64)
    w = x.clone().requires_grad_()
    checkpointed(lambda a: (a + w).exp(), constant).sum().backward()
    torch.testing.assert_close(w.grad, (constant + x).exp())
    assert torch.equal(checkpointed(torch.sin, constant), constant.sin())


def test_the_switch_is_not_left_on_by_another_thread(x: Tensor) -> None:
    switch = torch.utils.checkpoint
    running, over = threading.Event(), threading.Event()

    def f(x: Tensor) -> Tensor:
        running.set()
        assert over.wait(30)
        return x.sin()

    thread = threading.Thread(target=lambda: checkpointed(f, x.clone().requires_grad_()))
    with switch.set_checkpoint_debug_enabled(True):
        thread.start()
        assert running.wait(30)
    over.set()
    thread.join()
    assert switch._checkpoint_debug_enabled is None


def test_threads_are_told_apart_where_checkpoints_are_debugged(x: Tensor) -> None:
    switch, errors = torch.utils.checkpoint, []

    def work() -> None:
        try:
            for _ in range(50):
                gradient(lambda x: checkpointed(torch.sin, x).sum(), x)
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with switch.set_checkpoint_debug_enabled(True):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert errors == []
