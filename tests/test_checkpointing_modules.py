"""Checkpointing: modules that update their buffers as they run, which they do once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_cases import Checkpoint, plainly
from torch import Tensor, nn

from torchzygote import Params, checkpointed, gradient, hessian, jacobian, pullback
from torchzygote._checkpoint.modules import ModuleBuffers

X = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4).sin()


class Moving(nn.Module):
    """A moving average, written in place or set anew."""

    mean: Tensor

    def __init__(self, anew: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(4))
        self.anew = anew

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        step = (0.5 * y.mean(0)).detach()
        if self.anew:
            self.mean = self.mean * 0.5 + step
        else:
            with torch.no_grad():
                self.mean.mul_(0.5).add_(step)
        return (y * self.mean).sin()


KINDS: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh()),
    "written": lambda: Moving(False),
    "set anew": lambda: Moving(True),
}

Call = Callable[[Checkpoint, Any, Tensor], Tensor]
HELD: dict[str, Call] = {
    "the function": lambda checkpoint, m, x: checkpoint(m, x),
    "a method": lambda checkpoint, m, x: checkpoint(m.forward, x),
    "closed over": lambda checkpoint, m, x: checkpoint(lambda x: m(x).cos(), x),
    "an argument": lambda checkpoint, m, x: checkpoint(lambda m, x: m(x), m, x),
    "in a list": lambda checkpoint, m, x: checkpoint(lambda x, ms=None: ms[0](x), x, ms=[m]),
    "deeper": lambda checkpoint, m, x: checkpoint(nn.Sequential(nn.Sequential(m), nn.Tanh()), x),
    "nested": lambda checkpoint, m, x: checkpoint(lambda x: checkpoint(m, x).cos(), x),
    "twice": lambda checkpoint, m, x: checkpoint(m, x) + 2 * checkpoint(m, 2 * x),
    "twice inside": lambda checkpoint, m, x: checkpoint(lambda x: m(x) + 2 * m(2 * x), x),
}


def module(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind]().double().train()


def compare(differentiate: Callable[[Checkpoint, nn.Module], Any], kind: str) -> None:
    made, again = module(kind), module(kind)
    mine = {name: (b, b._version) for name, b in made.named_buffers()}
    found, expected = differentiate(checkpointed, made), differentiate(plainly, again)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(made.named_buffers()), dict(again.named_buffers()))
    assert kind == "set anew" or all(b is mine[name][0] for name, b in made.named_buffers())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held", HELD)
def test_by_parameters_and_arguments(held: str, kind: str) -> None:
    call = HELD[held]
    if kind == "written" and held.startswith("twice"):
        pytest.skip("PyTorch refuses without a checkpoint")

    def by_parameters(checkpoint: Checkpoint, m: nn.Module) -> list[Tensor]:
        return list(gradient(lambda: call(checkpoint, m, X).sin().sum(), Params(m)).values())

    compare(by_parameters, kind)
    compare(lambda checkpoint, m: gradient(lambda x: call(checkpoint, m, x).sin().sum(), X)[0], kind)


def pulled_twice(checkpoint: Checkpoint, m: nn.Module) -> Any:
    y, back = pullback(lambda x: checkpoint(m, x).sin(), X)
    first = back(torch.ones_like(y))[0]
    return first, back(y)[0]


WAYS: dict[str, Callable[[Checkpoint, nn.Module], Any]] = {
    "jacobian": lambda checkpoint, m: jacobian(lambda x: checkpoint(m, x), X, mode="reverse")[0],
    "row by row": lambda checkpoint, m: jacobian(lambda x: checkpoint(m, x), X, mode="reverse", chunk_size=1)[
        0
    ],
    "hessian": lambda checkpoint, m: hessian(lambda x: checkpoint(m, x).sin().sum(), X),
    "a pullback, twice": pulled_twice,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_each_pullback_finds_what_the_first_run_found(way: str, kind: str) -> None:
    compare(WAYS[way], kind)


def test_inside_torch_func() -> None:
    compare(
        lambda checkpoint, m: torch.func.grad(lambda x: checkpoint(m, x).cos().sum())(X).detach(), "set anew"
    )


def test_buffers_are_the_present_ones_after_a_rerun_that_fails() -> None:
    m = module("written")
    runs: list[int] = []

    def f(x: Tensor) -> Tensor:
        y = m(x)
        runs.append(1)
        if len(runs) > 1:
            raise ValueError("no")
        return y.exp().sin()

    y, back = pullback(lambda x: checkpointed(f, x), X)
    mean, value = m.mean, copy.deepcopy(m.mean)
    with pytest.raises(Exception, match="no"):
        back(torch.ones_like(y))
    assert m.mean is mean
    torch.testing.assert_close(mean, value)


def test_buffers_that_are_not_changed_are_not_kept() -> None:
    m = nn.Sequential(nn.Linear(4, 4)).double()
    m.register_buffer("table", torch.ones(4, 4, dtype=torch.float64))
    runs: list[Any] = []

    def f(x: Tensor) -> Tensor:
        runs.append(m.table)
        return m(x) @ m.table

    gradient(lambda x: checkpointed(f, x).sin().sum(), X)
    assert len(runs) == 2
    assert runs[0] is runs[1] is m.table


class Averaged(nn.Module):
    """Keeps a mean of what it has got, of which its result is made; ``write`` says how."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3, dtype=torch.float64))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        mean: Any = self.mean
        self.write(mean, x.detach().mean(0))
        return x * mean


def by_batch_norm(mean: Tensor, x: Tensor) -> None:
    variance = torch.ones(3, dtype=torch.float64)
    torch.nn.functional.batch_norm(torch.stack([x, 2 * x]), mean, variance, training=True)


UNCOUNTED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "data": lambda mean, x: mean.data.lerp_(x, 0.5),
    "NumPy": lambda mean, x: np.multiply(mean.numpy(), 2.0, out=mean.numpy()),
    "a batch norm's statistics of another name": by_batch_norm,
}


@pytest.mark.parametrize("way", UNCOUNTED)
def test_writes_that_pytorch_does_not_count_are_undone_for_the_second_run(way: str) -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    plain, watched = Averaged(UNCOUNTED[way]), Averaged(UNCOUNTED[way])
    expected = gradient(lambda x: (plain(x) ** 3).sum(), x)[0]
    found = gradient(lambda x: (checkpointed(watched, x) ** 3).sum(), x)[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(watched.mean, plain.mean)
    assert not torch.equal(watched.mean, torch.ones(3, dtype=torch.float64))


def test_buffers_that_are_no_state_of_a_module_are_kept_by_nobody() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.ones(1000, 1000), persistent=False)
    module.register_buffer("table", torch.ones(1000, 1000))
    held = ModuleBuffers([vars(module)])
    held.settle()
    assert held._entries == []
