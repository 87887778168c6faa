"""Forward mode inside backward passes that run in other threads than the call that waits for them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backward_threads import move_backward_passes
from sines import ForwardSine
from torch import Tensor, func

from torchzygote import (
    Params,
    _exchange,
    _forward_mode_lock,
    _state,
    checkpointed,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    pullback,
    pushforward,
)
from torchzygote._torch_private import pass_along, passed_along

X = torch.tensor([1.0, 2.0], dtype=torch.float64)
# Of sum(x * cos(x)), the functions below.
GRADIENT = X.cos() - X * X.sin()
HESSIAN = (-2 * X.sin() - X * X.cos()).diag()


@pytest.fixture(autouse=True)
def backward_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    move_backward_passes(monkeypatch)


def pushed(x: Tensor) -> Tensor:
    y: Tensor = pushforward(torch.sin, x)(x)
    return y


def columns(x: Tensor) -> Tensor:
    return x @ jacobian(torch.sin, x, mode="forward")[0]


class Pushed(ForwardSine):
    """Whose backward goes forward itself."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = g * pushforward(torch.sin, x)(torch.ones_like(x))
        return result


def rerun(x: Tensor) -> Tensor:
    return checkpointed(pushed, x).sum()


def rerun_with_columns(x: Tensor) -> Tensor:
    return checkpointed(columns, x).sum()


def rerun_in_rerun(x: Tensor) -> Tensor:
    return checkpointed(lambda x: checkpointed(pushed, x), x).sum()


def by_custom_function(x: Tensor) -> Tensor:
    y: Tensor = gradient(lambda t: Pushed.apply(t).sum(), x)[0]  # type: ignore[no-untyped-call]
    return (x * y).sum()


F = [rerun, rerun_with_columns, rerun_in_rerun, by_custom_function]
WAYS: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
    "hessian": lambda f: hessian(f, X),
    "hessian_dual": lambda f: hessian_dual(f, X),
    "hessian_dual by columns": lambda f: hessian_dual(f, X, chunk_size=1),
    "hessian_reverse": lambda f: hessian_reverse(f, X),
    "forward over gradient": lambda f: jacobian(lambda x: gradient(f, x)[0], X, mode="forward")[0],
    "pushed pullback": lambda f: torch.stack(
        [pushforward(lambda x: pullback(f, x)[1](1.0)[0], X)(e) for e in torch.eye(2).double()]
    ),
    "torch.func.jacfwd": lambda f: func.jacfwd(lambda x: gradient(f, x)[0])(X),
    "torch.func.hessian": lambda f: func.hessian(f)(X),
}


@pytest.mark.parametrize("f", F)
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_in_a_backward_pass_that_forward_mode_waits_for(
    way: str, f: Callable[[Tensor], Tensor]
) -> None:
    torch.testing.assert_close(gradient(f, X)[0], GRADIENT)
    torch.testing.assert_close(WAYS[way](f), HESSIAN)


IN_PYTORCHS_THREADS = """
import os, sys, threading
import torch
from backward_threads import in_threads_of_pytorchs
import test_device_threads_forward as tests

threads = in_threads_of_pytorchs()
for f in (tests.rerun, tests.rerun_in_rerun, tests.by_custom_function):
    for way in ("hessian_dual", "pushed pullback", "torch.func.hessian"):
        torch.testing.assert_close(tests.WAYS[way](f), tests.HESSIAN)
assert threads and threading.get_ident() not in threads
print("all right", flush=True)
os._exit(0)  # PyTorch's thread pool isn't made to be left
"""


def test_the_same_in_threads_of_pytorchs_own() -> None:
    """In another process: a test that waits for ever should not have the others wait."""
    done = subprocess.run(
        [sys.executable, "-c", IN_PYTORCHS_THREADS],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "all right\n", done.stderr


def test_identities_are_found_in_a_backward_pass_that_an_exchange_waits_for() -> None:
    p, q = X.clone(), X.exp()

    def square(z: Tensor) -> Tensor:
        return z**2 * gradient(lambda: (q**3).sum(), Params([q]))[q].sum()

    def along(z: Tensor) -> Tensor:
        loss = lambda: p.sum() * gradient(lambda z: checkpointed(square, z), z)[0]
        return gradient(loss, Params([p]))[p].sum()

    found = func.grad(along)(X[0])
    torch.testing.assert_close(found, 2 * len(p) * 3 * (q**2).sum())
    assert not _exchange._finding
    assert not _exchange._exchanging


def test_backward_passes_of_others_wait_for_forward_mode() -> None:
    found: list[Tensor] = []
    other = threading.Thread(target=lambda: found.append(gradient(rerun, X)[0]), daemon=True)

    def f(x: Tensor) -> Tensor:
        other.start()
        other.join(0.3)
        assert not found
        return x.sin()

    torch.testing.assert_close(pushforward(f, X)(X), X * X.cos())
    other.join(20)
    torch.testing.assert_close(found[0], GRADIENT)


def on_behalf_of(mine: _forward_mode_lock.Behalf, work: Callable[[], object]) -> threading.Thread:
    """A thread of a backward pass that ``mine`` waits for, running."""

    class Working(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            with torch.enable_grad():
                work()
            return g

    def run() -> None:
        y: Tensor = Working.apply(torch.ones(1, requires_grad=True))  # type: ignore[no-untyped-call]
        pass_along(mine)
        y.backward()
        pass_along(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_one_thread_of_a_backward_pass_is_in_forward_mode_at_a_time() -> None:
    """A pass through several devices has several threads."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            found.append(pushforward(torch.sin, X)(X))

    def f(x: Tensor) -> Tensor:
        mine = _forward_mode_lock.behalf()
        for thread in [on_behalf_of(mine, work) for _ in range(4)]:
            thread.join(60)
        return x.sin()

    try:
        torch.testing.assert_close(pushforward(f, X)(X), X * X.cos())
    finally:
        sys.setswitchinterval(before)
    assert len(found) == 80
    for value in found:
        torch.testing.assert_close(value, X * X.cos())


def test_who_is_left_behind_by_a_failing_pass_is_waited_for() -> None:
    """Where a pass fails in one thread, PyTorch doesn't wait for the others, whose results are lost."""
    inside, leave, later = threading.Event(), threading.Event(), threading.Event()
    done: list[str] = []
    threads: list[threading.Thread] = []

    def slow(x: Tensor) -> Tensor:
        inside.set()
        leave.wait(20)
        done.append("slow")
        return x.sin()

    def work() -> None:
        pushforward(slow, X)(X)
        later.wait(20)
        assert _forward_mode_lock.behalf().hold.ended
        assert not _state.in_outer_forward_mode()
        torch.testing.assert_close(pushforward(torch.sin, X)(X), X * X.cos())
        done.append("another one")

    def f(x: Tensor) -> Tensor:
        threads.append(on_behalf_of(_forward_mode_lock.behalf(), work))
        inside.wait(20)
        threading.Timer(0.2, leave.set).start()
        raise ValueError("of another thread")

    with pytest.raises(ValueError, match="of another thread"):
        pushforward(f, X)(X)
    assert done == ["slow"]
    later.set()
    threads[0].join(20)
    assert done == ["slow", "another one"]
    assert _forward_mode_lock.forward_mode_lock.acquire(blocking=False)
    _forward_mode_lock.forward_mode_lock.release()


def test_what_is_passed_along_is_kept_and_let_go() -> None:
    """PyTorch 2.10 and 2.11 keep it without counting that."""
    before, value = passed_along(), object()
    count = sys.getrefcount(value)
    try:
        for _ in range(3):
            pass_along(value)
            assert passed_along() is value
            assert sys.getrefcount(value) == count + 1
        pass_along(None)
        assert sys.getrefcount(value) == count
        nothing = sys.getrefcount(None)
        for _ in range(1000):
            pass_along(None)
        assert abs(sys.getrefcount(None) - nothing) < 500
    finally:
        pass_along(before)
