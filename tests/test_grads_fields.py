"""What ``p.grad`` holds: the dtype that ``Tensor.grad_dtype`` asks for, and layouts; else nothing is set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import Grads, Params, gradient

THIRDS = torch.tensor([1.0, 2.0, 3.0]) / 3


def narrow(grad_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Grads]:
    """A parameter in bfloat16 with gradients in float32, and one in float32 before it."""
    v = torch.ones(2, requires_grad=True)
    w = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    w.grad_dtype = grad_dtype
    return v, w, Grads(Params([v, w]), [torch.ones(2), THIRDS.clone()])


def test_a_gradient_has_the_dtype_that_was_asked_for() -> None:
    w = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    w.grad_dtype = torch.float32
    g = gradient(lambda: (w.float() * torch.tensor([1.0, 2.0, 3.0])).sum(), Params([w])) / 3
    g.assign_()
    torch.testing.assert_close(w.grad, THIRDS)
    g.accumulate_()
    torch.testing.assert_close(w.grad, 2 * THIRDS)


@pytest.mark.parametrize("grad_dtype", [torch.float32, None])
def test_wide_gradients_of_narrow_parameters_keep_their_digits(grad_dtype: torch.dtype | None) -> None:
    v, w, g = narrow(grad_dtype)
    for share in (False, True):
        v.grad = w.grad = None
        g.assign_(share=share)
        assert (w.grad is g[w]) is share
        torch.testing.assert_close(w.grad, THIRDS)
        torch.testing.assert_close(v.grad, torch.ones(2))
    w.grad, v.grad = torch.zeros(3), None
    g.accumulate_(2.0)
    torch.testing.assert_close(w.grad, 2 * THIRDS)
    torch.testing.assert_close(v.grad, 2 * torch.ones(2))
    w.grad = None
    g.accumulate_(0.5)
    torch.testing.assert_close(w.grad, THIRDS / 2)


def test_gradients_of_the_parameters_dtype_become_what_was_asked_for() -> None:
    v, w, g = narrow(torch.float32)
    g[w] = THIRDS.bfloat16()
    g.assign_()
    torch.testing.assert_close(w.grad, THIRDS.bfloat16().float(), rtol=0, atol=0)
    by_hand = w.grad.clone().add_(g[w], alpha=3.0)
    g.accumulate_(3.0)
    torch.testing.assert_close(w.grad, by_hand, rtol=0, atol=0)
    v.grad = w.grad = None
    g.accumulate_(torch.tensor(2.0))
    torch.testing.assert_close(w.grad, 2 * THIRDS.bfloat16().float())
    w.grad_dtype = None  # any
    w.grad = None
    g.assign_()
    assert w.grad.dtype is torch.bfloat16


def test_a_narrower_gradient_is_rounded_where_that_was_asked_for() -> None:
    w = torch.ones(3, requires_grad=True)
    w.grad_dtype = torch.bfloat16
    for value in (THIRDS, THIRDS.double()):
        w.grad = None
        g = Grads(Params([w]), [value])
        g.assign_()
        assert torch.equal(w.grad, THIRDS.bfloat16())
        g.accumulate_()
        assert torch.equal(w.grad, 2 * THIRDS.bfloat16())


def test_any_dtype_accumulates_as_by_hand() -> None:
    big = 70000.0  # more than float16 holds
    for dtype, there in ((torch.float16, torch.float32), (torch.float64, torch.float32)):
        w = torch.ones(3, dtype=torch.float16, requires_grad=True)
        w.grad_dtype = None
        w.grad = torch.full((3,), 1.0, dtype=there)
        g = Grads(Params([w]), [THIRDS.to(dtype)])
        expected = w.grad.double() + big * g[w].double()
        g.accumulate_(big)
        assert w.grad.dtype is there
        torch.testing.assert_close(w.grad.double(), expected, rtol=1e-6, atol=0)
        w.grad.requires_grad_()  # recorded: not in place
        g.accumulate_()
        assert w.grad.dtype is there


def test_what_the_dtype_cannot_hold_is_refused_before_anything_is_set() -> None:
    v = torch.ones(2, requires_grad=True)
    w = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    w.grad_dtype = torch.float32
    g = Grads(Params([v, w]), [torch.ones(2), torch.ones(3, dtype=torch.complex64)])
    for act in (g.assign_, g.accumulate_):
        with pytest.raises(TypeError, match=r"real value for complex64 \(3,\), got complex64 \(3,\)"):
            act()
        assert v.grad is None
        assert w.grad is None
    whole = torch.ones(3, requires_grad=True)
    whole.grad_dtype = None
    whole.grad = torch.ones(3, dtype=torch.int64)
    g = Grads(Params([v, whole]), [torch.ones(2), torch.ones(3)])
    v.grad = torch.zeros(2)
    with pytest.raises(TypeError, match=r"accumulate_: expected a value of float32 \(3,\) that fits"):
        g.accumulate_()
    assert torch.equal(v.grad, torch.zeros(2))


def test_results_of_operations_have_no_grad_dtype() -> None:
    x = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    y = x * 1
    y.retain_grad()
    g = Grads(Params([y]), [THIRDS])
    g.assign_()
    assert torch.equal(y.grad, THIRDS.bfloat16())
    g.accumulate_()
    assert torch.equal(y.grad, 2 * THIRDS.bfloat16())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo])
def test_a_dense_gradient_of_a_sparse_parameter_is_refused_before_anything_is_set(layout: Any) -> None:
    v = torch.ones(2, requires_grad=True)
    m = torch.eye(3).to_sparse(layout=layout).requires_grad_()
    g = Grads(Params({"v": v, "m": m}), [torch.ones(2), torch.ones(3, 3)])
    for act in (g.assign_, g.accumulate_):
        with pytest.raises(ValueError, match=r"for m, got layout torch.strided; use .*to_sparse"):
            act()
        assert v.grad is None
        assert m.grad is None
    g[m] = torch.eye(3).to_sparse(layout=layout)
    g.assign_()
    g.accumulate_()
    torch.testing.assert_close(m.grad.to_dense(), 2 * torch.eye(3))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Sparse CSR tensor support")
def test_gradients_in_two_sparse_forms_are_refused_before_anything_is_set() -> None:
    v = torch.ones(2, requires_grad=True)
    m = torch.eye(3).to_sparse_csr().requires_grad_()
    v.grad, m.grad = torch.zeros(2), torch.eye(3).to_sparse()
    g = Grads(Params({"v": v, "m": m}), [torch.ones(2), torch.eye(3).to_sparse_csr()])
    with pytest.raises(ValueError, match=r"accumulate_: expected a value for m in the layout of its grad"):
        g.accumulate_()
    assert torch.equal(v.grad, torch.zeros(2))


def test_what_nothing_is_added_to_stays_as_it_is() -> None:
    """Though memory is shared with a gradient that something is added to."""
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    v, ten = torch.ones(2), torch.full((2,), 10.0)
    q.grad = v  # the value of another parameter, which has no gradient yet
    g = Grads(Params([p, q]), [v, ten])
    g.accumulate_()
    torch.testing.assert_close(g[p], torch.ones(2))
    torch.testing.assert_close(p.grad, torch.ones(2))
    torch.testing.assert_close(q.grad, torch.full((2,), 11.0))

    p, q = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(2, requires_grad=True)
    p.grad, q.grad = torch.zeros(2, dtype=torch.float64), v  # a value in another dtype than its gradient
    g = Grads(Params([p, q]), [v, ten])
    g.accumulate_()
    torch.testing.assert_close(g[p], torch.ones(2))

    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    p.grad = q.grad = torch.ones(2)  # of a parameter whose value is None
    Grads(Params([p, q]), [None, ten]).accumulate_()
    torch.testing.assert_close(p.grad, torch.ones(2))
    torch.testing.assert_close(q.grad, torch.full((2,), 11.0))


def test_a_factor_is_taken_in_the_dtype_of_the_gradient() -> None:
    p = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    p.grad_dtype = torch.float32
    Grads(Params([p]), [torch.tensor([1.0, 2.0]).half()]).accumulate_(1e5)  # beyond the largest half
    torch.testing.assert_close(p.grad, torch.tensor([1e5, 2e5]))
