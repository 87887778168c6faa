"""Budgets of detection end it with dense, and its cost grows in proportion."""

from __future__ import annotations

import time

import pytest
import torch
from detection import detect_hessian, detect_jacobian
from oracles import func_hessian
from sparse_cases import brusselator
from torch import Tensor

from torchzygote import native


def test_a_budget_ends_detection_with_dense() -> None:
    x = torch.rand(100)
    assert detect_jacobian(brusselator(5), [torch.rand(50)], budget=100)[0].dense
    assert detect_hessian(lambda x: x[1:].sum() ** 2, [x], budget=5000)[0].dense
    assert detect_hessian(lambda x: x.sum() ** 2, [x], budget=20000)[0].nnz == 10000
    assert detect_jacobian(lambda x: x.cumsum(0), [x], budget=1000)[0].dense
    assert detect_jacobian(lambda x: x * 2, [x], budget=1000)[0].nnz == 100


def test_a_long_sum_costs_no_set() -> None:
    x = torch.rand(20000)
    (pattern,) = detect_hessian(lambda x: (x**2).sum() * 0.5 + x.mean(), [x], budget=100_000)
    assert pattern.nnz == 20000


def test_couplings_within_larger_ones_cost_nothing() -> None:
    """Every step couples what the next one couples again: only the last couplings are written out."""

    def heat(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) + 0.01 * x**3
        return x.square().sum()

    x = torch.rand(100)
    (pattern,) = detect_hessian(heat, [x], budget=100 * 81**2)
    assert pattern.nnz == 100 * 81


@pytest.mark.skipif(not native.info()["devices"], reason="the plain way holds all couplings at once")
def test_couplings_that_overlap_take_the_memory_of_what_they_give() -> None:
    """Those of a time step and of the next are part of no single larger one: read often, held once."""

    def burgers(u: Tensor) -> Tensor:
        for _ in range(40):
            ahead, behind = u.roll(-1), u.roll(1)
            u = u - 0.1 * u * (ahead - behind) + 0.1 * (behind - 2 * u + ahead)
        return u.square().sum()

    n, u = 200, torch.rand(200, dtype=torch.float64)
    (pattern,) = detect_hessian(burgers, [u], budget=4_000_000)
    apart = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    assert torch.equal(pattern.to_dense(), torch.minimum(apart, n - apart) <= 80)
    assert not ((func_hessian(burgers, u) != 0) & ~pattern.to_dense()).any()


def test_elements_that_meet_a_large_set_that_contains_them_cost_little() -> None:
    def seconds(n: int) -> float:
        start = time.process_time()
        (pattern,) = detect_jacobian(lambda x: (x / x.norm())[:2], [torch.rand(n)])
        assert pattern.nnz == 2 * n
        return time.process_time() - start

    seconds(1000)
    # Thirty-two times the size, which was a thousand times the work.
    assert seconds(320_000) < 100 * max(seconds(10_000), 2e-3)


def test_cost_grows_in_proportion() -> None:
    def seconds(n: int) -> float:
        x = torch.rand(2 * n * n)
        detect_jacobian(brusselator(n), [x])
        start = time.process_time()
        detect_jacobian(brusselator(n), [x])
        return time.process_time() - start

    # Sixteen times the size; the bound is loose, since machines are busy.
    assert seconds(128) < 60 * max(seconds(32), 2e-3)
