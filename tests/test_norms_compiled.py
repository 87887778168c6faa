"""Norms in compiled derivatives: what is traced are their formulas."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_norms_differentiated import NORMS, Norm, X, loss, tall, values
from torch import Tensor, nn

from torchzygote import diaghessian, forwarddiff, gradient, hessian, hessian_dual, jacobian, pushforward

D = torch.float64
V = torch.linspace(-1, 1, 6, dtype=D)


def operators() -> list[object]:
    return [getattr(place, f"{norm}_norm") for place in (F, torch) for norm in ("layer", "batch", "instance")]


KEPT = operators()

WAYS: dict[str, Callable[[Norm], Callable[[Tensor], Tensor]]] = {
    "hessian": lambda n: lambda x: hessian(loss(n), x),
    "gradient of a diagonal": lambda n: lambda x: gradient(lambda x: diaghessian(loss(n), x)[0].sum(), x)[0],
    "gradient of a Hessian": lambda n: lambda x: gradient(lambda x: hessian(loss(n), x).sin().sum(), x)[0],
    "gradient of hessian_dual": lambda n: (
        lambda x: gradient(lambda x: hessian_dual(loss(n), x).sin().sum(), x)[0]
    ),
    "gradient of a Jacobian": lambda n: (
        lambda x: gradient(lambda x: jacobian(tall(n), x, mode="forward")[0].sin().sum(), x)[0]
    ),
    "gradient of a pushforward": lambda n: (
        lambda x: gradient(lambda x: pushforward(tall(n), x)(V).sin().sum(), x)[0]
    ),
    "hessian of forwarddiff": lambda n: lambda x: hessian(lambda x: forwarddiff(tall(n), x).sin().sum(), x),
}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("layer, weight and bias", way) for way in WAYS),
        ("batch", "gradient of a Hessian"),
        ("instance, weight", "gradient of a diagonal"),
    ],
)
def test_derivatives_of_derivatives(name: str, way: str) -> None:
    norm, formula = NORMS[name]
    torch._dynamo.reset()
    found = torch.compile(WAYS[way](norm), fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(found, WAYS[way](formula)(X))
    assert operators() == KEPT


@pytest.mark.parametrize("name", ["layer, bias", "batch, given statistics"])
def test_biases_alone_and_given_statistics(name: str) -> None:
    norm, formula = NORMS[name]
    torch._dynamo.reset()
    for way in ("hessian", "gradient of a Hessian"):
        found = torch.compile(WAYS[way](norm), fullgraph=True, backend="aot_eager")(X)
        torch.testing.assert_close(found, WAYS[way](formula)(X))


def test_second_derivatives_by_a_bias_without_weight() -> None:
    h = torch.linspace(0, 5, 20, dtype=D).sin().view(5, 4)
    f = lambda b: F.layer_norm(h, (4,), None, b).pow(3).sum()
    found = torch.compile(lambda b: hessian(f, b), fullgraph=True, backend="aot_eager")(V[:4])
    torch.testing.assert_close(found, hessian(f, V[:4]))


def compiled(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch._dynamo.reset()
    found: Tensor = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    return found


def test_the_functions_of_torch_itself() -> None:
    h = values(X)[0].mT
    f = lambda b: torch.layer_norm(h, (4,), None, b).pow(3).sum()
    torch.testing.assert_close(compiled(lambda b: hessian(f, b), V[:4]), hessian(f, V[:4]))
    third = WAYS["gradient of a Hessian"]
    norm = lambda h: torch.layer_norm(h, (4, 9))
    torch.testing.assert_close(compiled(third(norm), X), third(NORMS["layer"][1])(X))
    assert operators() == KEPT


def test_a_norm_that_the_user_has_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(t: Tensor, *args: object, **options: object) -> Tensor:
        return 2 * NORMS["layer"][1](t)

    monkeypatch.setattr(F, "layer_norm", doubled)
    second = WAYS["hessian"]
    found = compiled(second(NORMS["layer"][0]), X)
    assert F.layer_norm is doubled
    torch.testing.assert_close(found, second(lambda h: 2 * NORMS["layer"][1](h))(X))


def test_running_statistics_move_as_they_do() -> None:
    torch.manual_seed(0)
    h = torch.randn(3, 4, 5, dtype=D)
    # nn.BatchNorm1d counts its batches in place, which torch.func refuses
    moved, plain = (nn.InstanceNorm1d(4, track_running_stats=True).to(D) for _ in range(2))
    f = lambda x: hessian(lambda s: moved(h * s).square().sum(), x)
    torch._dynamo.reset()
    found = torch.compile(f, fullgraph=True, backend="aot_eager")(torch.ones((), dtype=D))
    expected = hessian(lambda s: plain(h * s).square().sum(), torch.ones((), dtype=D))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(moved.running_mean, plain.running_mean)
    torch.testing.assert_close(moved.running_var, plain.running_var)


def test_what_they_refuse_is_refused() -> None:
    for f in (
        lambda x: F.layer_norm(x, (5,)),
        lambda x: F.batch_norm(x[:1, None], None, None, training=True),
        lambda x: F.instance_norm(x[None, :, None]),
    ):
        torch._dynamo.reset()
        with pytest.raises((RuntimeError, ValueError, torch._dynamo.exc.Unsupported)):
            torch.compile(
                lambda x, f=f: hessian(lambda x: f(x).sum(), x), fullgraph=True, backend="aot_eager"
            )(X)


FIRST = """
import sys, torch, torchzygote as tz
v = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64).view(2, 3)
g = torch.tensor([[0.5], [2.0]], dtype=torch.float64)
f = lambda v: torch._weight_norm(v, g, 0).pow(3).sum() + torch.layer_norm(v, (3,)).exp().sum()
plain, expected = f(v), tz.hessian(f, v)
compiled = lambda f: torch.compile(f, backend="eager", fullgraph=True)
assert "torch._dynamo" not in sys.modules
first = {first}
assert "torch._dynamo" in sys.modules
torch.testing.assert_close(first, expected)
torch.testing.assert_close(compiled(f)(v), plain)
torch.testing.assert_close(compiled(lambda v: tz.hessian(f, v))(v), expected)
"""


@pytest.mark.parametrize(
    "first", ["tz.hessian_dual(f, v)", "tz.hessian(lambda v: torch.compile(f, backend='eager')(v), v)"]
)
def test_where_dynamo_is_imported_during_a_derivative(first: str) -> None:
    """It notes then what stands in for PyTorch's functions as operators of PyTorch's own."""
    code = FIRST.format(first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
