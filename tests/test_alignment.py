"""Axes that run along with each other, where one recorded operation has several results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from alignment_cases import SEVERAL_RESULTS, off_axes
from torch import Tensor, nn

from torchzygote._recorded import alignment as _alignment
from torchzygote._recorded.alignment import aligned_axes, shared_axes
from torchzygote.hessians import diaghessian, hessian, hessian_reverse, withhessian
from torchzygote.jacobians import jacobian
from torchzygote.params import Params


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 6, dtype=torch.float64).requires_grad_()


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What rules raised: nobody gets to see it, but none should."""
    seen: list[str] = []
    monkeypatch.setattr(_alignment._log, "debug", lambda message, *args: seen.append(message % args))
    return seen


@pytest.mark.parametrize("name", SEVERAL_RESULTS)
def test_axes_hold_for_the_true_derivatives(name: str, x: Tensor, failures: list[str]) -> None:
    f = SEVERAL_RESULTS[name]
    y = f(x)
    J = torch.autograd.functional.jacobian(f, x)
    for p, q in aligned_axes(y, x) or []:
        assert not off_axes(J, p, y.dim() + q).any()
    weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    scalar = lambda x: (f(x).sin() * weights).sum()
    (g,) = torch.autograd.grad(scalar(x), x, create_graph=True)
    H = torch.autograd.functional.hessian(scalar, x)
    for p, q in aligned_axes(g, x) or []:
        assert not off_axes(H, p, 2 + q).any()
    assert not failures


EXPECTED: dict[str, list[tuple[int, int]]] = {
    "second half": [(1, 1)],
    "second half behind": [(0, 0)],
    "second row": [(0, 1)],
    "unsafe split": [],  # nobody wrote a rule for it
    "eigenvectors": [],
    "second state beside the batch": [],
    "squeeze of no axis": [(0, 0), (2, 1)],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_axes_of_results_that_are_not_the_first(name: str, x: Tensor) -> None:
    assert (aligned_axes(SEVERAL_RESULTS[name](x), x) or []) == EXPECTED[name]


def test_a_rule_that_fails_says_nothing(
    x: Tensor, monkeypatch: pytest.MonkeyPatch, failures: list[str]
) -> None:
    def fails(*args: object) -> tuple[int, ...]:
        raise KeyError("another form of the operation")

    y = x.sin().exp()
    assert aligned_axes(y, x) == [(0, 0), (1, 1)]
    monkeypatch.setattr(_alignment, "_rule", lambda *args: fails)
    assert aligned_axes(y, x) == []
    monkeypatch.setattr(_alignment, "_rule", lambda *args: lambda node, inputs, out: (0, 1, 2))
    assert aligned_axes(y, x) == []
    assert len(failures) == 4


def test_an_input_that_another_one_comes_from() -> None:
    """``b`` isn't an input, though it comes out of the node that the input ``a`` comes out of."""
    w = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    a, b = w.unbind(0)
    root = b.flip(0).sin() * w[0]
    assert shared_axes([root], [a, w[1]], 1) == []
    assert aligned_axes(b * a, a) == [(0, 0)]
    assert aligned_axes(b.flip(0) * w[0], w) == []
    assert shared_axes([b.flip(0) * w[0] * a], [w, a], 1) == []


# ---------------------------------------------------------------------------------------------------------
# the same through public functions, large enough for the axes to be looked at


def decay(module: nn.Module) -> Tensor:
    return torch.stack([(p**2).sum() for p in module.parameters()]).sum()


def network(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, nn.Tanh(), nn.Flatten(), nn.Linear(800, 3))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor], tuple[int, ...]]] = {
    "convolutional network": (lambda: network(nn.Conv2d(1, 8, 3)), lambda net, x: net(x), (8, 1, 12, 12)),
    "with batch norm": (
        lambda: network(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)),
        lambda net, x: net(x),
        (8, 1, 12, 12),
    ),
    "layer norm": (lambda: nn.LayerNorm(32), lambda net, x: net(x), (512, 32)),
    "layer norm twice": (lambda: nn.LayerNorm(32), lambda net, x: net(net(x).tanh()), (512, 32)),
    "batch norm": (lambda: nn.BatchNorm1d(32), lambda net, x: net(x), (512, 32)),
    "convolution": (lambda: nn.Conv1d(4, 32, 3), lambda net, x: net(x), (64, 4, 32)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("decayed", [False, True])
def test_diagonals_by_the_parameters_of_ordinary_layers(name: str, decayed: bool) -> None:
    torch.manual_seed(0)
    make, apply, shape = LAYERS[name]
    net, x = make().double(), torch.randn(shape, dtype=torch.float64)
    loss = lambda: apply(net, x).tanh().pow(2).mean() + (decay(net) if decayed else 0)
    found = diaghessian(loss, Params(net))
    for p in net.parameters():
        if p.numel() <= 100:
            expected = second_differences(loss, p)
            torch.testing.assert_close(found[p].reshape(-1), expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def second_differences(loss: Callable[[], Tensor], p: Tensor, h: float = 1e-4) -> Tensor:
    """The diagonal by central differences."""
    flat, middle, found = p.data.view(-1), loss(), []
    for i in range(flat.numel()):
        old = flat[i].clone()
        flat[i] = old + h
        above = loss()
        flat[i] = old - h
        found.append((above - 2 * middle + loss()) / h**2)
        flat[i] = old
    return torch.stack(found)


def test_a_bias_that_comes_from_one_row() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 8, dtype=torch.float64)
    taps = torch.ones(4, 1, 3, dtype=torch.float64)
    f = lambda x: F.conv1d(x.unsqueeze(1), taps, bias=x[0, :4]).sin().sum()
    H = torch.autograd.functional.hessian(f, x).reshape(320, 320)
    torch.testing.assert_close(hessian(f, x), H)
    torch.testing.assert_close(hessian_reverse(f, x), H)
    torch.testing.assert_close(withhessian(f, x).hess, H)
    torch.testing.assert_close(diaghessian(f, x)[0].reshape(-1), H.diagonal())


@pytest.mark.parametrize("which", [0, 1])
def test_jacobians_of_eigenvalues_and_eigenvectors(which: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 40, dtype=torch.float64)
    f = lambda x: torch.linalg.eigh(x + x.t())[which] * 2
    expected = torch.autograd.functional.jacobian(f, x).reshape(-1, x.numel())
    torch.testing.assert_close(jacobian(f, x)[0], expected)


def test_jacobian_of_the_second_state_of_an_lstm() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(32, 48, batch_first=True).double()
    x = torch.randn(16, 2, 32, dtype=torch.float64)
    f = lambda x: layer(x)[1][1] * 2
    expected = torch.autograd.functional.jacobian(f, x).reshape(-1, x.numel())
    torch.testing.assert_close(jacobian(f, x)[0], expected)
