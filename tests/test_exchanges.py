"""Tensors that f finds by identity, exchanged in transforms, where others hold weak references to them."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import Params, checkpointed, gradient, hessian_dual, pushforward

Net = nn.Sequential


def loss(net: Net, x: Tensor) -> Tensor:
    out: Tensor = net(x)
    return out.float().square().sum()


CASES: dict[str, Callable[[Net, Tensor], Any]] = {
    "grad of gradient by a module": lambda net, x: torch.func.grad(
        lambda x: gradient(lambda net: loss(net, x), net)[0]["0.weight"].sum()
    )(x),
    "grad of gradient by Params": lambda net, x: torch.func.grad(
        lambda x: gradient(lambda: loss(net, x), Params(net))[net[0].weight].sum()
    )(x),
    "vmap": lambda net, x: torch.func.vmap(lambda x: gradient(lambda net: loss(net, x), net)[0]["1.bias"])(x),
    "checkpointed": lambda net, x: torch.func.grad(lambda x: checkpointed(lambda: loss(net, x)))(x),
    "hessian_dual": lambda net, x: hessian_dual(
        lambda scale: gradient(lambda net: loss(net, x * scale), net)[0]["1.weight"].sum(), x[0]
    ),
    "pushforward": lambda net, x: pushforward(lambda net: loss(net, x), net)(
        {name: torch.ones_like(p) for name, p in net.named_parameters()}
    ),
}


@pytest.fixture
def net() -> Net:
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def is_as_before(net: Net, before: list[Tensor]) -> bool:
    """The parameters are themselves, and ``backward()`` reaches them."""
    net(torch.ones(1, 4)).sum().backward()
    same = all(torch.equal(p, w) for p, w in zip(net.parameters(), before, strict=True))
    return same and all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("case", CASES)
def test_the_cache_of_autocast(case: str, warm: bool, net: Net) -> None:
    """It refers to the weights that it cast, before and meanwhile."""
    x = torch.randn(5, 4)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = CASES[case](net, x)
    with torch.autocast("cpu", torch.bfloat16):
        if warm:
            net(x)
        found = CASES[case](net, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert is_as_before(net, before)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # 2.10
@pytest.mark.parametrize("case", CASES)
def test_a_profiler_that_records_shapes_is_refused(case: str, net: Net) -> None:
    x = torch.randn(5, 4)
    before = [p.detach().clone() for p in net.parameters()]
    with torch.profiler.profile(record_shapes=True) as profile:
        with pytest.raises(RuntimeError, match="record_shapes=False"):
            CASES[case](net, x)
        net(x)
    assert is_as_before(net, before)
    if case != "checkpointed":  # which exchanges x alone
        with pytest.raises(RuntimeError, match="record_shapes=False"):  # what it has recorded is there
            CASES[case](net, x)
    del profile
    with torch.profiler.profile():
        CASES[case](net, x)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_a_profiler_inside_of_f_is_told_of(net: Net) -> None:
    """The parameters it has recorded are lost, but not without a word."""
    profiles: list[Any] = []

    def f(net: Net) -> Tensor:
        with torch.profiler.profile(record_shapes=True) as profile:
            y = loss(net, torch.ones(2, 4))
        profiles.append(profile)
        return y

    with pytest.raises(RuntimeError, match="couldn't be exchanged back, and hold nothing any more"):
        torch.func.vmap(lambda x: gradient(lambda net: f(net) * x, net)[0]["0.bias"])(torch.ones(2))


def test_all_are_exchanged_back_though_one_is_refused(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing helps but to say so; the others must not stay behind."""
    from torchzygote import _exchange

    plain = _exchange.swap_tensors
    refused: list[Tensor] = []
    is_within = False

    def swap(a: Tensor, b: Tensor) -> None:
        if a is net[1].weight and not refused and is_within:
            refused.append(a)
            raise RuntimeError("weak reference")
        plain(a, b)

    monkeypatch.setattr(_exchange, "swap_tensors", swap)
    mine, twins = list(net.parameters()), [torch.zeros_like(p) for p in net.parameters()]
    with contextlib.suppress(RuntimeError), _exchange.swapped(mine, twins):
        is_within = True
    assert refused
    assert [bool(p.detach().any()) for p in mine] == [p is not net[1].weight for p in mine]


def test_a_refusal_to_exchange_back_keeps_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not until the next collection: its cause was kept by the frame that its traceback holds."""
    from torchzygote import _exchange

    def refuse(a: Tensor, b: Tensor) -> None:
        raise RuntimeError("weak reference")

    monkeypatch.setattr(_exchange, "swap_tensors", refuse)
    x = torch.ones(2)
    kept = weakref.ref(x)
    gc.disable()
    try:
        with contextlib.suppress(RuntimeError):
            _exchange._swap_back([(x, torch.ones(2))])
        del x
        assert kept() is None
    finally:
        gc.enable()


class Failing:
    """In place of what tells devices' threads of their behalf."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        raise KeyboardInterrupt


def test_a_call_that_is_interrupted_as_it_ends_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every exchange would wait for it."""
    from torchzygote import _exchange

    monkeypatch.setattr(_exchange, "passes_leave_their_thread", lambda: True)
    monkeypatch.setattr(_exchange._forward_mode_lock, "on_behalf", Failing)
    with pytest.raises(KeyboardInterrupt), _exchange.finding():
        assert _exchange._finding
    assert not _exchange._finding


def test_a_differentiation_that_is_interrupted_as_it_ends_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what waits for the end of the next one would wait for ever."""
    from torchzygote import _state

    monkeypatch.setattr(_state, "passes_leave_their_thread", lambda: True)
    monkeypatch.setattr(_state, "on_behalf", Failing)
    with pytest.raises(KeyboardInterrupt), _state.differentiation():
        assert _state.at_end(lambda: None)
    assert _state.session() is None
    assert not _state.at_end(lambda: None)
