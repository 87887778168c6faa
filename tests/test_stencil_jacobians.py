"""Jacobians of stencils from tangents by distances, without any product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from stencil_cases import VALUES, ZERO, C, X, programs
from torch import Tensor

import torchzygote as tz
from torchzygote import _stencil_sums

pytestmark = pytest.mark.usefixtures("grids_read_at_once")

ARRAYS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: f for name, (f, _) in VALUES.items() if name != "a limiter"},
    "quotients": lambda x: x[1:] / x[:-1] - 2 / x[1:],
    "in another shape": lambda x: (x.view(6, 7)[1:] * x.view(6, 7)[:-1]).view(5, 7),
    "chosen": lambda x: torch.where(C > 0, x.exp(), x.roll(1) ** 2),
    "limited": lambda x: x.diff().clamp(min=0.01) * x.diff().abs(),
    "activations": lambda x: F.gelu(x.diff()) * x[1:].sigmoid(),
    "linear": lambda x: 3 * x[1:] - x[:-1],
    "longer": lambda x: torch.cat([x, ZERO, x.sin()]).roll(0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_jacobians(name: str, grids_taken: list[bool], chunks: list[int]) -> None:
    f = ARRAYS[name]
    for x in (X, X.flip(0)):
        grids_taken.clear()
        (J,) = tz.jacobian(f, x)
        torch.testing.assert_close(J, torch.func.jacrev(f)(x).reshape(J.shape))
        val, (again,) = tz.withjacobian(f, x)
        assert torch.equal(J, again)
        assert not (J.requires_grad or val.requires_grad)  # noqa: PT018
        torch.testing.assert_close(val, f(x))
        if name != "longer":
            assert grids_taken == [True] * 2
            assert chunks == []


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.sin() * x,
        lambda x: (x[1:] * x[:-1]).sum(),
        lambda x: x[1:] * x.sum(),
        lambda x: x[::2] * x[1::2],
        lambda x: (x[1:] * x[:-1], 3)[0].float(),
        lambda x: torch.stack([x, x.roll(1)]),
    ],
)
def test_other_jacobians(f: Callable[[Tensor], Tensor], grids_taken: list[bool]) -> None:
    (J,) = tz.jacobian(f, X)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X).reshape(J.shape).to(J.dtype))
    assert True not in grids_taken


@given(programs())
def test_jacobians_of_random_programs(f: Callable[[Tensor], Tensor]) -> None:
    (J,) = tz.jacobian(f, X)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X))


@pytest.mark.parametrize(
    "options", [{"chunk_size": 5}, {"create_graph": True}, {"mode": "reverse"}, {"mode": "forward"}]
)
def test_jacobians_that_are_asked_for_by_name(options: dict[str, Any], grids_taken: list[bool]) -> None:
    f = ARRAYS["three neighbors"]
    (J,) = tz.jacobian(f, X, **options)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X))
    assert grids_taken == []


def test_jacobians_in_single_precision(grids_taken: list[bool]) -> None:
    f, x = ARRAYS["three neighbors"], X.float()
    (J,) = tz.jacobian(f, x)
    assert J.dtype == torch.float32
    torch.testing.assert_close(J, torch.func.jacrev(f)(x))
    assert grids_taken == [True]
    f = ARRAYS["a border of unknown size"]  # with numbers in double precision
    torch.testing.assert_close(tz.jacobian(f, x)[0].double(), torch.func.jacrev(f)(X), rtol=1e-6, atol=1e-6)


def test_small_jacobians_are_batched_rows(monkeypatch: pytest.MonkeyPatch, grids_taken: list[bool]) -> None:
    monkeypatch.setattr(_stencil_sums, "LEAST_OF_A_JACOBIAN", 43)
    tz.jacobian(ARRAYS["three neighbors"], X)
    assert grids_taken == []
