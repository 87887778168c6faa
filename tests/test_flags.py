"""requires_grad of what Params hold: on while a call needs it, and to nobody else's eyes."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    eager_update,
    gradient,
    jacobian,
    pullback,
    withgradient,
)


@pytest.fixture
def half_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    model[0].requires_grad_(False)
    return model


@pytest.fixture
def X() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


# ---- frozen parameters that are differentiated by ----------------------------------------------------------

NESTED: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "Params": lambda m, X: gradient(lambda: m(X).pow(2).sum(), Params(m)).to_vector(),
    "module": lambda m, X: torch.cat(
        [g.reshape(-1) for g in gradient(lambda m: m(X).pow(2).sum(), m)[0].values()]
    ),
}


@pytest.mark.parametrize("nested", NESTED)
def test_what_is_frozen_is_frozen_for_calls_inside(
    nested: str, half_frozen: nn.Sequential, X: Tensor
) -> None:
    frozen = Params(list(half_frozen[0].parameters()))

    def f() -> Tensor:
        found: Tensor = (NESTED[nested](half_frozen, X) ** 2).sum()
        return found

    expected = f()
    val, grad = withgradient(f, frozen)
    torch.testing.assert_close(val, expected)
    assert all(g is not None for g in grad.values())
    torch.testing.assert_close(withgradient(f, Params(half_frozen)).val, expected)


def test_what_is_frozen_is_frozen_for_calls_inside_a_transform(half_frozen: nn.Sequential, X: Tensor) -> None:
    """Where tensors are exchanged for others that require grad."""
    frozen = Params(list(half_frozen[0].parameters()))
    seen: list[int] = []

    def f(s: Tensor) -> Tensor:
        def loss() -> Tensor:
            seen.append(len(Params(half_frozen)))
            seen.append(len(gradient(lambda m: m(X).sum(), half_frozen)[0]))
            return s * half_frozen(X).sum()

        found: Tensor = gradient(loss, frozen)[frozen[1]].sum()
        return found

    ones = torch.ones(2, dtype=torch.float64)
    torch.func.vmap(f)(ones)
    torch.func.grad(f)(ones[0])
    gradient(lambda: torch.func.vmap(f)(ones).sum(), frozen)
    assert set(seen) == {2}


def test_what_is_frozen_is_frozen_for_an_eager_update_made_inside(half_frozen: nn.Sequential) -> None:
    counts: list[str] = []

    def f() -> Tensor:
        with eager_update(lambda p, g: None, half_frozen) as handle:
            counts.append(repr(handle))
        return half_frozen[0].weight.sum()

    gradient(f, Params(list(half_frozen[0].parameters())))
    assert counts == ["<eager update of 2 parameters>"]


def test_what_is_frozen_is_frozen_for_other_threads(half_frozen: nn.Sequential, X: Tensor) -> None:
    frozen = Params(list(half_frozen[0].parameters()))
    started, done = threading.Event(), threading.Event()

    def f() -> Tensor:
        started.set()
        done.wait(60)
        return half_frozen(X).sum()

    other = threading.Thread(target=gradient, args=(f, frozen))
    other.start()
    started.wait(60)
    try:
        names = list(gradient(lambda m: m(X).sum(), half_frozen)[0])
        members = len(Params(half_frozen))
    finally:
        done.set()
        other.join()
    assert names == ["2.weight", "2.bias"]
    assert members == 2
    assert not any(p.requires_grad for p in frozen)


# ---- a tensor and a view of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_a_tensor_and_a_view_of_it_are_two_parameters_in_any_order(order: int) -> None:
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    row = base[0]
    ps = Params([base, row][::order])
    f = lambda: base.sum() * row.prod()
    for _ in range(2):
        g = gradient(f, ps)
        assert torch.equal(g[row], torch.tensor([20.0, 10.0]))
        assert torch.equal(g[base], torch.full((2, 2), 2.0))
        for mode in ("reverse", "forward"):
            assert torch.equal(jacobian(f, ps, mode=mode)[row], torch.tensor([[20.0, 10.0]]))
        h = diaghessian(lambda: base.sum() * row.pow(2).sum(), ps)
        assert torch.equal(h[row], torch.tensor([20.0, 20.0]))
        assert not base.requires_grad
        assert not row.requires_grad


def test_a_view_of_what_requires_grad_by_itself() -> None:
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    row = base[0]
    f = lambda: gradient(lambda: (row**2).sum() * base.sum(), Params([row])).to_vector().sum()
    assert torch.equal(withgradient(f, Params([base])).val, f())
    base.requires_grad_()  # by the caller, and the view doesn't follow
    assert torch.equal(f(), torch.tensor(60.0))
    row.requires_grad_()
    assert torch.equal(f(), torch.tensor(60.0))
    base.requires_grad_(False)
    assert row.requires_grad  # its own, and left as it was
    rows = nn.Parameter(torch.ones(2, 2))[0]  # part of a graph
    assert torch.equal(gradient(lambda: (3 * rows).sum(), Params([rows]))[rows], torch.full((2,), 3.0))


# ---- while a pullback is kept ------------------------------------------------------------------------------


def test_a_pullback_that_is_kept_leaves_the_parameters_as_they_were() -> None:
    w = torch.ones(2)
    _, back = pullback(lambda: (3 * w).sum(), Params([w]))
    assert not w.requires_grad
    for _ in range(2):
        g = back(1.0)
        assert not w.requires_grad
        w -= 0.1 * g[w]
    w.numpy()


def test_a_pullback_that_is_kept_does_not_freeze_what_is_unfrozen_meanwhile(
    half_frozen: nn.Sequential, X: Tensor
) -> None:
    weight = half_frozen[0].weight
    _, back = pullback(lambda: half_frozen(X).sum(), Params([weight]))
    assert not copy.deepcopy(half_frozen)[0].weight.requires_grad
    half_frozen.requires_grad_(True)
    back(1.0)
    assert weight.requires_grad
    del back
    gc.collect()
    assert weight.requires_grad


@pytest.mark.parametrize("by", ["module", "Params"])
def test_what_is_frozen_meanwhile_is_still_pulled_back_to(by: str, X: Tensor) -> None:
    layer = nn.Linear(3, 1).double()
    f = lambda *_: layer(X).pow(2).sum()
    expected = gradient(f, layer)[0]
    _, back = pullback(f, layer if by == "module" else Params(layer))
    layer.requires_grad_(False)
    found = back(1.0)
    torch.testing.assert_close(found[0] if by == "module" else found.named(), expected)
    assert not any(p.requires_grad for p in layer.parameters())


RERUNS: dict[str, Callable[..., Any]] = {
    "checkpointed": checkpointed,
    "torch": lambda f, x: checkpoint(f, x, use_reentrant=False),
}


@pytest.mark.parametrize("rerun", RERUNS)
def test_a_pullback_through_a_checkpoint_finds_the_flags_that_were_there(rerun: str, x: Tensor) -> None:
    w = torch.linspace(1.0, 2.0, 3, dtype=torch.float64)
    _, back = pullback(lambda: RERUNS[rerun](lambda x: torch.tanh(x * w), x), Params([w]))
    for _ in range(2):
        torch.testing.assert_close(back(torch.ones_like(x))[w], x / torch.cosh(x * w) ** 2)
        assert not w.requires_grad


def test_a_pullback_that_is_kept_within_transforms_and_differentiations(x: Tensor) -> None:
    w = torch.linspace(1.0, 2.0, 3, dtype=torch.float64)
    _, back = pullback(lambda: x * w**2, Params([w]))
    rows = torch.func.vmap(lambda v: back(v)[w])(torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(rows, torch.diag(2 * x * w))
    assert not w.requires_grad
    second = gradient(lambda: back(torch.ones_like(x))[w].sum(), Params([w]))[w]
    torch.testing.assert_close(second, 2 * x)
    by_cotangent = gradient(lambda v: back(v)[w].sum(), torch.ones_like(x))[0]
    torch.testing.assert_close(by_cotangent, 2 * x * w)
    assert not w.requires_grad


# ---- garbage collection, autocast, failures ----------------------------------------------------------------


def test_a_pullback_in_a_reference_cycle_may_be_collected_at_any_moment() -> None:
    ps = Params([torch.ones(1) for _ in range(800)])

    def keep_in_a_cycle() -> None:
        cycle: list[Any] = [pullback(lambda: ps[0].sum(), Params([ps[0]]))]
        cycle.append(cycle)

    def work() -> None:
        for _ in range(30):
            keep_in_a_cycle()
            gradient(lambda: ps[1].sum(), ps)

    before = gc.get_threshold()
    gc.set_threshold(50)
    try:
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(60)
    finally:
        gc.set_threshold(*before)
    assert not worker.is_alive()


def test_autocast_does_not_remember_weights_that_required_no_grad() -> None:
    w, x = torch.ones(3, 3), torch.ones(3)
    ps = Params([w])
    loss = lambda: F.linear(x, w).float().pow(2).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            value, g = withgradient(loss, ps)
            assert torch.equal(value, loss())
            w -= 0.1 * g[w]
        y, _back = pullback(loss, ps)
        w -= 0.1
        assert not torch.equal(loss(), y)


def test_a_call_that_fails_while_it_switches_flags_on_leaves_them_off() -> None:
    a, b = torch.ones(2), torch.ones(2)
    ps = Params([a, b])
    b.data = b.data.to(torch.int8)  # quantized later
    for call in (gradient, jacobian, pullback):
        with pytest.raises(RuntimeError, match="floating point"):
            call(lambda: a.sum(), ps)
        assert not a.requires_grad
    b.data = b.data.float()
    assert torch.equal(gradient(lambda: (a * b).sum(), ps)[b], a)
    assert not b.requires_grad
