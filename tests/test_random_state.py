"""Finding structure runs a random function, and leaves the generators as one plain call would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import hessian_sparsity, jacobian_sparsity, plan_hessian, plan_jacobian


@pytest.mark.parametrize("find", [jacobian_sparsity, plan_jacobian, hessian_sparsity, plan_hessian])
def test_random_numbers_go_on_as_after_one_plain_call(find: Callable[..., Any]) -> None:
    def f(x: Tensor) -> Tensor:
        return (x * torch.rand(4) + F.dropout(x**2)).sum()

    x = torch.rand(4)
    torch.manual_seed(0)
    f(x)
    expected = torch.rand(3)
    torch.manual_seed(0)
    find(f, x)
    assert torch.equal(torch.rand(3), expected)
