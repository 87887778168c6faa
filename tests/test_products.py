"""Chunks of products: the seeds' memory is used again, unless somebody has kept it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchzygote import _engine, diaghessian, forwarddiff, gradient, hessian, hook, jacobian, pullback
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
def test_a_pullback_may_give_back_the_seeds(f) -> None:
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


def shifted(g: Tensor) -> Tensor:
    return g.copy_(g.roll(1, -1))


class Shift(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.roll(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return shifted(g)


def registered(x: Tensor) -> Tensor:
    y = x * 2
    y.register_hook(shifted)
    return y


def by_numpy(g: Tensor) -> Tensor:
    whole = g.numpy()
    whole[:] = np.roll(whole, 1, -1)
    return g


WRITERS: dict[str, Callable[[Tensor], Tensor]] = {
    "hook": lambda x: hook(shifted, x * 2),
    "hook that writes by NumPy": lambda x: hook(by_numpy, x * 2),
    "custom function": lambda x: Shift.apply(x * 2),
    "tensor hook": registered,
}


@pytest.mark.parametrize("chunk_size", [1, 7, 20])
@pytest.mark.parametrize("name", WRITERS)
def test_who_writes_into_cotangents_changes_no_other_chunk(name: str, chunk_size: int) -> None:
    (J,) = jacobian(WRITERS[name], torch.randn(20), chunk_size=chunk_size, mode="reverse")
    assert torch.equal(J, 2 * torch.eye(20).roll(1, 1))


@pytest.mark.parametrize("size", [50, 6000])
def test_a_hook_may_write_whatever_the_size(size: int) -> None:
    (J,) = jacobian(lambda x: hook(lambda g: g.mul_(2), x * 1), torch.randn(size))
    assert torch.equal(J.diagonal(), torch.full((size,), 2.0))


NESTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jacobian": lambda x, s: jacobian(lambda x: (x * s).sin(), x, chunk_size=7)[0].sum(),
    "forward": lambda x, s: jacobian(lambda x: (x * s).sin(), x, chunk_size=7, mode="forward")[0].sum(),
    "hessian": lambda x, s: hessian(lambda x: (x * s).sin().sum(), x, chunk_size=7).sum(),
    "diaghessian": lambda x, s: diaghessian(lambda x: (x * s).sin().sum(), x, chunk_size=7)[0].sum(),
    "forwarddiff": lambda x, s: forwarddiff(torch.sin, x * s, chunk_threshold=7).sum(),
}
VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "jacobian": lambda x, s: (s * (x * s).cos()).sum(),
    "forward": lambda x, s: (s * (x * s).cos()).sum(),
    "hessian": lambda x, s: -(s * s * (x * s).sin()).sum(),
    "diaghessian": lambda x, s: -(s * s * (x * s).sin()).sum(),
    "forwarddiff": lambda x, s: (x * s).sin().sum(),
}


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.func.jacrev, gradient])
@pytest.mark.parametrize("name", NESTED)
def test_chunks_inside_a_derivative(name: str, transform: Any) -> None:
    x, s = torch.linspace(-1, 1, 20, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64)
    if transform is gradient:
        (found,) = gradient(lambda s: NESTED[name](x, s), s)
    else:
        found = transform(lambda s: NESTED[name](x, s))(s)
    torch.testing.assert_close(found, torch.func.grad(lambda s: VALUES[name](x, s))(s))


def test_chunks_in_inference_mode() -> None:
    x = torch.randn(20)
    with torch.inference_mode():
        (J,) = jacobian(lambda x: x.sin(), x, chunk_size=7, mode="reverse")
    torch.testing.assert_close(J, torch.diag(x.cos()))


def test_rows_record_no_further_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bool] = []
    pull_back = _engine.pulled

    def noting(roots: Any, seeds: Any, inputs: Any, retain: bool, create_graph: bool, *rest: Any) -> Any:
        recorded.append(create_graph)
        return pull_back(roots, seeds, inputs, retain, create_graph, *rest)

    monkeypatch.setattr(_engine, "pulled", noting)
    x = torch.randn(50)
    jacobian(lambda x: x.sin() * x.sum(), x, chunk_size=20, mode="reverse")
    assert recorded == [False] * 3
    recorded.clear()
    hessian(lambda x: x.sin().sum() ** 2, x, chunk_size=20)
    assert recorded == [True] + [False] * 3  # the gradient, and its rows
