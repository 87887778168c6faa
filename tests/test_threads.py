"""Calls from several threads at once, by the same parameters, in every way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, func, nn

from torchzygote import (
    Params,
    _exchange,
    _forward_mode_lock,
    diaghessian,
    gradient,
    hessian_dual,
    jacobian,
    pullback,
    pushforward,
)

x = torch.linspace(0.5, 1.5, 4, dtype=torch.float64)
p = torch.linspace(1.0, 2.0, 4, dtype=torch.float64)
layer = nn.Linear(4, 2).double()
ps, of_layer = Params([p]), Params(layer)


def f(x: Tensor) -> Tensor:
    return x.sin() * x.roll(1)


def total(x: Tensor) -> Tensor:
    return f(x).sum() * x.prod()


WAYS: dict[str, Callable[[], Tensor]] = {
    "gradient": lambda: gradient(lambda: total(p), ps)[p],
    "gradient by a module": lambda: gradient(lambda m: m(x).sin().sum(), layer)[0]["weight"],
    "gradient by a module's Params": lambda: gradient(lambda: layer(x).sin().sum(), of_layer)[layer.weight],
    "pullback": lambda: pullback(lambda: f(p), ps)[1](x)[p],
    "jacobian": lambda: jacobian(lambda: f(p), ps)[p],
    "jacobian forward": lambda: jacobian(f, x, mode="forward")[0],
    "diaghessian": lambda: diaghessian(lambda: total(p), ps)[p],
    "hessian_dual": lambda: hessian_dual(total, x),
    "pushforward": lambda: pushforward(f, x)(x),
    "pushforward by a module": lambda: pushforward(lambda m: m(x), layer)({"bias": torch.ones(2)}),
    "pushforward in a gradient": lambda: gradient(lambda: pushforward(f, x)(p).sum(), ps)[p],
    "inside torch.func.grad": lambda: func.grad(lambda z: gradient(lambda: total(p) * z, ps)[p].sum())(x[0]),
    "inside torch.func.vmap": lambda: func.vmap(lambda z: gradient(lambda: total(p) * z, ps)[p])(x),
    "inside a pushforward": lambda: pushforward(lambda z: gradient(lambda: total(p) * z, ps)[p], 2.0)(1.0),
}


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads that take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("way", WAYS)
def test_values_do_not_depend_on_who_else_runs(way: str, switching: None) -> None:
    expected = WAYS[way]()
    disturbing = [WAYS[other] for other in ("inside torch.func.grad", "pushforward by a module", "gradient")]
    wrong: list[object] = []
    done = threading.Event()

    def disturb(i: int) -> None:
        while not done.is_set():
            disturbing[i]()

    def work() -> None:
        for _ in range(10):
            try:
                torch.testing.assert_close(WAYS[way](), expected)
            except Exception as error:
                wrong.append(error)

    others = [threading.Thread(target=disturb, args=(i,)) for i in range(3)]
    workers = [threading.Thread(target=work) for _ in range(2)]
    for thread in (*others, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    for thread in others:
        thread.join()
    assert not wrong
    assert not p.requires_grad
    assert layer.weight.requires_grad


def test_a_flag_that_another_thread_holds_is_not_taken_for_granted() -> None:
    """Held for a while by one call, it must not be trusted by the next, whenever that one looks."""
    from torchzygote._flags import _Flags

    flags = _Flags()
    w = torch.ones(2)
    seen: list[bool] = []

    class Looking(torch.Tensor):
        """At each change of the flag somebody else looks."""

        def requires_grad_(self, requires_grad: bool = True) -> Tensor:
            super().requires_grad_(requires_grad)
            seen.append(flags.are_needless([self]))
            return self

    watched = w.as_subclass(Looking)
    release = flags.hold([watched])
    release()
    assert seen == [False, False]
    assert not watched.requires_grad
    assert flags.are_needless([torch.ones(2, requires_grad=True)])


@pytest.fixture
def elsewhere() -> Iterator[threading.Event]:
    """Another thread is in a derivative by ``ps``, until the event is set."""
    inside, leave = threading.Event(), threading.Event()

    def slow() -> Tensor:
        inside.set()
        leave.wait(60)
        return total(p)

    thread = threading.Thread(target=lambda: gradient(slow, ps))
    thread.start()
    inside.wait(60)
    yield leave
    leave.set()
    thread.join()


def exchange() -> Tensor:
    return func.vmap(lambda z: gradient(lambda: (z * p).sum(), ps)[p])(x)


def assert_nothing_is_left_behind() -> None:
    assert not _exchange._waiting
    assert not _exchange._exchanging
    assert not _exchange._finding
    assert _forward_mode_lock.forward_mode_lock.acquire(blocking=False)
    _forward_mode_lock.forward_mode_lock.release()


def test_an_exchange_never_goes_ahead_of_a_call_elsewhere(
    elsewhere: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_exchange, "_PATIENCE", 0.05)
    with pytest.raises(RuntimeError, match="waited for 0.05 seconds for other threads"):
        exchange()
    assert not _exchange._waiting
    threading.Timer(0.1, elsewhere.set).start()
    monkeypatch.setattr(_exchange, "_PATIENCE", 60.0)
    torch.testing.assert_close(exchange(), x.unsqueeze(1).expand(4, 4))


def test_what_interrupts_a_wait_leaves_nothing_behind(
    elsewhere: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(me: int) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(_exchange, "_alone", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gradient(lambda: exchange().sum() * total(p), ps)
    elsewhere.set()
    while threading.active_count() > 1 and _exchange._finding:
        pass
    assert_nothing_is_left_behind()
