"""Factors of products that a backend rounds before it multiplies them: checks are as coarse as that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from torchzygote import Params, jacobian
from torchzygote._certificate import precision
from torchzygote._torch_private import rounding, surveys


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What backends may round factors to, as ``settings("mkldnn.matmul", "bf16")``."""

    def allow(part: str, precision: str) -> None:
        holder, name = part.split(".")
        held = SimpleNamespace(fp32_precision=precision)
        monkeypatch.setattr(rounding, "_backends", mine)
        setattr(getattr(mine, holder), name, held)

    exact = lambda *names: SimpleNamespace(**{n: SimpleNamespace(fp32_precision="ieee") for n in names})
    mine = SimpleNamespace(
        cuda=exact("matmul"), cudnn=exact("conv", "rnn"), mkldnn=exact("matmul", "conv", "rnn")
    )
    return allow


def test_what_backends_may_round_to_is_asked_of_each(settings: Callable[..., None]) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    settings("cudnn.conv", "tf32")
    assert rounding.rounding_of_convolutions(cuda, torch.float32) == 2.0**-10
    assert rounding.rounding_of_convolutions(cuda, torch.float64) == 0
    assert rounding.rounding_of_convolutions(cpu, torch.float32) == 0
    settings("mkldnn.rnn", "bf16")
    assert rounding.rounding_of_convolutions(cpu, torch.float32) == 2.0**-7
    assert rounding.rounding_of_products("cuda") == rounding.rounding_of_products("cpu") == 0
    settings("mkldnn.matmul", "bf16")
    settings("cuda.matmul", "tf32")
    assert rounding.rounding_of_products("cuda") == 2.0**-10
    assert rounding.rounding_of_products("cpu") == 2.0**-7
    x, wide = torch.ones(1), torch.ones(1, dtype=torch.float64)
    assert precision([x], wide) == 2.0**-7
    assert precision([wide], wide) == torch.finfo(torch.float64).eps


def test_convolutions_are_compared_as_coarsely_as_they_are_computed(settings: Callable[..., None]) -> None:
    settings("mkldnn.conv", "bf16")
    images, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 2, 2, requires_grad=True)
    assert surveys.survey([torch.nn.functional.conv2d(images, w).sin()]).rounded == 2.0**-7


@pytest.fixture(params=["medium", "highest"])
def products_in(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("products_in")
def test_products_that_round_their_factors_pass_the_checks() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(1600, 10)
    )
    images, labels = torch.randn(32, 1, 12, 12), torch.randint(0, 10, (32,))
    losses = lambda: torch.nn.functional.cross_entropy(net(images), labels, reduction="none")
    plain = torch.func.jacrev(lambda b: losses_by(net, images, labels, b))(net[3].bias.detach())
    torch.testing.assert_close(jacobian(losses, Params(net))[net[3].bias], plain, atol=0.02, rtol=0.02)
    mixed = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    X = torch.randn(4, 64)
    pulled, pushed = (jacobian(mixed, X, mode=mode)[0] for mode in ("reverse", "forward"))
    torch.testing.assert_close(pushed, pulled, atol=0.02, rtol=0.02)


def losses_by(net: torch.nn.Module, images: Tensor, labels: Tensor, bias: Tensor) -> Tensor:
    scores = torch.func.functional_call(net, {"3.bias": bias}, images)
    return torch.nn.functional.cross_entropy(scores, labels, reduction="none")
