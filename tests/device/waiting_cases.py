"""Which calls wait for the device: copies between it and the CPU, and values that Python asks for."""

from __future__ import annotations

from collections.abc import Callable

import fake_cuda
import torch
from device_cases import SECOND, case
from torch import Tensor

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
)
from torchzygote.native import seed_rows


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


@case
def plans_keep_their_structure_on_the_device() -> None:
    x = point()
    by_rows = plan_jacobian(neighbours, x, mode="reverse")
    of_energy = plan_hessian(lambda x: neighbours(x).sum(), x)
    for plan in (by_rows, of_energy):
        assert not [one for one in waits(lambda: plan(x)) if "copy" in one]
        # but not beyond a write into a result
        first = plan(x)
        first = first[0] if isinstance(first, tuple) else first
        first.col_indices().zero_()
        again = plan(x)
        again = again[0] if isinstance(again, tuple) else again
        assert again.col_indices().any()
        assert again.device == x.device


@case
def numbers_written_to_a_buffer() -> None:
    x = point()

    def f(x: Tensor) -> Tensor:
        buffer = Buffer(x, 8)
        buffer[:] = x
        buffer[3] = 2.0
        buffer[4:6] = 1
        buffer[6] = True
        return (buffer.copy() ** 2).sum()

    assert len([one for one in waits(lambda: gradient(f, x)) if "values.py" in one]) == 0
    for number, dtype in ((1e300, torch.float32), (-1e300, torch.bfloat16), (1 + 2j, torch.complex64)):
        here, there = (Buffer(torch.ones((), dtype=dtype, device=d), 2) for d in ("cpu", SECOND))
        here[0] = there[0] = number
        assert torch.equal(there.copy().cpu(), here.copy())


@case
def colors_are_looked_at_once() -> None:
    colors = torch.arange(4, device=SECOND)
    make = lambda: seed_rows(0, 4, 4, dtype=torch.float32, device=SECOND, colors=colors)
    assert len(waits(make)) == 1
