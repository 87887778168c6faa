"""Operations whose recorded pullback is taken for any other: the same formulas, linear, batched rightly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torchzygote import jacobian
from torchzygote._torch_private import node_name, survey, telling, vmap_flat

A = torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6).cos()
INDEX = torch.tensor([2, 0, 2])

# Of a vector of 6 numbers between 0 and 1; between them, all kinds are met.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": lambda x: (x - 0.5).abs(),
    "add": lambda x: x + x[:1] + 1,
    "addmm": lambda x: torch.addmm(x, A, A.t() @ A * x),
    "addmv": lambda x: torch.addmv(x[:4], A, x),
    "alias": torch.ops.aten.alias,
    "asin": torch.asin,
    "atan": torch.atan,
    "baddbmm": lambda x: torch.baddbmm(x.view(1, 2, 3), x.view(1, 2, 3), (A[:3, :3] * x[:3])[None]),
    "bmm": lambda x: torch.bmm(x.view(1, 2, 3), x.view(1, 3, 2)),
    "cat": lambda x: torch.cat([x, x[:2]]),
    "clone": torch.clone,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "cumsum": lambda x: x.cumsum(0),
    "diagonal": lambda x: x.view(2, 3).diagonal(),
    "div": lambda x: x / x.flip(0) / 2,
    "dot": lambda x: torch.dot(x, x + 1),
    "erf": torch.erf,
    "exp": torch.exp,
    "expand": lambda x: x.view(6, 1).expand(6, 2),
    "expm1": torch.expm1,
    "index": lambda x: x[INDEX],
    "index_select": lambda x: x.index_select(0, INDEX),
    "leaky_relu": lambda x: F.leaky_relu(x - 0.5),
    "log": torch.log,
    "log1p": torch.log1p,
    "log_softmax": lambda x: x.log_softmax(0),
    "logsumexp": lambda x: x.view(2, 3).logsumexp(1),
    "mean": lambda x: x.view(2, 3).mean(1) * x.mean(),
    "mm": lambda x: x.view(2, 3) @ x.view(3, 2),
    "mv": lambda x: A @ x,
    "neg": torch.neg,
    "permute": lambda x: x.view(1, 2, 3).permute(2, 0, 1),
    "pow": lambda x: x**2.5,
    "product with a number": lambda x: torch.mul(x, 2.0) * x,
    "reciprocal": torch.reciprocal,
    "relu": lambda x: (x - 0.5).relu(),
    "reshape_alias": lambda x: torch.ops.aten._reshape_alias(x, (2, 3), (3, 1)),
    "repeat": lambda x: x.repeat(2, 2),
    "roll": lambda x: x.roll(2),
    "rsqrt": torch.rsqrt,
    "rsub": lambda x: torch.rsub(x, x.sin()) * torch.rsub(x, 2.0),
    "select": lambda x: x[0] * x[1],
    "sigmoid": torch.sigmoid,
    "sinh": torch.sinh,
    "softmax": lambda x: x.softmax(0),
    "softplus": F.softplus,
    "split": lambda x: torch.mul(*x.split(3)),
    "sqrt": torch.sqrt,
    "squeeze": lambda x: x.view(1, 6).squeeze() + x.view(6, 1).squeeze(1),
    "stack": lambda x: torch.stack([x, x.sin()]),
    "sub": lambda x: x - x.flip(0) - 1,
    "sum": lambda x: x.view(2, 3).sum(1) * x.sum(),
    "t": lambda x: x.view(2, 3).t(),
    "tan": torch.tan,
    "tanh": torch.tanh,
    "to another dtype": lambda x: x.float(),
    "transpose": lambda x: x.view(2, 3).transpose(0, 1),
    "unbind": lambda x: torch.mul(*x.view(2, 3).unbind()),
    "unsafe_view": lambda x: x.view(1, 2, 3) @ A[:3, :3],
    "unsqueeze": lambda x: x.unsqueeze(1),
    "where": lambda x: torch.where(x > 0.5, x, x.sin()),
}


def recorded(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """A point, and what ``f`` gives there."""
    x = torch.linspace(0.1, 0.9, 6, dtype=torch.float64).requires_grad_()
    return x, f(x)


def kinds(node: Any, seen: set[Any]) -> set[str]:
    if node is None or node in seen:
        return set()
    seen.add(node)
    return {node_name(node)}.union(*(kinds(following, seen) for following, _ in node.next_functions))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_recorded_pullback_is_as_any_other(name: str) -> None:
    x, y = recorded(FUNCTIONS[name])
    assert survey([y]).elementary
    u = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).sin().view(y.shape).requires_grad_()
    (plain,) = torch.autograd.grad(y, x, u.detach(), retain_graph=True)
    (g,) = torch.autograd.grad(y, x, u, create_graph=True)
    assert torch.equal(g, plain)
    told = survey([g])
    assert told.misbatched is None
    assert not told.looped
    assert told.custom == []
    one = lambda row: [torch.autograd.grad(g, u, row, retain_graph=True)[0]]
    rows = torch.eye(6, dtype=x.dtype)
    torch.testing.assert_close(vmap_flat(one, rows)[0], torch.stack([one(row)[0] for row in rows]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_without_a_check(name: str) -> None:
    f, (x, _) = FUNCTIONS[name], recorded(FUNCTIONS[name])
    found = jacobian(f, x.detach(), mode="forward", verify=False)[0]
    torch.testing.assert_close(found, jacobian(f, x.detach(), mode="reverse")[0])


def test_all_kinds_are_met() -> None:
    met = set[str]().union(*(kinds(recorded(f)[1].grad_fn, set()) for f in FUNCTIONS.values()))
    assert telling._KINDS_ELEMENTARY - met == set()


OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another formula where it is recorded": F.silu,
    "selected by a mask on its way back": lambda x: (
        torch.zeros(8).double().masked_scatter(torch.ones(8) > 0, x.repeat(2))
    ),
    "norm": lambda x: F.layer_norm(x, (6,)),
    "written into": lambda x: x.clone().index_fill_(0, INDEX, 0.0),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not(name: str) -> None:
    assert not survey([recorded(OTHERS[name])[1]]).elementary
