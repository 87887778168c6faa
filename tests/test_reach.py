"""What windows reach, read off the recorded graph, and where structure is looked for because of that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from noted_calls import noted_calls
from torch import Tensor, nn

from torchzygote import _structure, diaghessian, hessian, jacobian
from torchzygote._recorded.reach import reach

D = torch.float64
Function = Callable[[Tensor], Tensor]
KERNEL = torch.linspace(1, 2, 5, dtype=D).view(1, 1, 5)
TAPS = torch.linspace(1, 2, 5, dtype=D)


def frozen(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).double().requires_grad_(False).eval()


def conv(before: int, after: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, **options)  # type: ignore[arg-type]


torch.manual_seed(0)
one_layer = frozen(conv(1, 4), nn.Tanh())
two_layers = frozen(conv(1, 4, padding=1), nn.Tanh(), conv(4, 1, padding=1))
normalized = frozen(conv(1, 4, padding=1), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 1, padding=1))
strided = frozen(conv(2, 4, stride=2), nn.Tanh(), nn.ConvTranspose2d(4, 2, 2, stride=2))
grouped = frozen(conv(4, 4, padding=1, groups=4), nn.Tanh())
pooled = frozen(conv(1, 2), nn.MaxPool2d(2), nn.AvgPool2d(2))
around = frozen(conv(2, 2, padding=1, padding_mode="reflect"))
classifier = frozen(conv(1, 4), nn.Tanh(), nn.Flatten(1), nn.Linear(4 * 22 * 22, 40))
global_pool = frozen(conv(1, 4), nn.Tanh(), nn.AdaptiveAvgPool2d(1))
self_attention = frozen(conv(1, 4), nn.Flatten(1), nn.Softmax(1))


def line(x: Tensor) -> Tensor:
    return F.conv1d(x[None, None], KERNEL).tanh()


# What an element depends on at most; ``None`` where nothing is said.
REACHED: dict[str, tuple[Function, tuple[int, ...], int | None]] = {
    "a line": (line, (40,), 5),
    "an image": (one_layer, (1, 24, 24), 9),
    "channels and back": (two_layers, (1, 24, 24), 25),
    "branches": (lambda x: two_layers(x) + x.sin(), (1, 24, 24), 25),
    "batch norm with given statistics": (lambda x: normalized(x[None]), (1, 24, 24), 25),
    "channels apart": (grouped, (4, 10, 10), 9),
    "unfold": (lambda x: x.unfold(0, 5, 1).prod(1), (40,), 5),
    "unfold, several axes": (lambda x: x.unfold(0, 3, 1).unfold(1, 3, 1).sum((-2, -1)).exp(), (9, 9), 9),
    "unfold and a product": (lambda x: x.unfold(0, 5, 2) @ TAPS, (40,), 5),
    "F.unfold": (lambda x: F.unfold(x[None], 3)[0].square().sum(0), (1, 12, 12), 9),
    "all classes": (lambda x: classifier(x[None]), (1, 24, 24), 576),
    "all positions": (lambda x: global_pool(x[None]), (1, 24, 24), 576),
    "softmax": (lambda x: self_attention(x[None]), (1, 24, 24), None),
    "no window": (lambda x: x[1:] * x[:-1], (40,), None),
    "a function of both": (lambda x: F.conv1d(x.view(1, 1, -1), x[:3].view(1, 1, 3)), (40,), None),
    "lines and images": (lambda x: F.conv1d(two_layers(x)[0, :, None], KERNEL), (1, 24, 24), None),
}


@pytest.mark.parametrize("name", REACHED)
def test_what_windows_reach(name: str) -> None:
    f, shape, wanted = REACHED[name]
    x = torch.rand(shape, dtype=D, requires_grad=True)
    y = f(x)
    found = reach(y, x)
    assert (None if found is None else found.elements) == wanted
    if found is not None:
        J = torch.autograd.functional.jacobian(f, x).reshape(y.numel(), -1)
        most = int((J != 0).sum(1).max())
        assert most == wanted
        assert found.members >= most * y.numel() // 2


ROUGHLY: dict[str, tuple[Function, tuple[int, ...]]] = {
    "dilated": (lambda x: F.conv1d(x[None, None], KERNEL, dilation=2), (40,)),
    "strides and back": (strided, (2, 25, 25)),
    "pools": (pooled, (1, 26, 26)),
    "around the edge": (around, (2, 14, 14)),
    "sums of sums": (lambda x: x.unfold(0, 3, 1).sum(1).sin().unfold(0, 3, 1).sum(1), (40,)),
}


@pytest.mark.parametrize("name", ROUGHLY)
def test_rough_estimates_are_near(name: str) -> None:
    f, shape = ROUGHLY[name]
    x = torch.rand(shape, dtype=D, requires_grad=True)
    found = reach(f(x), x)
    J = torch.autograd.functional.jacobian(f, x).reshape(-1, x.numel())
    most = int((J != 0).sum(1).max())
    assert found is not None
    assert most / 2 <= found.elements <= 4 * most


GRADIENTS: dict[str, Function] = {
    "a line": lambda x: line(x).square().sum(),
    "unfold and a product": lambda x: (x.unfold(0, 5, 1) @ TAPS).cos().sum(),
    "unfold": lambda x: x.unfold(0, 5, 1).prod(1).sum(),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_reach_what_hessians_have(name: str) -> None:
    x = torch.rand(40, dtype=D, requires_grad=True)
    (g,) = torch.autograd.grad(GRADIENTS[name](x), x, create_graph=True)
    found = reach(g, x)
    assert found is not None
    assert 9 <= found.elements <= 27  # four on both sides


def test_trained_weights_are_constants_here() -> None:
    layer = nn.Conv2d(1, 4, 3).double()
    x = torch.rand(1, 9, 9, dtype=D, requires_grad=True)
    found = reach(layer(x), x)
    assert found is not None
    assert found.elements == 9
    assert reach(layer(x), layer.weight) is None


def test_forms_that_no_rule_knows_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    told = lambda node, name: None if name == "_saved_padding" else getattr(node, name, None)
    monkeypatch.setattr("torchzygote._recorded.reach.node_attribute", told)
    x = torch.rand(1, 9, 9, dtype=D)
    y = one_layer(x.requires_grad_())
    assert reach(y, x) is None


# ---------------------------------------------------------------------------------------------------------
# through public functions


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where structure was looked for."""
    return noted_calls(monkeypatch, _structure, "jacobian_patterns", "hessian_patterns")


SMALL: dict[str, tuple[Function, tuple[int, ...]]] = {
    "a line": (line, (800,)),
    "two layers": (two_layers, (1, 26, 26)),
    "unfold": (lambda x: x.unfold(0, 5, 1).prod(1), (800,)),
}


@pytest.mark.filterwarnings("ignore:rows are computed one at a time")  # through unfold
@pytest.mark.parametrize("name", SMALL)
def test_small_windows_take_few_products(name: str, looked: list[str], products: list[int]) -> None:
    f, shape = SMALL[name]
    x = torch.rand(shape, dtype=D)
    (J,) = jacobian(f, x, mode="reverse")
    assert looked == ["jacobian_patterns"]
    assert sum(products) <= 60
    torch.testing.assert_close(J, torch.func.jacfwd(f)(x).reshape(J.shape))


def test_small_windows_of_hessians(looked: list[str], products: list[int]) -> None:
    x = torch.rand(700, dtype=D)
    f = lambda x: line(x).square().sum()
    H = hessian(f, x)
    torch.testing.assert_close(H, torch.func.hessian(f)(x))
    (diagonal,) = diaghessian(f, x)
    torch.testing.assert_close(diagonal, H.diagonal())
    assert looked == ["hessian_patterns", "hessian_patterns"]
    assert sum(products) <= 60


dense_layers = frozen(
    conv(8, 8, padding=1), nn.Tanh(), conv(8, 8, padding=1), nn.Tanh(), conv(8, 8, padding=1)
)
IMAGES = torch.rand(4, 3, 12, 12, dtype=D)
LARGE: dict[str, tuple[Function, tuple[int, ...]]] = {
    "many channels": (dense_layers, (8, 10, 10)),
    "all classes": (lambda x: classifier(x[None]), (1, 24, 24)),
    "by weights": (lambda w: F.conv2d(IMAGES, w).tanh(), (8, 3, 3, 3)),
    "a small image": (two_layers, (1, 10, 10)),
}


@pytest.mark.parametrize("name", LARGE)
def test_windows_that_reach_far_are_not_looked_at(name: str, looked: list[str]) -> None:
    f, shape = LARGE[name]
    x = torch.rand(shape, dtype=D)
    (J,) = jacobian(f, x)
    hessian(lambda x: f(x).square().sum(), x[..., :9, :9] if name == "many channels" else x)
    assert looked == []
    torch.testing.assert_close(J, torch.func.jacrev(f)(x).reshape(J.shape))
