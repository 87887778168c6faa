"""What a row takes, read off the recorded graph: how many go at once, and which mode is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import _cost_model, hessian, jacobian, jacobians
from torchzygote._torch_private import surveys


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows at a time, as they are chosen."""
    found: list[int] = []
    choose = _cost_model.choose_chunk

    def noted(*args: object) -> int:
        found.append(choose(*args))  # type: ignore[arg-type]
        return found[-1]

    monkeypatch.setattr(_cost_model, "choose_chunk", noted)
    return found


def test_gradients_that_nobody_asks_for_are_not_counted() -> None:
    net = nn.Sequential(nn.Linear(8, 100), nn.Tanh(), nn.Linear(100, 100))
    x = torch.randn(3, 8, requires_grad=True)
    for _ in range(2):  # kinds of operations are learned
        by_input = surveys.survey([net(x)], inputs=[x])
    assert by_input.numel < 3 * (8 + 5 * 100)
    weight = net[2].weight
    assert surveys.survey([net(x)], inputs=[x, weight]).numel >= by_input.numel + weight.numel()
    everything = by_input.numel + sum(p.numel() for p in net.parameters())
    assert surveys.survey([net(x)]).numel >= everything


class Product(torch.autograd.Function):
    """Gives all gradients, whoever wants them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


@pytest.mark.parametrize(
    "f",
    [
        lambda x, w: Product.apply(x, w),  # type: ignore[no-untyped-call]
        lambda x, w: torch.cdist(x, w),
        lambda x, w: torch.einsum("bij,bj->bi", w.view(4, 25, 100), x[:, :1] * torch.ones(4, 100)),
    ],
    ids=["custom", "cdist", "einsum"],
)
def test_gradients_that_are_made_in_any_case_are_counted(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    w = torch.randn(100, 100, requires_grad=True)
    x = torch.randn(4, 100, requires_grad=True)
    for _ in range(2):
        assert surveys.survey([f(x, w)], inputs=[x]).numel >= w.numel()


def test_rows_of_a_wide_network_by_its_input_go_at_once(chunks: list[int]) -> None:
    net = nn.Sequential(nn.Linear(8, 2000), nn.Tanh(), nn.Linear(2000, 300))
    jacobian(net, torch.randn(8), mode="reverse")
    assert set(chunks) == {300}  # also asked where it is estimated
    chunks.clear()
    hessian(lambda x: net(x).square().sum(), torch.randn(8))
    assert chunks == [8]


def test_few_numbers_are_pulled_back_though_there_are_more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("forward mode begins with what all rows take")

    monkeypatch.setattr(jacobians, "_forward", refuse)
    net = nn.Sequential(nn.Linear(32, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(32)
    torch.testing.assert_close(jacobian(net, x)[0], torch.func.jacrev(net)(x))
