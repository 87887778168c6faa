"""Checkpointing: reruns that fail, which leave nothing behind of how it was."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_cases import ways
from torch import Tensor, nn

from torchzygote import Params, checkpointed, gradient
from torchzygote._checkpoint import modules

X = torch.tensor([[0.3, -0.7], [1.1, 0.2], [0.9, 0.4]])
DERIVATIVES = ways("gradient", "func.grad")


@pytest.fixture
def norms() -> nn.Module:
    """With two buffers each that are put back."""
    return nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))


def buffers_of(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(x, x.clone()) for x in module.buffers()]


@pytest.mark.parametrize("copies", range(4))
def test_memory_that_runs_out_as_buffers_are_put_back(
    copies: int, norms: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Variables and buffers are what they were before the rerun, the same objects."""
    scale = 2.0
    copy, left, before = modules._copy, copies, []

    def running_out(x: Tensor, version: int) -> Tensor:
        nonlocal left
        if before:
            if left == 0:
                raise torch.OutOfMemoryError("no memory")
            left -= 1
        return copy(x, version)

    def f(x: Tensor) -> Tensor:
        nonlocal scale
        y = checkpointed(lambda x: norms(x) * scale, x)
        scale = 3.0
        before.extend(buffers_of(norms))
        return y

    monkeypatch.setattr(modules, "_copy", running_out)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        gradient(lambda x: f(x).sum(), X)
    assert scale == 3.0
    for x, (then, value) in zip(norms.buffers(), before, strict=True):
        assert x is then
        assert torch.equal(x, value)


def test_a_failure_of_what_is_put_back_leaves_no_flags_on(
    norms: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Params require grad while a derivative by them runs, and once more for a rerun after it."""
    w = torch.ones(2)

    def fail(self: Any, stack: Any) -> None:
        raise torch.OutOfMemoryError("no memory")

    x = X.clone().requires_grad_()
    y = gradient_later(w, x)
    monkeypatch.setattr(modules.ModuleBuffers, "put_back", fail)
    with pytest.raises(torch.OutOfMemoryError):
        torch.autograd.grad(y, x)
    assert not w.requires_grad


def gradient_later(w: Tensor, x: Tensor) -> Tensor:
    """Recorded while ``w`` is held, and pulled back when it isn't any more."""
    kept: list[Tensor] = []

    def f() -> Tensor:
        kept.append(checkpointed(lambda x: (w * x).sin(), x).sum())
        return kept[0]

    gradient(f, Params([w]), create_graph=True)
    return kept[0]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("on_the_way", ["in", "out"])
def test_what_fails_on_the_way_does_not_keep_the_rest(
    on_the_way: str, derivative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 2.0

    def f(x: Tensor) -> Tensor:
        nonlocal scale
        y = checkpointed(lambda x: (x * scale).sin(), x)
        scale = 3.0
        return y

    def failing() -> None:
        raise RuntimeError("on the way")

    def put_back(self: Any, stack: Any) -> None:
        if on_the_way == "in":
            failing()
        stack.callback(failing)

    monkeypatch.setattr(modules.ModuleBuffers, "put_back", put_back)
    with pytest.raises(RuntimeError, match="on the way"):
        DERIVATIVES[derivative](f, X)
    assert scale == 3.0


def interrupted(error: BaseException) -> Callable[[Tensor], Tensor]:
    """Its rerun uses a tensor that has been written to, and fails."""

    def f(x: Tensor) -> Tensor:
        w, runs = torch.ones(2), itertools.count()

        def inner(x: Tensor) -> Tensor:
            y = (x * w).sin()
            if next(runs) == 1:
                raise error
            return y.exp()

        y = checkpointed(inner, x)
        w.mul_(2)
        return y

    return f


def test_an_interrupt_of_a_rerun_is_no_refusal() -> None:
    with pytest.raises(KeyboardInterrupt):
        DERIVATIVES["gradient"](interrupted(KeyboardInterrupt()), X)


def test_an_error_after_a_tensor_was_written_is_one() -> None:
    """Of that tensor, most likely."""
    with pytest.raises(RuntimeError, match=r"w, which it uses, has been written in place"):
        DERIVATIVES["gradient"](interrupted(ValueError("of the other numbers")), X)
