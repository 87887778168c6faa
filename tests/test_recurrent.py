"""LSTMs step by step where their rows are batched: oneDNN's backward can't be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint as pytorchs

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    withjacobian,
)

torch.manual_seed(0)
LSTM = nn.LSTM(3, 4, batch_first=True)
X = torch.randn(2, 5, 3)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN"
)


def all_steps(x: Tensor) -> Tensor:
    y: Tensor = LSTM(x)[0]
    return y


def packed(x: Tensor) -> Tensor:
    lengths = torch.tensor([5, 3])
    y, _ = LSTM(pack_padded_sequence(x, lengths, batch_first=True))
    return pad_packed_sequence(y, batch_first=True)[0]


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "all steps": all_steps,
    "the last one": lambda x: all_steps(x)[:, -1],
    "packed": packed,
    "checkpointed": lambda x: checkpointed(all_steps, x),
}


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")  # PyTorch packs them so
@pytest.mark.parametrize("name", FUNCTIONS)
def test_jacobians(name: str) -> None:
    f = FUNCTIONS[name]
    plain = torch.autograd.functional.jacobian(f, X, vectorize=False)  # type: ignore[no-untyped-call]
    for keywords in ({}, {"mode": "reverse"}, {"mode": "forward"}, {"chunk_size": 1}, {"chunk_size": 7}):
        value, (found,) = withjacobian(f, X, **keywords)  # type: ignore[arg-type]
        torch.testing.assert_close(found, plain.reshape(len(found), -1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(value, f(X))
    assert torch._C._get_mkldnn_enabled()


def test_second_derivatives() -> None:
    f = lambda x: all_steps(x).square().sum()
    plain = torch.func.jacrev(torch.func.jacrev(f))(X).reshape(30, 30)
    for found in (hessian(f, X), hessian_dual(f, X), jacobian(lambda x: gradient(f, x)[0], X)[0]):
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(diaghessian(f, X)[0].reshape(-1), plain.diagonal(), atol=1e-5, rtol=1e-4)


def test_rows_by_weights() -> None:
    params = Params(LSTM)
    found = jacobian(lambda: all_steps(X), params)
    weights = dict(LSTM.named_parameters())
    plain = torch.func.jacrev(lambda w: torch.func.functional_call(LSTM, w, (X,))[0])(weights)
    for name, p in weights.items():
        torch.testing.assert_close(found[p], plain[name].reshape(40, -1), atol=1e-5, rtol=1e-4)


def test_f_runs_once_and_batch_norms_count_once() -> None:
    ran: list[None] = []
    norm = nn.BatchNorm1d(4)

    def f(x: Tensor) -> Tensor:
        ran.append(None)
        y: Tensor = norm(all_steps(x).mT)
        return y

    jacobian(f, X, mode="reverse")
    assert len(ran) == int(norm.num_batches_tracked) == 1


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")  # as autocast takes oneDNN's
def test_autocast_rounds_as_it_does_outside() -> None:
    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return all_steps(x)

    def g(x: Tensor) -> Tensor:
        y = f(x)
        seen.append(y.dtype)
        return y.float().square().sum()

    seen: list[torch.dtype] = []
    assert withjacobian(f, X).val.dtype is torch.bfloat16
    gradient(g, X)
    hessian(g, X)
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize("checkpoint", [checkpointed, functools.partial(pytorchs, use_reentrant=False)])
def test_what_a_checkpoint_runs_again_does_the_same(checkpoint: Callable[..., Tensor]) -> None:
    x = X.clone().requires_grad_()
    y = gradient(lambda x: checkpoint(all_steps, x).square().sum(), x, create_graph=True)[0].sum()
    (found,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(found, hessian(lambda x: all_steps(x).square().sum(), X).sum(0).view_as(X))
    torch.testing.assert_close(jacobian(lambda x: checkpoint(all_steps, x), X)[0], jacobian(all_steps, X)[0])


def test_a_failure_leaves_the_switch_as_it_was() -> None:
    def wrong(x: Tensor) -> Any:
        return torch._VF.lstm(x, 3)  # type: ignore[attr-defined]

    with pytest.raises(TypeError):
        hessian(lambda x: wrong(x), X)
    assert torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        hessian(lambda x: all_steps(x).sum(), X)
        assert not torch._C._get_mkldnn_enabled()
    finally:
        torch._C._set_mkldnn_enabled(True)


def test_dropout_between_layers_is_drawn_once() -> None:
    deep = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
    torch.manual_seed(3)
    value, (found,) = withjacobian(lambda x: deep(x)[0], X)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    expected = deep(X)[0]
    assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(value, expected)
    torch.manual_seed(3)
    x = X.clone().requires_grad_()
    (row,) = torch.autograd.grad(deep(x)[0].sum(), x)
    torch.testing.assert_close(found.sum(0), row.reshape(-1), atol=1e-5, rtol=1e-4)
