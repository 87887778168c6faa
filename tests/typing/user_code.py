"""What a user may write, checked with ``mypy --strict`` by ``test_typing.py``; never run."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

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
    assert_type(grads, Grads)
    assert_type(jacobian(lambda: ps[0] ** 2, ps, mode="reverse"), Grads)
    assert_type(diaghessian(lambda: loss(ps[0]), ps), Grads)
    assert_type(jacobian_sparsity(lambda: ps[0] ** 2, ps), Grads)
    assert_type(pullback(lambda: loss(ps[0]), ps)[1](1.0), Grads)
    assert_type(plan_jacobian(lambda: ps[0] ** 2, ps)(ps), Grads)
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


def explicit(x: Tensor, anything: Any, several: list[Tensor]) -> None:
    assert_type(gradient(loss, x), tuple[Any, ...])
    assert_type(gradient(loss, 2.0, argnums=0), tuple[Any, ...])
    assert_type(pullback(loss, x)[1](1.0), tuple[Any, ...])
    assert_type(jacobian(torch.sin, x, sparse=True), tuple[Any, ...])
    assert_type(diaghessian(loss, *several), tuple[Any, ...])
    assert_type(jacobian_sparsity(torch.sin, x), tuple[Tensor | None, ...])
    assert_type(plan_jacobian(torch.sin, x)(x, dense=True), tuple[Any, ...])
    assert_type(gradient(loss, anything), Any)
    # What a lambda without annotations takes fits every type: the results may be used in either way.
    print(torch.func.vmap(lambda a: gradient(loss, a)[0])(x))
    print(gradient(lambda x: jacobian(torch.sin, x)[0].sum() + diaghessian(loss, x)[0].sum(), x)[0] + 1)
    print((lambda ps: gradient(loss, ps).norm())(Params([x])))
    print((lambda ps: pullback(loss, ps)[1](1.0).norm())(Params([x])))


def utilities(x: Tensor, layer: nn.Linear) -> Tensor:
    x = assert_type(hook(lambda g: -g, x), Tensor)
    assert_type(hook(lambda g: -g, layer.weight), Tensor)
    pair = hook(lambda g: None, {"a": x, "b": [x]})
    x = showgrad(pair["a"], "a") + pair["b"][0]
    x = assert_type(showgrad(x, "x"), Tensor)
    x = assert_type(ignore_derivatives(x), Tensor)
    x = assert_type(ignore_derivatives(lambda: torch.ones(3)), Tensor)
    a, b = ignore_derivatives([x, 1])
    x = assert_type(checkpointed(torch.sin, x), Tensor)
    x = a * b * checkpointed(lambda x, *, scale: torch.sin(x) * scale, x, scale=2)
    x = checkpointed(torch.max, x, 0).values + checkpointed(layer, x)
    warnings.simplefilter("ignore", DroppedGradientWarning)
    x = assert_type(forwarddiff(torch.sin, x), Tensor)
    assert_type(forwarddiff(loss, 2.0), Tensor)
    buf = Buffer(x, 3)
    buf[0] = x[0]
    buf[1] += 1.0
    frozen: Tensor = buf.copy()
    assert_type(buf.size(), torch.Size)
    assert_type(buf.size(0), int)
    deriving: bool = isderiving()
    set_memory_budget(1 << 20)
    return frozen if deriving else buf[0]


def sparse(x: Tensor) -> Tensor:
    plan: JacobianPlan = plan_jacobian(torch.sin, x)
    second: HessianPlan = plan_hessian(loss, x)
    assert_type(plan.compile(), JacobianPlan)
    assert_type(second.compile(mode="max-autotune"), HessianPlan)
    count: int = plan.ncolors
    pattern = jacobian_sparsity(torch.sin, x)[0]
    assert pattern is not None
    print(count, pattern, hessian_sparsity(loss, x), plan(x), second(x))
    version: str = torchzygote.__version__
    print(version)
    return pattern
