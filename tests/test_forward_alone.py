"""Functions that forward mode alone can differentiate: there is no pullback to compare it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sines import ForwardSine
from torch import Tensor

from torchzygote import jacobian, plan_jacobian
from torchzygote._certificate import Comparison
from torchzygote.sparsity.pattern import Pattern


def overwritten(x: Tensor) -> Tensor:
    """What the backward pass needs has been written into."""
    y = x[1:] * x[:-1]
    z = y * y
    y.mul_(3)
    return z


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "custom": (lambda x: ForwardSine.apply(x) * x[0], lambda x: x.sin() * x[0]),  # type: ignore[no-untyped-call]
    "overwritten": (overwritten, lambda x: (x[1:] * x[:-1]) ** 2),
}
WAYS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "dense": lambda f, x: jacobian(f, x, mode="forward")[0],
    "one column at a time": lambda f, x: jacobian(f, x, mode="forward", chunk_size=1)[0],
    "sparse": lambda f, x: jacobian(f, x, mode="forward", sparse=True)[0].to_dense(),
    "plan": lambda f, x: plan_jacobian(f, x, mode="forward")(x)[0].to_dense(),
}


@pytest.mark.parametrize("n", [2, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("way", WAYS)
def test_jacobians_in_forward_mode(way: str, name: str, n: int) -> None:
    f, plain = FUNCTIONS[name]
    x = torch.linspace(0.3, 1.2, n, dtype=torch.float64)
    torch.testing.assert_close(WAYS[way](f, x), torch.func.jacrev(plain)(x))


def test_auto_takes_forward_mode_where_that_is_cheaper() -> None:
    (J,) = jacobian(lambda t: overwritten(t * torch.arange(1, 4000)), 0.5)
    torch.testing.assert_close(J, 4 * 0.5**3 * (torch.arange(1, 3999) * torch.arange(2.0, 4000)) ** 2)


def test_reverse_mode_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="must implement either the backward or vjp"):
        jacobian(FUNCTIONS["custom"][0], torch.ones(2), mode="reverse")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        jacobian(overwritten, torch.ones(2), mode="reverse")


def test_a_compressed_jacobian_is_checked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one more product of the same mode: a structure that misses an entry is seen."""
    from torchzygote import _structure

    n = 40
    x = torch.linspace(0.3, 1.2, n, dtype=torch.float64)
    band = Pattern.of(torch.eye(n - 1, n, dtype=torch.bool))
    monkeypatch.setattr(_structure, "jacobian_patterns", lambda *args, **kwargs: [band])
    with pytest.warns(UserWarning, match="report"):
        (J,) = jacobian(overwritten, x, mode="forward", sparse=True)
    torch.testing.assert_close(J.to_dense(), torch.func.jacrev(FUNCTIONS["overwritten"][1])(x))


def test_memory_that_runs_out_is_not_taken_for_a_missing_pullback(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchzygote import _engine

    def exhausted(*args: Any, **kwargs: Any) -> list[Comparison]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(_engine.Linearization, "pull_dense", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        jacobian(lambda x: x.sin(), torch.ones(3), mode="forward")
