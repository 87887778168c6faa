"""What a device makes different, where there is none: backward passes in other threads, tensors elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from backward_threads import move_backward_passes
from sines import ForwardSine
from torch import Tensor

from torchzygote import (
    Params,
    _cost_model,
    _exchange,
    gradient,
    hessian_reverse,
    hook,
    jacobian_sparsity,
    plan_hessian,
    plan_jacobian,
)
from torchzygote._cost_model import RowCost
from torchzygote._plans.base import Plan
from torchzygote._random import RandomState
from torchzygote._separable import find_layout
from torchzygote._torch_private import backward, passing

X = torch.tensor([1.0, 2.0], dtype=torch.float64)


@pytest.fixture
def backward_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes run in a thread of their own, as those of a device do."""
    move_backward_passes(monkeypatch)


class Sine(ForwardSine):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = g * gradient(lambda t: t.sin().sum(), x)[0]
        return result


def by_hook(x: Tensor) -> Tensor:
    y: Tensor = hook(lambda g: g * gradient(lambda t: (t**3).sum(), x)[0], x)
    return y.sum()


def by_function(x: Tensor) -> Tensor:
    y: Tensor = Sine.apply(x)  # type: ignore[no-untyped-call]
    return y.sum()


@pytest.mark.parametrize(
    ("f", "expected"), [(by_hook, (6 * X).diag()), (by_function, -X.sin().diag())], ids=["hook", "custom"]
)
def test_derivatives_inside_a_backward_pass_are_differentiable(
    f: Callable[[Tensor], Tensor], expected: Tensor, backward_elsewhere: None
) -> None:
    torch.testing.assert_close(hessian_reverse(f, X, chunk_size=1), expected)


def test_no_batch_axis_is_looked_for_between_devices() -> None:
    x = torch.rand(4096, 4, requires_grad=True)
    cost = RowCost(1 << 20, 3, None)
    assert find_layout(x.sin(), x, cost) is not None
    assert find_layout(x.to("meta").sin(), x, cost) is None


def test_seeds_of_a_plan_come_to_where_they_are_needed() -> None:
    plan = plan_jacobian(lambda x: x[1:] * x[:-1], torch.rand(6), mode="reverse")
    (constants,) = plan._constants.values()
    seeds, total = constants.seeds(torch.float64, torch.device("meta"))
    part = seeds(0, total)
    assert (part.device.type, part.dtype) == ("meta", torch.float64)


def test_constants_of_a_plan_are_made_where_its_arguments_are(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Plan, "_constants_for", lambda self, recovery, dtype, device: made.append(device))
    plans: list[Plan] = [
        plan_jacobian(lambda x: x[1:] * x[:-1], torch.rand(6), mode="reverse"),
        plan_hessian(lambda x: (x**3).sum(), torch.rand(6)),
    ]
    second = torch.device("cuda", 1)
    for plan in plans:
        inputs = [plan._inputs[0]._replace(device="cuda")]
        type(plan)(plan._f, inputs, plan._recovery, device=second)
    assert made == [torch.device("cpu"), torch.device("cpu"), second, second]


def test_memory_that_pytorch_keeps_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHZYGOTE_MEMORY_BUDGET", raising=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 1 << 40))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 << 20)
    assert _cost_model.memory_budget(torch.device("cuda")) == 2 << 20


def test_generators_of_a_device_that_f_was_first_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    state, seeds = RandomState(), []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    state.restore()
    assert seeds == [torch.initial_seed()]


@pytest.mark.parametrize("call", [plan_jacobian, jacobian_sparsity])
def test_detection_by_params_keeps_other_threads_from_exchanging_them(call: Callable[..., Any]) -> None:
    w = torch.rand(4)
    seen: list[bool] = []

    def f() -> Tensor:
        seen.append(threading.get_ident() in _exchange._finding)
        return w[1:] * w[:-1]

    call(f, Params([w]))
    assert seen
    assert all(seen)


def _kept_in_backward(key: str) -> bool:
    """Whether what PyTorch keeps by this name is to be had in a backward pass."""
    seen: list[bool] = []

    def look(g: Tensor) -> Tensor:
        seen.append(torch._C._is_key_in_tls(key))
        return g

    gradient(lambda x: hook(look, x).sum(), X)
    assert len(seen) == 1
    return seen[0]


def test_the_context_is_kept_for_other_threads_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    x = X.clone().requires_grad_()
    x.register_hook(lambda g: seen.append(torch._C._is_key_in_tls("context")))
    torch.autograd.grad(x.sum(), x)
    assert not _kept_in_backward("context")
    monkeypatch.setattr(backward, "passes_leave_their_thread", lambda: True)
    assert _kept_in_backward("context") is seen[0]  # as PyTorch itself does


def test_operations_of_a_backward_pass_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("DEBUG", logger="torch.autograd.graph"):
        gradient(lambda x: x.sin().sum(), X)
    assert any("SinBackward0" in record.message for record in caplog.records)


def test_an_extensions_device_counts_as_having_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not passing.passes_leave_their_thread()
    monkeypatch.setattr(passing, "_name_of_extension", lambda: "accelerator")
    assert passing.passes_leave_their_thread()
