"""Which calls wait for the device: copies between it and the CPU, and values that Python asks for."""

from __future__ import annotations

from collections.abc import Callable

import fake_cuda
import torch
from device_cases import SECOND, case
from torch import Tensor

from torchzygote import (
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
    pullback,
    pushforward,
    withgradient,
)


def point() -> Tensor:
    return torch.linspace(0.5, 1.5, 8, dtype=torch.float64, device=SECOND)


def waits(run: Callable[[], object]) -> list[str]:
    """What ``run()`` waits for, as it is called a second time."""
    run()
    with fake_cuda.waits() as found:
        run()
    return list(found)


def assert_none(**calls: Callable[[], object]) -> None:
    found = {name: seen for name, run in calls.items() if (seen := waits(run))}
    assert not found, found


def energy(x: Tensor) -> Tensor:
    return (x**2 * x.sum()).sum()


def neighbours(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


@case
def derivatives_wait_for_nothing() -> None:
    x = point()
    params = Params([x])
    z, back = pullback(neighbours, x)
    push = pushforward(neighbours, x)
    assert_none(
        gradient=lambda: gradient(energy, x),
        withgradient=lambda: withgradient(energy, x),
        pullback=lambda: pullback(neighbours, x),
        back=lambda: back(z),
        push=lambda: push(x),
        jacobian=lambda: jacobian(neighbours, x, mode="reverse"),
        hessian=lambda: hessian(energy, x),
        hessian_dual=lambda: hessian_dual(energy, x),
        hessian_reverse=lambda: hessian_reverse(energy, x),
        diaghessian=lambda: diaghessian(energy, x),
        by_params=lambda: gradient(lambda: energy(x), params),
        jacobian_by_params=lambda: jacobian(lambda: neighbours(x), params),
        checkpointed=lambda: gradient(lambda x: checkpointed(energy, x), x),
        forwarddiff=lambda: gradient(lambda x: forwarddiff(torch.sin, x).sum(), x),
        hook=lambda: gradient(lambda x: energy(hook(torch.neg, x)), x),
    )


@case
def grads_wait_for_nothing() -> None:
    x = point()
    g = gradient(lambda: energy(x), Params([x]))
    assert_none(
        arithmetic=lambda: g * 2 + g / 3,
        by_a_number_of_the_cpu=lambda: g * torch.tensor(2.0, dtype=torch.float64),
        norm=lambda: g.norm(),
        clip_norm=lambda: g.clip_norm(1.0),
        clip_norm_=lambda: g.clip_norm_(1.0),
        largest=lambda: g.clip_norm_(1.0, float("inf")),
        clip_value_=lambda: g.clip_value_(1.0),
        to_vector=lambda: g.to_vector(),
        copy_=lambda: copy_(g, g.to_vector()),
        assign_=lambda: g.assign_(),
        accumulate_=lambda: g.accumulate_(0.5),
    )


@case
def records_of_waits_are_complete() -> None:
    """What has to wait is seen, in backward passes, too."""
    x = point()
    assert waits(lambda: x.sum().item())
    assert waits(lambda: x[x > 1])
    assert waits(lambda: x.cpu())
    assert waits(lambda: gradient(lambda x: hook(lambda g: g.cpu().to(SECOND), x).sum(), x))
    g = gradient(lambda: energy(x), Params([x]))
    assert len(waits(lambda: g.clip_norm_(1.0, error_if_nonfinite=True))) == 1
    assert len(waits(lambda: g.nonfinite())) == 1
