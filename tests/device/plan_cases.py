"""Structure and plans on devices: found there or loaded there, each result beside its argument."""

from __future__ import annotations

import os
import tempfile
import warnings
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from device_cases import FIRST, SECOND, assert_same, beside, case, float64_numbers, places

from torchzygote import (
    HessianPlan,
    JacobianPlan,
    hessian,
    jacobian,
    jacobian_sparsity,
    plan_hessian,
    plan_jacobian,
)

MODES = ("auto", "forward", "reverse")


@places
def structures(a: str, b: str) -> Any:
    x = torch.linspace(0.1, 2, 40, dtype=torch.float64).to(a)
    backwards = torch.arange(38, -1, -1)
    there = backwards.to(a)
    functions = (
        lambda x: ((x[1:] * x[:-1].sin()) ** 2)[there].to(b),
        lambda x: torch.where(x[1:] > 1, x[1:] * x[:-1], x[:-1])[backwards].sort().values,
        lambda x: (x.gather(0, there) + x[1:].scatter(0, there, x[:-1])).topk(4).values,
    )
    found: list[Any] = []
    for f in functions:
        found += [beside(jacobian(f, x, sparse=True, mode=mode), x) for mode in MODES]
        found.append(jacobian_sparsity(f, x)[0].to_dense())
        found.append(hessian(lambda x: f(x).square().sum(), x, sparse=True))
    return found


@places
def plans(a: str, b: str) -> Any:
    x = torch.linspace(0.1, 2, 40, dtype=torch.float64).to(a)
    f = lambda x: (x[1:] * x[:-1].sin()) ** 2
    energy = lambda x: f(x).sum()
    elsewhere = [a, a.replace("0", "1")]  # a plan is for a kind of device
    found: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("jacobian", "hessian")]
        for mode in MODES:
            jacobian_plan, hessian_plan = plan_jacobian(f, x, mode=mode), plan_hessian(energy, x)
            jacobian_plan.save(paths[0])
            hessian_plan.save(paths[1])
            for device in elsewhere:
                z = (x * 1.5).to(device)
                for one in (jacobian_plan, JacobianPlan.load(paths[0], f)):
                    found.append(beside(one(z), z))
                    found.append(beside(one(z, dense=True), z))
                for other in (hessian_plan, HessianPlan.load(paths[1], energy)):
                    found.append(beside([other(z)], z))
    return found


@case
def plans_by_numbers() -> None:
    """Beside arrays, numbers are on their device, and so are the derivatives by them."""
    steps = torch.linspace(0.1, 2, 8, dtype=torch.float64)
    first = lambda n, x: x[1:] * x[:-1] * n
    last = lambda x, n: first(n, x)
    with float64_numbers():
        for device, mode, (f, order) in product((FIRST, SECOND), MODES, ((first, -1), (last, 1))):
            x = steps.to(device)
            for made, called in ((2.0, 3.0), (2, np.float64(3))):
                found = plan_jacobian(f, *(x, made)[::order], mode=mode)(*(x, called)[::order])
                assert_same(found, jacobian(f, *(steps, called)[::order], sparse=True))
                assert all(J.device == x.device for J in found)


@case
def plans_by_numbers_that_take_the_dense_way() -> None:
    steps = torch.linspace(0.1, 2, 8, dtype=torch.float64)
    f = lambda x, n: x.sort().values * n
    with float64_numbers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about that
        found = plan_jacobian(f, steps.to(SECOND), 2.0)(steps.to(SECOND).flip(0), 2.0, dense=True)
        assert_same(found, jacobian(f, steps.flip(0), 2.0))
    assert all(J.device == torch.device(SECOND) for J in found)


@case
def plans_by_arrays_on_two_devices() -> None:
    x = torch.linspace(0.1, 2, 8, dtype=torch.float64)
    y = x.to(FIRST)
    f = lambda x, y: x * y.to(x)
    with pytest.raises(ValueError, match=r"all arrays on one device, got \['cpu', 'cuda'\]; move them"):
        plan_jacobian(f, y, x)
    J, nothing = plan_jacobian(f, y, x, argnums=0)(y, x)
    assert J.device == y.device
    assert nothing is None
