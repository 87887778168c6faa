"""What a user may write, checked with ``mypy --strict`` by ``test_typing.py``; never run."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

import torchzygote
from torchzygote import (
    Buffer,
    DroppedGradientWarning,
    GradDict,
    Grads,
    HessianPlan,
    JacobianPlan,
    Params,
    WithGradient,
    WithHessian,
    WithJacobian,
    checkpointed,
    copy_,
    diaghessian,
    eager_update,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hessian_sparsity,
    hook,
    ignore_derivatives,
    isderiving,
    jacobian,
    jacobian_sparsity,
    plan_hessian,
    plan_jacobian,
    pullback,
    pushforward,
    set_memory_budget,
    showgrad,
    withgradient,
    withhessian,
    withjacobian,
)


def loss(x: Tensor) -> Tensor:
    return (x**2).sum()


def first_order(x: Tensor, model: nn.Module) -> None:
    (g,) = gradient(loss, x)
    total: Tensor = g + 1
    gradient(loss, np.ones(3), argnums=0, create_graph=True)
    result: WithGradient = withgradient(loss, x)
    val, grad = result
    y, back = pullback(loss, x)
    back(torch.ones(()))
    pushforward(loss, x)(x)
    J = jacobian(loss, x, mode="reverse", chunk_size=10, progress=False, sparse=False)[0]
    matrices: WithJacobian = withjacobian(loss, x)
    print(total, val, grad, y, J, matrices.val, matrices.grad)


def second_order(x: Tensor) -> Tensor:
    H: Tensor = hessian(loss, x, mode="auto")
    H = H + hessian_dual(loss, x) + hessian_reverse(loss, x)
    found: WithHessian = withhessian(loss, x)
    (d,) = diaghessian(loss, x)
    product: Tensor = H @ found.grad + d + found.hess.diagonal()
    return product


def implicit(model: nn.Module) -> Tensor:
    ps: Params = Params(model)
    ps = ps | Params([torch.ones(2)])
    grads = gradient(lambda: loss(ps[0]), ps)
    assert isinstance(grads, Grads)
    twice: Grads = grads + grads
    twice = 2 * twice / 3
    twice += grads
    norm: Tensor = twice.clip_norm_(1.0)
    twice.assign_()
    for p, g in twice.items():
        print(p.shape, g)
    flat: Tensor = twice.to_vector()
    copy_(flat, twice)
    plain: GradDict = GradDict({ps[0]: torch.ones(())})
    print(plain.map(torch.abs), len(ps), ps[0:2])
    with eager_update(lambda p, g: None, model) as handle:
        print(handle)
    return norm


def utilities(x: Tensor) -> Tensor:
    x = hook(lambda g: -g, x)
    x = showgrad(x, "x")
    x = ignore_derivatives(x)
    x = ignore_derivatives(lambda: torch.ones(3))
    x = checkpointed(torch.sin, x)
    warnings.simplefilter("ignore", DroppedGradientWarning)
    x = forwarddiff(torch.sin, x)
    buf = Buffer(x, 3)
    buf[0] = x[0]
    buf[1] += 1.0
    frozen: Tensor = buf.copy()
    deriving: bool = isderiving()
    set_memory_budget(1 << 20)
    return frozen if deriving else buf[0]


def sparse(x: Tensor) -> Tensor:
    plan: JacobianPlan = plan_jacobian(torch.sin, x)
    second: HessianPlan = plan_hessian(loss, x)
    count: int = plan.ncolors
    pattern = jacobian_sparsity(torch.sin, x)[0]
    assert pattern is not None
    print(count, pattern, hessian_sparsity(loss, x), plan(x), second(x))
    version: str = torchzygote.__version__
    print(version)
    return pattern
