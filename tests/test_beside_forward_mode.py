"""Forward mode in another thread, which is open in the whole process, changes nothing here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import Params, checkpointed, forwarddiff, gradient, hessian, pushforward


@pytest.fixture
def beside() -> Iterator[None]:
    """Another thread is in the middle of a push, for a while."""
    inside, go_on = threading.Event(), threading.Event()

    def f(x: Tensor) -> Tensor:
        inside.set()
        go_on.wait(0.3)  # who needs forward mode here waits for it
        return x * 2

    other = threading.Thread(target=lambda: pushforward(f, torch.ones(2))(torch.ones(2)))
    other.start()
    assert inside.wait(10)
    yield
    go_on.set()
    other.join()


def _closed_over() -> Any:
    w, x = torch.tensor(2.0), torch.tensor(3.0)
    return gradient(lambda: forwarddiff(lambda x: x * w, x) + 0 * w, Params([w]))[w]


def _runs() -> int:
    runs = []

    def f(x: Tensor) -> Tensor:
        runs.append(1)
        return x.exp()

    gradient(lambda x: checkpointed(f, x).sum(), torch.ones(10))
    return len(runs)


def _batched(f: Callable[[Tensor], Tensor]) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(3, 64, dtype=torch.float64)
    return torch.func.vmap(lambda z: gradient(lambda z: f(z).sum(), z)[0])(x)


CALLS: dict[str, tuple[Callable[[], Any], Any]] = {
    "forwarddiff, closed over": (_closed_over, torch.tensor(0.0)),
    "forwarddiff, two arguments": (
        lambda: gradient(lambda a, b: forwarddiff(lambda a: a * b, a), 2, 3),
        (torch.tensor(3.0), None),
    ),
    "forwarddiff, twice": (
        lambda: hessian(lambda a: forwarddiff(lambda b: b * b * a, a * 1), torch.tensor(2.0)),
        torch.tensor(8.0),
    ),
    "checkpointed, runs": (_runs, 2),
    "vmap, hardsigmoid": (lambda: _batched(lambda z: F.hardsigmoid(z) ** 2), None),
    "vmap, layer_norm": (lambda: _batched(lambda z: F.layer_norm(z, (64,)) ** 3), None),
}
ALONE = {name: call() if expected is None else expected for name, (call, expected) in CALLS.items()}


@pytest.mark.filterwarnings("ignore:forwarddiff:torchzygote.DroppedGradientWarning")
@pytest.mark.parametrize("name", CALLS)
def test_as_alone(name: str, beside: None) -> None:
    torch.testing.assert_close(CALLS[name][0](), ALONE[name], rtol=0, atol=0)
