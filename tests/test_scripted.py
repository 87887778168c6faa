"""TorchScript: once the JIT has optimized a script, PyTorch loses its derivatives inside transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import (
    Params,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
    pushforward,
)
from torchzygote._torch_private import scripts

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning"),  # from 2.14 on
]

DOUBLE = torch.float64
X = torch.linspace(-1, 1, 12, dtype=DOUBLE).reshape(4, 3)
V = X.cos()
vmap = torch.func.vmap


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5, dtype=DOUBLE)

    def forward(self, x: Tensor, scale: float = 2.0, shift: Tensor | None = None) -> Tensor:
        y = torch.tanh(torch.tanh(self.linear(x)) * scale)
        if shift is not None:
            y = y + shift
        return y


def layer() -> Layer:
    torch.manual_seed(0)
    return Layer()


def scripted(module: Layer) -> Callable[..., Tensor]:
    """As the JIT has it after some calls, in training and by its input."""
    script: Any = torch.jit.script(module)
    for _ in range(3):
        script(X.clone().requires_grad_()).sum().backward()
        script(X[0].clone().requires_grad_()).sum().backward()
    script.zero_grad()
    return script  # type: ignore[no-any-return]


def total(f: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x).sin().sum()


def planned(f: Callable[..., Tensor]) -> Tensor:
    plan = plan_hessian(total(f), X[0])
    return vmap(lambda x: plan(x, dense=True))(X)


PROGRAMS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "pushforward": lambda f: pushforward(f, X)(V),
    "forward": lambda f: jacobian(lambda x: f(x).sum(1), X, mode="forward")[0],
    "forwarddiff": lambda f: gradient(lambda x: forwarddiff(total(f), x), X)[0],
    "hessian_dual": lambda f: hessian_dual(total(f), X),
    "hessian in vmap": lambda f: vmap(lambda x: hessian(total(f), x))(X),
    "hessian_reverse in vmap": lambda f: vmap(lambda x: hessian_reverse(total(f), x))(X),
    "diaghessian in vmap": lambda f: vmap(lambda x: diaghessian(total(f), x)[0])(X),
    "jacrev of gradient": lambda f: torch.func.jacrev(lambda x: gradient(total(f), x)[0])(X),
    "jacfwd of gradient": lambda f: torch.func.jacfwd(lambda x: gradient(total(f), x)[0])(X),
    "grad of gradient": lambda f: torch.func.grad(lambda x: gradient(total(f), x)[0].sin().sum())(X),
    "forward in vmap": lambda f: vmap(lambda x: jacobian(f, x, mode="forward")[0])(X),
    "auto in vmap": lambda f: vmap(lambda t, x: jacobian(lambda t: f(t * x), t)[0])(X[:, 0], X),
    "plan": planned,
    "gradient in vmap": lambda f: vmap(lambda x: gradient(total(f), x)[0])(X),
    "reverse in vmap": lambda f: vmap(lambda x: jacobian(f, x, mode="reverse")[0])(X),
    "gradient of gradient": lambda f: gradient(lambda x: (gradient(total(f), x)[0] * V).sum(), X)[0],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_scripted_module_has_the_derivatives_of_the_module(program: str) -> None:
    module = layer()
    expected = PROGRAMS[program](module)
    found = PROGRAMS[program](scripted(module))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize("program", ["pushforward", "hessian_dual", "hessian in vmap"])
def test_so_have_traced_modules_and_functions(program: str) -> None:
    module = layer()
    expected = PROGRAMS[program](module)
    weights = [p.detach() for p in module.parameters()]

    def f(x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ weights[0].T + weights[1]) * 2.0)

    for traced in (torch.jit.trace(f, X), torch.jit.trace(module, X)):
        for _ in range(3):
            traced(X.clone().requires_grad_()).sum().backward()
        torch.testing.assert_close(PROGRAMS[program](traced), expected)


def test_what_a_script_takes_is_what_it_takes_elsewhere() -> None:
    module = layer()
    script = scripted(module)
    calls: list[Callable[[Callable[..., Tensor], Tensor], Tensor]] = [
        lambda f, x: f(x, 3.0),
        lambda f, x: f(x, shift=x.sum()),
        lambda f, x: f(shift=x.sum(), x=x, scale=1.0),
        lambda f, x: f(x=x),
    ]
    for call in calls:
        found = pushforward(lambda x, call=call: call(script, x), X)(V)
        torch.testing.assert_close(found, pushforward(lambda x, call=call: call(module, x), X)(V))
    refused: list[Callable[[Tensor], Any]] = [
        lambda x: script(),
        lambda x: script(x, size=1.0),
        lambda x: script(x, 1.0, x, x),
    ]
    for wrong in refused:
        with pytest.raises(RuntimeError, match="forward"):
            pushforward(wrong, X)(V)


def test_a_script_that_changes_its_module_changes_it_once() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.count: int = 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x * self.count

    script: Any = torch.jit.script(Counting())
    torch.testing.assert_close(pushforward(script, X)(V), V)
    torch.testing.assert_close(pushforward(script, X)(V), 2 * V)
    assert script.count == 2


def test_scripts_are_called_as_ever_afterwards() -> None:
    script, module = scripted(layer()), layer()
    hessian_dual(total(script), X)
    with pytest.raises(ValueError, match="no"):
        pushforward(lambda x: float("no"), X)(V)
    assert scripts._users == 0
    torch.testing.assert_close(script(X, scale=3.0), module(X, scale=3.0))
    y = script(X.clone().requires_grad_())
    assert y.grad_fn is not None
    assert "DifferentiableGraphBackward" in y.grad_fn.name()


BY_PARAMETERS: dict[str, Callable[[Any], Any]] = {
    "pushforward": lambda m: pushforward(lambda m: m(X), m)(
        {name: p.detach() for name, p in m.named_parameters()}
    ),
    "Params in vmap": lambda m: vmap(lambda x: list(gradient(lambda: total(m)(x), Params(m)).values()))(X),
    "a module in vmap": lambda m: vmap(lambda x: gradient(lambda m: total(m)(x), m)[0])(X),
    "a weight in grad": lambda m: torch.func.grad(
        lambda x: sum(g.sum() for g in gradient(lambda: total(m)(x), Params([m.linear.weight])).values())
    )(X),
}


@pytest.mark.parametrize("program", BY_PARAMETERS)
def test_by_parameters_of_a_scripted_module_that_would_be_exchanged(program: str) -> None:
    script = scripted(layer())
    held = nn.ModuleDict({"inside": script})  # type: ignore[dict-item]
    held.linear = script.linear  # type: ignore[attr-defined]
    held.forward = lambda x: script(x)  # type: ignore[method-assign]
    for module in (script, held):
        with pytest.raises(RuntimeError, match=r"scripted module Layer can't be differentiated by its param"):
            BY_PARAMETERS[program](module)
    gradient(lambda: total(script)(X), Params(script))  # type: ignore[arg-type]


def test_a_scripted_module_may_be_used_where_another_one_is_exchanged() -> None:
    script, plain = scripted(layer()), nn.Linear(3, 3, dtype=DOUBLE)
    found = vmap(lambda x: gradient(lambda: total(script)(plain(x)), Params(plain))[plain.weight])(X)
    module = layer()
    expected = vmap(lambda x: gradient(lambda: total(module)(plain(x)), Params(plain))[plain.weight])(X)
    torch.testing.assert_close(found, expected)
