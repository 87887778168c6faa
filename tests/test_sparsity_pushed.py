"""Structure of functions that push forward, by operators that PyTorch crashes in under a dispatch mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import covers
from torch import Tensor

from torchzygote import diaghessian, forwarddiff, hessian, jacobian, jacobian_sparsity, pushforward

A = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
ONES = torch.ones(3, 3, dtype=torch.float64)


def in_place(v: Tensor) -> Tensor:
    y = A.clone()
    y.addcdiv_(v * v, A, value=0.5)
    return y


PUSHED: dict[str, Callable[[Tensor], Tensor]] = {
    "addcdiv": lambda v: torch.addcdiv(A, v * v, A, value=0.5),
    "addcdiv by the divisor": lambda v: torch.addcdiv(A, A, v, value=0.5),
    "addcdiv by self": lambda v: torch.addcdiv(v * v, A, A, value=0.5),
    "addcdiv method": lambda v: A.addcdiv(v * v, A, value=0.5),
    "addcdiv in place": in_place,
    "foreach": lambda v: torch._foreach_addcdiv([A], [v * v], [A], [2.0])[0],
    "addcmul": lambda v: torch.addcmul(A, v * v, A, value=0.5),
    "add": lambda v: torch.add(v * v, A, alpha=0.5),
    "addr": lambda v: torch.addr(ONES, v * v, A, alpha=0.5, beta=0.3)[:, 0],
    "addmv": lambda v: torch.addmv(A, ONES, v * v, alpha=0.5, beta=0.3),
}


def test_the_first_of_them_crashes_no_interpreter() -> None:
    code = (
        "import torch; from torchzygote import *; a = torch.rand(3)\n"
        "f = lambda v: torch.addcdiv(a, v * v, a, value=0.5)\n"
        "jacobian(lambda v: pushforward(f, v)(a), a, sparse=True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", PUSHED)
def test_pushed_forward(name: str) -> None:
    f = PUSHED[name]

    def pushed(v: Tensor) -> Any:
        return pushforward(f, v)(A.sin())

    (expected,) = jacobian(pushed, A, mode="reverse")
    (got,) = jacobian(pushed, A, sparse=True)
    torch.testing.assert_close(got.to_dense(), expected)
    (structure,) = jacobian_sparsity(pushed, A)
    assert covers(structure.to_dense(), expected != 0)
    if name.startswith(("addcdiv", "addcmul", "foreach")):
        assert structure.values().numel() == (0 if expected.count_nonzero() == 0 else 3)


@pytest.mark.parametrize("name", PUSHED)
def test_differentiated_forward_inside(name: str) -> None:
    f = PUSHED[name]

    def loss(v: Tensor) -> Tensor:
        return forwarddiff(f, v).sum()

    expected = torch.func.hessian(lambda v: f(v).sum())(A)
    torch.testing.assert_close(hessian(loss, A, sparse=True).to_dense(), expected)
    torch.testing.assert_close(diaghessian(loss, A)[0], expected.diagonal())
