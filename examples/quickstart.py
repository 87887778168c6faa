"""The tour of the README: what the library does, printed as it is computed.

Run it with ``python examples/quickstart.py``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import torchzygote as tz


def show(expression: str, value: object) -> None:
    """A line of code and what it gives."""
    print(f"  {expression}")
    for line in str(value).splitlines():
        print(f"      {line}")


def section(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def gradients() -> None:
    section("Gradients")
    show("gradient(lambda x, y: 3 * x**2 + x * y, 5, 2)", tz.gradient(lambda x, y: 3 * x**2 + x * y, 5, 2))
    structured = tz.gradient(lambda a, t: (a * t[0]).sum() + t[1], torch.tensor([1.0, 2.0, 3.0]), (4, 5))
    show("gradient(lambda a, t: (a * t[0]).sum() + t[1], tensor([1., 2., 3.]), (4, 5))", structured)
    layer = nn.Linear(2, 1)
    of_module = tz.gradient(lambda m: m(torch.tensor([1.0, 2.0])).sum(), layer)[0]
    show("gradient(lambda m: m(x).sum(), torch.nn.Linear(2, 1))[0]", of_module)
    show("withgradient(torch.div, 1, 2)", tz.withgradient(torch.div, 1, 2))
    y, back = tz.pullback(lambda a, b: a * b, torch.tensor([1.0, 2.0]), 3)
    show("y, back = pullback(lambda a, b: a * b, tensor([1., 2.]), 3); y", y)
    show("back(tensor([1., 10.]))", back(torch.tensor([1.0, 10.0])))


def jacobians() -> None:
    section("Jacobians")
    x = torch.tensor([1.0, 2.0, 3.0])
    show("jacobian(lambda x: x[1:] - x[:-1] ** 2, x)[0]", tz.jacobian(lambda x: x[1:] - x[:-1] ** 2, x)[0])
    forward = tz.jacobian(lambda t: torch.stack([t.cos(), t.sin()]), 0, mode="forward")[0]
    show('jacobian(lambda t: torch.stack([t.cos(), t.sin()]), 0, mode="forward")[0]', forward)


def implicit_parameters() -> None:
    section("Training with implicit parameters")
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    x = torch.randn(64, 2)
    y = x @ torch.tensor([[2.0], [-3.0]]) + 1
    params = tz.Params(model)
    optimizer = torch.optim.SGD(params, lr=0.2)
    for step in range(101):
        value, grads = tz.withgradient(lambda: nn.functional.mse_loss(model(x), y), params)
        norm = grads.clip_norm_(10.0)
        grads.assign_()
        optimizer.step()
        if step % 20 == 0:
            print(f"  step {step:3d}: loss {value:.2e}, gradient norm {norm:.2e}")
    show("params.to_vector()  # 2, -3, 1 made the data", params.to_vector())


def second_order() -> None:
    section("Second order")

    def rosenbrock(x: Tensor) -> Tensor:
        return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()

    show("hessian(rosenbrock, torch.ones(3))", tz.hessian(rosenbrock, torch.ones(3)))
    show("diaghessian(rosenbrock, torch.ones(3))", tz.diaghessian(rosenbrock, torch.ones(3)))
    nested = tz.gradient(lambda x: tz.gradient(lambda x: x**4, x)[0], 2)
    show("gradient(lambda x: gradient(lambda x: x**4, x)[0], 2)", nested)
    x = torch.linspace(0, 1, 1000)
    H = tz.hessian(rosenbrock, x, sparse=True)
    show("H = hessian(rosenbrock, torch.linspace(0, 1, 1000), sparse=True); H.layout", H.layout)
    show("H.values().numel()", H.values().numel())


def watching_and_assigning() -> None:
    section("Watching, bending, assigning")
    print("  gradient(lambda a, b: showgrad(a) * b, 2, 3)")
    print(f"      {tz.gradient(lambda a, b: tz.showgrad(a) * b, 2, 3)}")
    hooked = tz.gradient(lambda a, b: tz.hook(torch.neg, a) * b, 2, 3)
    show("gradient(lambda a, b: hook(torch.neg, a) * b, 2, 3)", hooked)

    def powers(x: Tensor) -> Tensor:
        buf = tz.Buffer(x, 4)
        buf[0] = 1
        for i in range(1, 4):
            buf[i] = buf[i - 1] * x
        return copy.copy(buf)

    show("jacobian(powers, 2)[0]  # powers writes 1, x, x**2, x**3 into a Buffer", tz.jacobian(powers, 2)[0])


def memory() -> None:
    section("Trading time for memory")

    def deep(x: Tensor) -> Tensor:
        for _ in range(100):
            x = x + torch.sin(x) / 50
        return x

    x = torch.tensor([0.1, 0.2])
    direct = tz.gradient(lambda x: deep(x).sum(), x)[0]
    again = tz.gradient(lambda x: tz.checkpointed(deep, x).sum(), x)[0]
    show("gradient(lambda x: deep(x).sum(), x)[0]", direct)
    show("gradient(lambda x: checkpointed(deep, x).sum(), x)[0]", again)
    forward = tz.gradient(lambda x: tz.forwarddiff(deep, x).sum(), x)[0]
    show("gradient(lambda x: forwarddiff(deep, x).sum(), x)[0]", forward)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tour."""
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    print(f"torchzygote {tz.__version__} on torch {torch.__version__}")
    gradients()
    jacobians()
    implicit_parameters()
    second_order()
    watching_and_assigning()
    memory()


if __name__ == "__main__":
    main()
