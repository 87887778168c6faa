"""Derivatives of functions of tensors on several devices: as on the CPU, each beside its argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_cases import FIRST, arrays, beside, case, float64_numbers, places
from torch import Tensor, nn

from torchzygote import (
    Buffer,
    Params,
    checkpointed,
    copy_,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hook,
    jacobian,
    plan_hessian,
    plan_jacobian,
    pullback,
    pushforward,
    withgradient,
    withhessian,
    withjacobian,
)

MODES = ("auto", "forward", "reverse")


@places
def arguments_on_two_devices(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    f = lambda x, y: (x.to(b) * y).sin()
    z, back = pullback(f, x, y)
    found = [
        beside(gradient(lambda x, y: f(x, y).sum(), x, y), x, y),
        beside(withgradient(lambda x, y: f(x, y).exp().sum(), x, y).grad, x, y),
        beside(diaghessian(lambda x, y: f(x, y).exp().sum(), x, y), x, y),
        beside(back(z), x, y),
        pushforward(f, x, y)(x.cos(), y.cos()),
    ]
    for mode in MODES:
        for size in (None, 2):
            found.append(beside(jacobian(f, x, y, mode=mode, chunk_size=size), x, y))
        found.append(beside(jacobian(f, x, y, mode=mode, sparse=True), x, y))
    return found


@places
def values_elsewhere(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    f = lambda x: x.sin().to(b)
    energy = lambda x: (x.to(b)[1:] ** 3 * x[:-1].to(b) * y[1:]).sum()
    found: list[Any] = [beside(diaghessian(energy, x), x)]
    for mode in MODES:
        found.append(withjacobian(f, x, mode=mode))
        for sparse in (False, True):
            found.append(beside(jacobian(f, x, mode=mode, sparse=sparse), x))
            found.append(beside(jacobian(lambda x: torch.ones(2, device=b), x, mode=mode, sparse=sparse), x))
    found += [take(energy, x) for take in (hessian, hessian_reverse, withhessian)]
    found.append(hessian(energy, x, sparse=True))
    found.append(plan_hessian(energy, x)(x))
    return found


@places
def derivatives_inside_of_derivatives(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    inner = lambda x: gradient(lambda t: (t.to(b) ** 3 * y).sum(), x)[0]
    columns = lambda x: jacobian(lambda t: t.to(b) ** 2, x, mode="forward")[0].to(x.device).sum(0)
    return [
        gradient(lambda x: inner(x).square().sum(), x),
        jacobian(columns, x),
        hessian(lambda x: hessian(lambda t: (t.to(b) ** 4).sum(), x).sum(), x),
    ]


@places
def parameters(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    params = Params([x, y])
    f = lambda: (x.to(b) * y).sin()
    found = [
        gradient(lambda: f().sum(), params),
        diaghessian(lambda: f().sum(), params),
        jacobian(f, params),
        jacobian(f, params, mode="forward"),
        jacobian(f, params, sparse=True),
    ]
    for each in found:
        beside(each.values(), x, y)
    return found


@places
def layers_on_two_devices(a: str, b: str) -> Any:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    net[0].to(a)
    net[2].to(b)
    batch = torch.stack([arrays(a, a)[0] * i for i in range(1, 9)])
    f = lambda net: net[2](net[1](net[0](batch)).to(b))
    params = Params(net)
    return [
        gradient(lambda net: f(net).square().sum(), net)[0],
        gradient(lambda: f(net).square().sum(), params).named(),
        jacobian(lambda: f(net).square().sum(1), params, mode="reverse"),
        jacobian(lambda: f(net)[0], params, mode="forward"),
        diaghessian(lambda: f(net).square().sum(), params),
        params.to_vector(),
    ]


@places
def arithmetic_and_clipping(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    params = Params([x, y])
    g = gradient(lambda: (x.to(b) * y).sin().sum(), params)
    two = torch.tensor(2.0, dtype=torch.float64)
    h = g.copy()
    h += g
    h *= 3
    h /= two.to(a)
    h -= {x: x, y: y}
    found: list[Any] = [g * 2 + g - g / 3, g * two, g * two.to(b), h, (g**2).map(torch.sqrt), 3 / g, g**two]
    for kind in (2.0, 1.0, float("inf"), 3.0):
        clipped = g.copy()
        total = clipped.clip_norm_(0.1, kind, error_if_nonfinite=True)
        found += [g.norm(kind), g.clip_norm(0.1, kind), total, clipped]
    return [*found, g.clip_value(0.01), g.copy().clip_value_(-0.01, 0.02), g.nonfinite()]


@places
def vectors(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    params = Params([x, y])
    g = gradient(lambda: (x.to(b) * y).sin().sum(), params)
    flat = torch.zeros(12, dtype=torch.float64, device=b)
    copy_(flat, g)
    on_cpu = torch.zeros(12, dtype=torch.float64)
    copy_(on_cpu, params)
    found = [params.to_vector(), g.to_vector(), flat, on_cpu]
    copy_(g, flat * 2)
    copy_(params, on_cpu * 3)
    return [*found, g, x, y]


@places
def optimizers(a: str, b: str) -> Any:
    found = []
    for kind in (torch.optim.SGD, torch.optim.Adam):
        x, y = (w.requires_grad_() for w in arrays(a, b))
        optimizer = kind([x, y], lr=0.1)
        params = Params([x, y])
        loss = lambda: (x.to(b) * y).sin().sum()
        for _ in range(3):
            gradient(loss, params).assign_()
            optimizer.step()
        gradient(loss, params).accumulate_(0.5)
        found.append([x, y, x.grad, y.grad])
    return found


@places
def buffers(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    # masks and index tensors of the CPU's, and of the device's
    rows = torch.tensor([True, False, False, True])
    entry = torch.zeros(4, 6, dtype=torch.bool, device=a)
    entry[1, 3] = True

    def f(x: Tensor, y: Tensor) -> Tensor:
        buffer = Buffer(x, 4, 6)
        buffer[0] = x
        buffer[1, 2:] = y[2:]
        buffer[2] += x * 2
        buffer[torch.tensor([3, 3]), torch.tensor([0, 1])] = x[:2]
        buffer[rows] = x * 3
        buffer[torch.tensor([1], device=x.device), :2] = x[1:3] ** 2
        buffer[entry] = 2 * x[:1]
        buffer[2, 3] = 5.0
        buffer[2, 4] = y[0]
        picked = buffer[torch.tensor([1, 2])].sum() + buffer[entry].sum()
        return (buffer.copy() ** 2).sum() * picked

    by_x = lambda x: f(x, y)
    return [gradient(f, x, y), hessian(by_x, x), hessian_reverse(by_x, x), jacobian(by_x, x, mode="forward")]


@places
def hooks(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    seen: list[Tensor | None] = []

    def f(x: Tensor, y: Tensor) -> Tensor:
        x = hook(lambda g: (seen.append(g), g * 2)[1], x)
        x, y = hook(lambda g: (g[0] * 3, g[1]), (x, y))
        return ((x.to(b) * y).sin() ** 2).sum()

    def differentiating(g: Tensor) -> Tensor:
        slopes = gradient(lambda t: (t.to(b) ** 3).sum(), x)[0]
        return g * slopes * jacobian(lambda t: t.sin(), x, mode="forward")[0].sum(0)

    found = [gradient(f, x, y)]
    unused = lambda x: (hook(seen.append, x), x.sum())[1]
    gradient(unused, x)
    found.append(list(seen))
    by_x = lambda x: f(x, y)
    found += [hessian_reverse(by_x, x), diaghessian(by_x, x)]
    found.append(gradient(lambda x: hook(differentiating, x).sum(), x))
    return found


@places
def checkpoints(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    inner = lambda u: (u.to(b) * y).sin() ** 2
    f = lambda x, y: checkpointed(lambda x: checkpointed(inner, x * 2) + y, x).sum()
    by_x = lambda x: f(x, y)
    moved = lambda x: checkpointed(lambda x: x.sin().to(b), x)
    return [
        gradient(f, x, y),
        gradient(lambda: f(x, y), Params([x, y])),
        hessian(by_x, x),
        hessian_reverse(by_x, x),
        diaghessian(by_x, x),
        jacobian(moved, x, mode="reverse"),
        jacobian(moved, x, mode="forward"),
    ]


@places
def pushed_functions(a: str, b: str) -> Any:
    x, y = arrays(a, b)
    cubes = lambda x: forwarddiff(lambda t: t.to(b) ** 3, x).sum()
    return [
        gradient(cubes, x),
        hessian(cubes, x),
        hessian_reverse(cubes, x),
        gradient(lambda x, y: forwarddiff(lambda p: (p[0].to(b) * p[1]).sum(), [x, y]), x, y),
        gradient(lambda x: forwarddiff(lambda p: p[0].sum() * p[1], [x, 2.0]), x),
        # a number alone, beside what the function closes over
        gradient(lambda n: forwarddiff(lambda p: p * 2 * y, n).sum(), 2.0),
        jacobian(lambda x: forwarddiff(torch.sin, x, chunk_threshold=2), x),
    ]


@places
def numbers_beside_tensors(a: str, b: str) -> Any:
    x, _ = arrays(a, b)
    f = lambda x, n: x * n
    with float64_numbers():
        return [
            gradient(lambda x, n: (x * n).sum(), x, 2),
            diaghessian(lambda x, n: (x * n * n).sum(), x, 2.0),
            gradient(lambda x: 3.0, x),
            *(jacobian(f, x, 2.0, mode=mode) for mode in MODES),
            jacobian(f, x, 2.0, sparse=True),
        ]


@places
def default_devices(a: str, b: str) -> Any:
    """With ``b`` as the default device, arguments are where they are."""
    x, _ = arrays(a, b)
    neighbours = lambda x: x[1:] * x[:-1]

    def with_buffer(x: Tensor) -> Tensor:
        buffer = Buffer(x, 6)
        buffer[:3] = x[:3]
        buffer[3] = 2.0
        buffer[[4, 5]] = x[4:]
        return (buffer.copy() ** 2).sum()

    with torch.device(b):
        params = Params([x])
        return [
            beside(gradient(with_buffer, x), x),
            hessian(with_buffer, x),
            *(beside(jacobian(neighbours, x, mode=mode), x) for mode in MODES),
            beside(jacobian(neighbours, x, sparse=True), x),
            hessian(lambda x: neighbours(x).sum(), x, sparse=True),
            beside(plan_jacobian(neighbours, x)(x * 2), x),
            diaghessian(lambda x: (x.sin() * 2).sum(), x),
            gradient(lambda: x.sin().sum(), params).clip_norm(0.1),
            gradient(lambda x: checkpointed(torch.sin, x).sum(), x),
            gradient(lambda x: forwarddiff(torch.square, x).sum(), x),
        ]


@case
def torch_func_across_devices() -> None:
    """What docs/limitations.md says: PyTorch's transforms don't go from one device to another."""
    x, y = arrays("cuda:1", FIRST)
    f = lambda x: (x.to(FIRST) ** 3 * y).sum()
    for take in (torch.func.grad(f), lambda x: hessian_dual(f, x)):
        with pytest.raises(NotImplementedError, match="Cannot access storage"):
            take(x)
