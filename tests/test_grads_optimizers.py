"""Grads assigned and accumulated for optimizers: copies that fit, and steps as of plain autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from grads_samples import close, two
from torch import nn

from torchzygote import Grads, Params, gradient


def test_assigned_gradients_are_copies() -> None:
    w, b, g, _ = two()
    unused = torch.ones(1)
    g[unused] = None
    unused.grad = torch.tensor([7.0])
    g.assign_()
    assert torch.equal(w.grad, g[w])
    assert unused.grad == 7
    before = g.copy()
    w.grad.zero_()
    assert g == before
    b_grad = b.grad.clone()
    g *= 2
    assert torch.equal(b.grad, b_grad)
    g.assign_(share=True)
    assert w.grad is g[w]


def test_accumulation_adds_weighted_and_never_writes_into_the_grads() -> None:
    w, b, g, h = two()
    total = {k: 0.5 * g[k] + 2 * h[k] + g[k] for k in (w, b)}
    before = g.copy()
    g.accumulate_(0.5)
    memory = w.grad.data_ptr()
    h.accumulate_(torch.tensor(2.0))
    g.accumulate_()
    close({w: w.grad, b: b.grad}, total)
    assert w.grad.data_ptr() == memory
    w.grad = g[w]
    g.accumulate_()
    torch.testing.assert_close(w.grad, 2 * g[w])
    assert g == before


def test_a_step_is_that_of_plain_autograd() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    ps = Params(model)
    mine, theirs = torch.optim.AdamW(ps, lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    for _ in range(5):
        g = gradient(lambda: nn.functional.mse_loss(model(x), y), ps)
        g.clip_norm_(0.1)
        g.assign_()
        mine.step()
        theirs.zero_grad()
        nn.functional.mse_loss(twin(x), y).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        theirs.step()
    assert torch.equal(ps.to_vector(), Params(twin).to_vector())


def test_what_does_not_fit_its_parameter_is_not_assigned() -> None:
    w, b = torch.ones(2, 3), torch.ones(())
    for value, error, message in [
        (torch.ones(6), ValueError, "shape and device"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, "real value"),
    ]:
        g = Grads(Params([b, w]), [torch.ones(()), value])
        for attempt in (g.assign_, g.accumulate_):
            with pytest.raises(error, match=message):
                attempt()
        assert b.grad is None
        assert w.grad is None
    g = Grads(Params([b]), [torch.ones(())])
    for weight in ("1", None, True, torch.ones(2), 1j):
        with pytest.raises(TypeError, match="weight: expected"):
            g.accumulate_(weight)
    Grads(Params([w]), [torch.ones(2, 3, dtype=torch.float64)]).assign_()
    assert w.grad is not None
    assert w.grad.dtype is torch.float32


def test_a_graph_survives_assignment() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    gradient(lambda: (w**3).sum(), Params([w]), create_graph=True).assign_()
    assert w.grad is not None
    (second,) = torch.autograd.grad(w.grad.sum(), w)
    torch.testing.assert_close(second, 6 * w.detach())


def test_accumulating_many_as_one_by_one() -> None:
    """With and without a gradient there, of two dtypes, through a number and a tensor."""
    for dtypes in ([torch.float32], [torch.float32, torch.float64]):
        for filled in (0, 3, 8):
            for weight in (0.5, np.array(0.5), torch.tensor(0.5)):
                keys = [torch.zeros(i + 1, dtype=dtypes[i % len(dtypes)]) for i in range(8)]
                for p in keys[:filled]:
                    p.grad = torch.rand_like(p)
                g = Grads(Params(keys), [torch.rand_like(p) for p in keys])
                before = [p.grad for p in keys]
                expected = {p: float(weight) * g[p] + (0 if p.grad is None else p.grad.clone()) for p in keys}
                kept = g.copy()
                g.accumulate_(weight)
                close({p: p.grad for p in keys}, expected)
                assert g == kept
                assert all(p.grad is old for p, old in zip(keys[:filled], before, strict=False))


def test_a_gradient_of_another_shape_than_its_parameter_has_now() -> None:
    p, q = torch.zeros(2), torch.zeros(2)
    g = Grads(Params([p, q]), [torch.ones(2), torch.ones(2)])
    g.assign_()
    p.data = torch.zeros(3)
    with pytest.raises(ValueError, match="shape and device"):
        g.accumulate_()
    assert q.grad is not None
    assert q.grad.tolist() == [1, 1]


@pytest.mark.parametrize("filled", [True, False])
def test_a_weight_too_large_for_half_precision(filled: bool) -> None:
    a, h = torch.ones(2), torch.ones(2, dtype=torch.float16)
    g = Grads(Params([a, h]), [torch.ones(2), torch.full((2,), 0.5).half()])
    if filled:
        a.grad, h.grad = torch.ones(2), torch.ones(2).half()
    g.accumulate_(65536.0)
    assert a.grad is not None
    assert h.grad is not None
    assert a.grad.tolist() == [65536.0 + filled] * 2
    assert h.grad.tolist() == [32768.0] * 2
    assert h.grad.dtype is torch.float16


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_value_in_a_form_that_no_gradient_has_is_refused_before_any_is_assigned() -> None:
    a, b = torch.zeros(2), torch.zeros(2, 2)
    g = Grads(Params([a, b]), [torch.ones(2), torch.eye(2).to_sparse_csr()])
    for call in (g.assign_, g.accumulate_):
        with pytest.raises(ValueError, match="expected a dense value or one in COO form .*to_dense"):
            call()
    assert a.grad is None
