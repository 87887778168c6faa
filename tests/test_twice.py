"""Second derivatives that PyTorch gets wrong, silently: right by another formula, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
]
FUSED = torch._weight_norm
G = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
WAYS: dict[str, Callable[..., Any]] = {
    "hessian": hessian,
    "hessian_dual": hessian_dual,
    "hessian_reverse": hessian_reverse,
    "sparse": lambda f, x: hessian(f, x, sparse=True).to_dense(),
    "plan": lambda f, x: plan_hessian(f, x)(x, dense=True),
    "jacobian of gradient": lambda f, x: jacobian(lambda z: gradient(f, z)[0], x)[0],
    "the same, forward": lambda f, x: jacobian(lambda z: gradient(f, z)[0], x, mode="forward")[0],
    "vmap": lambda f, x: torch.func.vmap(lambda z: hessian(f, z))(x.unsqueeze(0))[0],
    "vmap, forward": lambda f, x: torch.func.vmap(lambda z: hessian_dual(f, z))(x.unsqueeze(0))[0],
    "jacrev": lambda f, x: torch.func.jacrev(lambda z: gradient(f, z)[0])(x).reshape(6, 6),
    "create_graph": lambda f, x: graph_of_gradient(f, x),
}
COMPILED = ["hessian", "hessian_dual", "jacobian of gradient", "the same, forward"]
IJ = torch.tensor([[0, 1, 1], [0, 2, 1]])


def graph_of_gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    grad = gradient(f, x, create_graph=True)[0].reshape(-1)
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0] for g in grad]
    return torch.stack(rows).reshape(6, 6)


def normed(v: Tensor) -> Tensor:
    return torch._weight_norm(v, G, 0).pow(3).sum()


def written_out(v: Tensor) -> Tensor:
    return (v * (G / v.pow(2).sum(1, keepdim=True).sqrt())).pow(3).sum()


def by_kernel(v: Tensor) -> Tensor:
    return torch._weight_norm_interface(v, G, 0)[0].pow(3).sum()


def sparse(v: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(IJ, v, (3, 3)).to_dense().pow(3).sum()


def of_product(v: Tensor) -> Tensor:
    return (torch.sparse_coo_tensor(IJ, v, (3, 3)) @ IJ.T.to(v.dtype)).pow(3).sum()


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1]], dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
def test_weight_norm(way: str, x: Tensor) -> None:
    expected = torch.autograd.functional.hessian(written_out, x).reshape(6, 6)
    torch.testing.assert_close(WAYS[way](normed, x), expected)
    assert torch._weight_norm is FUSED


@pytest.mark.parametrize("way", COMPILED)
def test_weight_norm_compiled(way: str, x: Tensor) -> None:
    expected = torch.autograd.functional.hessian(written_out, x).reshape(6, 6)
    compiled = torch.compile(lambda z: WAYS[way](normed, z), backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
        assert torch._weight_norm is FUSED


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_modules_with_weight_norm(make: Callable[..., nn.Module], dim: int | None) -> None:
    torch.manual_seed(0)
    layer = make(nn.Linear(3, 2).double(), dim=dim)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    loss = lambda: layer(inputs).pow(3).sum()
    params = list(layer.parameters())
    found = diaghessian(loss, Params(params))
    for p in params:
        slopes = torch.zeros_like(p)
        for i in range(p.numel()):
            for sign in (1, -1):
                p.data.view(-1)[i] += sign * 1e-5
                slopes.view(-1)[i] += sign / 2e-5 * gradient(loss, Params([p]))[p].reshape(-1)[i]
                p.data.view(-1)[i] -= sign * 1e-5
        torch.testing.assert_close(found[p], slopes, rtol=1e-6, atol=1e-6)


def test_weight_norm_is_put_back(x: Tensor) -> None:
    def fails(v: Tensor) -> Tensor:
        assert torch._weight_norm is not FUSED
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        hessian(fails, x)
    assert torch._weight_norm is FUSED
    inner: list[bool] = []

    def f(v: Tensor) -> Tensor:
        hessian(normed, x)
        inner.append(torch._weight_norm is FUSED)
        return normed(v)

    hessian(f, x)
    gradient(f, x)
    assert inner == [False, True]


@pytest.mark.parametrize("way", [way for way in WAYS if "forward" not in way and "dual" not in way])
def test_the_fused_kernel_itself_is_refused(way: str, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="can't be differentiated twice.*_weight_norm's fused kernel"):
        WAYS[way](by_kernel, x)


def test_what_the_fused_kernel_has_right_is_given(x: Tensor) -> None:
    torch.testing.assert_close(gradient(by_kernel, x), gradient(written_out, x))
    of_g = lambda g: torch._weight_norm_interface(x, g, 0)[0].pow(3).sum()
    same = lambda g: (x * (g / x.pow(2).sum(1, keepdim=True).sqrt())).pow(3).sum()
    torch.testing.assert_close(hessian(of_g, G), torch.autograd.functional.hessian(same, G).reshape(2, 2))


def test_a_weight_normed_beforehand_is_refused(x: Tensor) -> None:
    v = x.clone().requires_grad_()
    weight = torch._weight_norm(v, G, 0)
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        diaghessian(lambda: weight.pow(3).sum(), Params([v]))


@pytest.mark.parametrize("way", ["hessian", "hessian_reverse", "jacobian of gradient", "jacrev"])
@pytest.mark.parametrize("f", [sparse, of_product])
def test_values_of_a_sparse_tensor(f: Callable[[Tensor], Tensor], way: str, x: Tensor) -> None:
    torch.testing.assert_close(gradient(sparse, x[0])[0], 3 * x[0] ** 2)
    with pytest.raises(RuntimeError, match=r"twice.*values of torch.sparse_coo_tensor is zero"):
        WAYS[way](f, x[0])


def test_a_constant_sparse_tensor_is_no_hindrance(x: Tensor) -> None:
    matrix = torch.sparse_coo_tensor(IJ, x[0].clone().requires_grad_(), (3, 3))
    dense = matrix.detach().to_dense()
    found = hessian(lambda z: (matrix @ z.T).pow(3).sum(), x)
    expected = torch.autograd.functional.hessian(lambda z: (dense @ z.T).pow(3).sum(), x)
    torch.testing.assert_close(found.detach(), expected.reshape(6, 6))
