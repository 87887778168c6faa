"""Chunks of products: the seeds' memory is used again, unless somebody has kept it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from torchzygote import gradient, hessian, hook, jacobian, pullback
from torchzygote._products import identity_seeds

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize(
    "chunks", [[(0, 10)], [(0, 4), (4, 8), (8, 10)], [(0, 1), (1, 2), (7, 8)], [(6, 8), (0, 3)]]
)
def test_identity_seeds_are_rows_of_the_identity(chunks: list[tuple[int, int]], dtype: torch.dtype) -> None:
    seeds = identity_seeds(10, dtype, CPU)
    for lo, hi in chunks:
        assert torch.equal(seeds(lo, hi), torch.eye(10, dtype=dtype)[lo:hi])


def test_memory_is_used_again_unless_it_was_kept() -> None:
    seeds = identity_seeds(1000, torch.float32, CPU)
    first = seeds(0, 100).data_ptr()
    kept = seeds(100, 200)
    assert kept.data_ptr() == first
    row = kept[3]
    other = seeds(200, 300)
    assert other.data_ptr() != first
    assert torch.equal(row, torch.eye(1000)[103])


def test_a_hook_may_keep_the_rows_it_sees() -> None:
    kept: list[Tensor] = []
    jacobian(lambda x: hook(kept.append, x), torch.randn(50), chunk_size=7, mode="reverse")
    assert torch.equal(torch.cat(kept), torch.eye(50))


@pytest.mark.parametrize("f", [lambda x: x * 1, lambda x: x, lambda x: x.view(10, 5).t(), lambda x: x.sin()])
def test_a_pullback_may_give_back_the_seeds(f) -> None:  # type: ignore[no-untyped-def]
    x = torch.randn(50, dtype=torch.float64)
    y, _ = pullback(f, x)
    expected = torch.func.jacrev(f)(x).reshape(y.numel(), 50)
    torch.testing.assert_close(jacobian(f, x, chunk_size=7, mode="reverse")[0], expected)
    torch.testing.assert_close(jacobian(f, x, chunk_size=7, mode="forward")[0], expected)


def test_a_graph_keeps_the_seeds_that_it_needs() -> None:
    x = torch.rand(20, dtype=torch.float64)
    for f in (lambda x: (x**4).sum(), lambda x: (x.sum() * x).prod()):
        loss = lambda x, f=f: hessian(f, x, chunk_size=3).square().sum()
        expected = torch.func.grad(lambda x, f=f: torch.func.hessian(f)(x).square().sum())(x)
        torch.testing.assert_close(gradient(loss, x)[0], expected)
