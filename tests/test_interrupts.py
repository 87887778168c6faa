"""What an interrupt leaves behind that comes between two steps of entering: nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func

from torchzygote import (
    Params,
    _exchange,
    _forward_mode_lock,
    _state,
    _updates,
    eager_update,
    gradient,
    hessian_dual,
    pushforward,
)
from torchzygote._torch_private import in_forward_ad, in_functorch, jvp_flat, levels, vmap_flat

X = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64)


def interrupt(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, after: bool = False) -> None:
    """Once, as ``holder.name`` is called, or as it has been."""
    own = getattr(holder, name)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        monkeypatch.setattr(holder, name, own)
        if after:
            own(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(holder, name, interrupted)


def push() -> Tensor:
    return pushforward(torch.sin, X)(torch.ones_like(X))


def pushed_in_batches() -> Any:
    return hessian_dual(lambda x: x.sin().prod(), X)


def exchange() -> Any:
    x = X.clone()
    return func.vmap(lambda z: gradient(lambda: (z * x).sum(), Params([x]))[x])(torch.ones(2, 3))


def elsewhere(call: Callable[[], Any]) -> Any:
    """What it gives in another thread, which an interrupted one is not to keep waiting."""
    given: list[Any] = []
    thread = threading.Thread(target=lambda: given.append(call()), daemon=True)
    thread.start()
    thread.join(10)
    assert given, "it waits, or has failed"
    return given[0]


def assert_nothing_is_left() -> None:
    assert not in_functorch()
    assert not in_forward_ad()
    assert levels._eager_transforms.JVP_NESTING == 0
    assert _state._opened == 0
    assert not _exchange._finding
    assert not _exchange._exchanging
    assert not _exchange._waiting
    assert not _exchange._lock.locked()
    X.clone().requires_grad_()
    torch.testing.assert_close(elsewhere(push), X.cos())
    torch.testing.assert_close(push(), X.cos())
    torch.testing.assert_close(elsewhere(exchange), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("call", [push, exchange])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["passed_along", "behalf_from", "ForwardModeHold", "pass_along"])
def test_as_forward_mode_is_entered(
    name: str, after: bool, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, _forward_mode_lock, name, after)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert _forward_mode_lock.passed_along() is None
    assert_nothing_is_left()


def test_as_forward_mode_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(x: Tensor) -> Tensor:
        inside.set()
        go_on.wait(30)
        return x.sin()

    other = threading.Thread(target=lambda: pushforward(slow, X)(X))
    other.start()
    inside.wait(30)
    interrupt(monkeypatch, _exchange._changed, "notify_all", after=True)
    try:
        with pytest.raises(KeyboardInterrupt):
            gradient(lambda: (X * push()).sum(), Params([X]))
    finally:
        go_on.set()
        other.join()
    assert_nothing_is_left()


class Interrupted:
    """In place of a lock: an interrupt comes as it has been left."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("holder", "name", "call"),
    [(_state, "_counting", push), (_exchange, "_lock", lambda: gradient(lambda: X.sum(), Params([X])))],
)
def test_as_something_has_been_counted(
    holder: Any, name: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, name, Interrupted())
    with pytest.raises(KeyboardInterrupt):
        call()
    monkeypatch.undo()
    assert_nothing_is_left()


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["passes_leave_their_thread", "_wait_until_alone"])
def test_as_a_call_finds_by_identity(name: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, _exchange, name, after)
    with pytest.raises(KeyboardInterrupt):
        exchange()
    assert_nothing_is_left()


def test_as_a_call_that_finds_by_identity_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, _exchange._changed, "notify_all")
    monkeypatch.setattr(_exchange, "_waiting", {-1})
    with pytest.raises(KeyboardInterrupt), _exchange.finding():
        pass
    monkeypatch.undo()
    assert_nothing_is_left()


@pytest.mark.parametrize(
    ("holder", "name"),
    [
        (levels._C_functorch, "_vmap_increment_nesting"),
        (levels._C_functorch, "_add_batch_dim"),
        (levels._C_functorch, "_remove_batch_dim"),
        (levels._C_functorch, "_jvp_increment_nesting"),
        (levels, "_enter_dual_level"),
        (levels, "_jvp_inside"),
        (levels, "_make_dual"),
    ],
)
def test_as_a_level_is_entered(holder: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in which nothing has been entered, too: no other level is left in its place."""
    interrupt(monkeypatch, holder, name)
    with pytest.raises(KeyboardInterrupt):
        pushed_in_batches()
    assert_nothing_is_left()


@pytest.mark.parametrize("flat", [vmap_flat, lambda f, x: jvp_flat(f, [x], [x])])
def test_levels_around_stay(flat: Callable[..., Any]) -> None:
    def interrupted(x: Tensor) -> list[Tensor]:
        raise KeyboardInterrupt

    def around(x: Tensor) -> Tensor:
        depth = levels.functorch_depth()
        with pytest.raises(KeyboardInterrupt):
            flat(interrupted, x)
        assert levels.functorch_depth() == depth
        return x.sin()

    torch.testing.assert_close(func.vmap(around)(X.expand(2, 3)), X.sin().expand(2, 3))
    torch.testing.assert_close(func.jvp(around, (X,), (X,))[1], X * X.cos())
    assert_nothing_is_left()


class Refusing(Tensor):
    """A parameter that takes no hook."""

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        raise type(self).error

    error: BaseException


@pytest.mark.parametrize("error", [RuntimeError("no hooks"), KeyboardInterrupt()])
def test_an_eager_update_that_fails_half_way_updates_nothing(error: BaseException) -> None:
    w = torch.ones(2, requires_grad=True)
    last = torch.ones(2).as_subclass(Refusing).requires_grad_()
    Refusing.error = error
    with pytest.raises(type(error)):
        eager_update(lambda param, grad: param.sub_(grad), [w, last])
    assert not _updates.is_enrolled(w)
    assert not _updates.is_enrolled(last)
    w.sum().backward()
    torch.testing.assert_close(w.detach(), torch.ones(2))
    torch.testing.assert_close(w.grad, torch.ones(2))
    w.grad = None
    with eager_update(lambda param, grad: param.sub_(grad), [w]):
        w.sum().backward()
    torch.testing.assert_close(w.detach(), torch.zeros(2))
