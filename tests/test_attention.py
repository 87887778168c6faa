"""Attention by its formula: whatever kernels ``f`` allows, and with dropout under ``vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import flash_sdp_enabled, math_sdp_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    jacobian,
    plan_hessian,
    pushforward,
)
from torchzygote._torch_private.attention import _written_attention

torch.manual_seed(0)
Q = torch.randn(1, 2, 5, 4, dtype=torch.float64)
KERNELS = {
    "one": [SDPBackend.FLASH_ATTENTION],
    "two": [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH],
}


def plain(x: Tensor) -> Tensor:
    return (x @ x.transpose(-2, -1) / 2).softmax(-1) @ x


TAKEN: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "hessian": lambda f: hessian(lambda x: f(x).square().sum(), Q),
    "hessian_dual": lambda f: hessian_dual(lambda x: f(x).square().sum(), Q),
    "diaghessian": lambda f: diaghessian(lambda x: f(x).square().sum(), Q)[0],
    "plan_hessian": lambda f: plan_hessian(lambda x: f(x).square().sum(), Q)(Q).to_dense(),
    "pushforward": lambda f: pushforward(f, Q)(Q.cos()),
    "jacobian": lambda f: jacobian(f, Q, mode="forward")[0],
    "jacobian by Params": lambda f: jacobian(lambda: f(Q), Params([Q]), mode="forward")[Q],
    "a gradient of a gradient": lambda f: gradient(
        lambda x: gradient(lambda t: f(t).square().sum(), x)[0].sin().sum(), Q
    )[0],
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", TAKEN)
def test_kernels_that_f_allows_itself_are_not_taken(name: str, kernels: str) -> None:
    def f(x: Tensor) -> Tensor:
        with sdpa_kernel(KERNELS[kernels]):
            return F.scaled_dot_product_attention(x, x, x)

    torch.testing.assert_close(TAKEN[name](f), TAKEN[name](plain))
    assert flash_sdp_enabled()
    assert math_sdp_enabled()


SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scale": {"scale": 0.3},
    "causal": {"is_causal": True},
    "mask": {"attn_mask": torch.rand(5, 5) > 0.4},
    "a query without keys": {"attn_mask": torch.arange(5)[:, None] > torch.arange(5)},
    "added": {"attn_mask": torch.randn(2, 5, 5, dtype=torch.float64)},
    "groups": {"enable_gqa": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_formula_is_that_of_the_operator(setting: str) -> None:
    given = {"attn_mask": None, "is_causal": False, "scale": None, "enable_gqa": False, **SETTINGS[setting]}
    q, k, v = (torch.randn(3, 4, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    if setting == "groups":
        k, v = (x.detach()[:, :2].clone().requires_grad_() for x in (k, v))
    mask = given["attn_mask"]
    if mask is not None and mask.dim() == 3:
        given["attn_mask"] = mask.repeat(2, 1, 1)
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, k, v, **given)
    found = _written_attention(
        q, k, v, given["attn_mask"], 0.0, given["is_causal"], given["scale"], given["enable_gqa"]
    )
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        torch.autograd.grad(found.sin().sum(), (q, k, v)),
        torch.autograd.grad(expected.sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_half_precision_does_not_overflow_where_the_operator_does_not() -> None:
    q = torch.full((1, 1, 2, 64), 60.0).half()
    q[0, 0, 0] *= -1
    with sdpa_kernel(SDPBackend.MATH):
        expected = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(_written_attention(q, q, q, None, 0.0, False, None, False), expected)
    negative = _written_attention(Q, Q, Q, None, 0.0, False, -0.5, False)
    torch.testing.assert_close(negative, (Q @ Q.mT * -0.5).softmax(-1) @ Q)


def test_dropout_in_forward_mode_under_vmap() -> None:
    """PyTorch's own formula ends the process there (2.13)."""
    f = lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.25)
    x = torch.randn(3, 1, 2, 4, 3, dtype=torch.float64)
    mapped = lambda g: torch.func.vmap(g, randomness="same")
    torch.manual_seed(1)
    pushed = mapped(lambda x: jacobian(f, x, mode="forward")[0])(x)
    torch.manual_seed(1)
    y = mapped(lambda x: pushforward(f, x)(x))(x)
    torch.testing.assert_close(y.reshape(3, -1), (pushed @ x.reshape(3, -1, 1)).squeeze(-1))
    assert bool((pushed == 0).any())
    dense = mapped(lambda x: hessian_dual(lambda t: f(t).square().sum(), x))(x)
    torch.testing.assert_close(dense, dense.mT)


def test_attention_layers_with_dropout_under_vmap() -> None:
    layer = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True).double()
    f = lambda x: layer(x, x, x, need_weights=False)[0]
    x = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    found = torch.func.vmap(lambda x: jacobian(f, x)[0], randomness="same")(x)
    assert found.shape == (2, 24, 24)
    assert bool(found.isfinite().all())
