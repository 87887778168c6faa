"""Diagonals of Hessians by weights: few products with what affine maps give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from factored_cases import (
    FACTORED,
    LABELS,
    ORACLES,
    PLAIN,
    D,
    R,
    X,
    arguments,
    by_torch_func,
    everything_is_worth_it,
    head,
)
from torch import Tensor, nn

from torchzygote import Params, diaghessian
from torchzygote._recorded import alignment as _alignment
from torchzygote._recorded import alignment_rules as _alignment_rules


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, products: list[int]) -> list[int]:
    """How many products are asked for, where even the smallest problem is worth it."""
    everything_is_worth_it(monkeypatch)
    return products


@pytest.mark.parametrize("name", FACTORED)
def test_few_products_give_the_diagonal(name: str, rows: list[int]) -> None:
    f, shapes, few = FACTORED[name]
    xs = arguments(shapes)
    torch.testing.assert_close(list(diaghessian(f, *xs)), by_torch_func(f, xs))
    assert sum(rows) == few


@pytest.mark.parametrize("name", PLAIN)
def test_what_affine_maps_do_not_explain_goes_the_plain_way(name: str, rows: list[int]) -> None:
    f, shapes = PLAIN[name]
    xs = arguments(shapes)
    found = diaghessian(f, *xs)
    torch.testing.assert_close(list(found), by_torch_func(ORACLES.get(name, f), xs))
    assert sum(rows) >= sum(x.numel() for x in xs)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (lambda x, w, b: F.softplus(F.linear(x, w, b)).sum(), [(1, 800), (1, 800), (1,)]),
        (lambda a, b: torch.dot(a, b).sin(), [(600,), (600,)]),
        (lambda p: torch.dot(p[:400], p[400:]).sin(), [(800,)]),
    ],
)
def test_both_factors_of_a_product_of_one_element(
    f: Callable[..., Tensor], shapes: list[tuple[int, ...]], products: list[int]
) -> None:
    xs = arguments(shapes)
    torch.testing.assert_close(list(diaghessian(f, *xs)), by_torch_func(f, xs))
    assert sum(products) == 2


def by_parameters(net: nn.Module, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Each parameter's own diagonal, by torch.autograd."""
    found = {}
    for name, p in net.named_parameters():

        def of(v: Tensor, name: str = name) -> Tensor:
            torch.manual_seed(2)  # for dropout
            return loss(torch.func.functional_call(net, {name: v}, (X,)))

        H = torch.autograd.functional.hessian(of, p.detach())
        found[name] = H.reshape(p.numel(), -1).diagonal().reshape(p.shape)
    return found


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(6, 4, bias=False)
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.into(x).tanh(), self.into.weight.t(), self.bias)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.SiLU(), nn.Linear(5, 6)),
    "relu": lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 6), nn.Softplus()),
    "residual": lambda: nn.Sequential(Residual(), Residual()),
    "dropout": lambda: nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 6)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh()
    ),
    "batch norm, eval": lambda: nn.Sequential(
        nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 6)
    ).eval(),
    "tied": Tied,
    "a layer used twice": lambda: nn.Sequential(first := nn.Linear(6, 6), nn.Tanh(), first),
    "convolution before": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 6)
    ),
}
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "mse": lambda y: F.mse_loss(y, X.flip(0)),
    "cross entropy": lambda y: F.cross_entropy(y, LABELS, label_smoothing=0.1),
    "samples meet": lambda y: y.sum(0).square().mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", NETWORKS)
def test_diagonals_by_the_parameters_of_networks(net: str, loss: str, rows: list[int]) -> None:
    torch.manual_seed(1)
    model = NETWORKS[net]().to(D)

    def value() -> Tensor:
        torch.manual_seed(2)  # for dropout
        return LOSSES[loss](model(X))

    grads = diaghessian(value, Params(model))
    for name, expected in by_parameters(copy.deepcopy(model), LOSSES[loss]).items():
        torch.testing.assert_close(
            grads[model.get_parameter(name)], expected, msg=lambda m, n=name: f"{n}: {m}"
        )
    if net in ("mlp", "relu", "residual", "dropout") and loss != "samples meet":
        assert sum(rows) < 60


def test_a_network_takes_as_many_products_as_its_layers_have_channels(rows: list[int]) -> None:
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)
    diaghessian(lambda: F.cross_entropy(net(X), LABELS % 3), Params(net))
    assert sum(rows) == 7 + 5 + 3


@pytest.mark.parametrize(
    "name", ["linear layer", "split, penalty", "rest by row", "from the left", "both factors, layer"]
)
def test_the_diagonal_is_differentiable(name: str, rows: list[int]) -> None:
    f, shapes, _ = FACTORED[name]
    xs = [x.requires_grad_() for x in arguments(shapes)]
    found = diaghessian(f, *xs, create_graph=True)
    weights = [torch.linspace(1, 2, x.numel(), dtype=D).view(x.shape) for x in xs]
    total = sum(((h * w).sum() for h, w in zip(found, weights, strict=True)), torch.zeros((), dtype=D))
    grads = torch.autograd.grad(total, xs)

    def scalar(*ys: Tensor) -> Tensor:
        return sum(
            ((h * w).sum() for h, w in zip(by_torch_func(f, list(ys)), weights, strict=True)),
            torch.zeros((), dtype=D),
        )

    plain = torch.func.grad(scalar, tuple(range(len(xs))))(*[x.detach() for x in xs])
    torch.testing.assert_close(grads, plain)
    assert all(not h.requires_grad for h in diaghessian(f, *xs))


def test_what_the_factor_depends_on_is_differentiated_too(rows: list[int]) -> None:
    data, w = X.clone().requires_grad_(), arguments([(6, 5)])[0]
    (h,) = diaghessian(lambda w: head(data.sin() @ w), w, create_graph=True)
    (found,) = torch.autograd.grad(h.sum(), data)

    def summed(data: Tensor) -> Tensor:
        return by_torch_func(lambda w: head(data.sin() @ w), [w])[0].sum()

    torch.testing.assert_close(found, torch.func.grad(summed)(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, rows: list[int]) -> None:
    xs = arguments([(5, 6), (5,)], dtype)
    f = lambda x: lambda w, b: (F.linear(x.to(w.dtype), w, b).tanh() @ R.to(w.dtype)).square().mean()
    found = diaghessian(f(X), *xs)
    expected = by_torch_func(f(X.to(dtype)), [x.to(D) for x in xs])
    slack = 1e-4 if dtype == torch.float32 else 0.1
    for h, e in zip(found, expected, strict=True):
        assert h.dtype == dtype
        torch.testing.assert_close(h.to(D), e, rtol=slack, atol=slack)
    assert sum(rows) == 5


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_products_come_in_chunks(chunk_size: int, rows: list[int]) -> None:
    f, shapes, few = FACTORED["linear layer"]
    xs = arguments(shapes)
    torch.testing.assert_close(list(diaghessian(f, *xs, chunk_size=chunk_size)), by_torch_func(f, xs))
    assert rows == [min(chunk_size, few - lo) for lo in range(0, few, chunk_size)]


def test_a_wrong_rule_is_noticed(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    elementwise = _alignment_rules._elementwise
    wrong = {**_alignment.RULES, "Softmax": elementwise, "SoftmaxBackwardData": elementwise}
    monkeypatch.setattr(_alignment, "RULES", wrong)
    _alignment._rule.cache_clear()
    f = lambda w: head((X @ w).softmax(0))
    xs = arguments([(6, 5)])
    try:
        with pytest.warns(UserWarning, match="contradicts.*SoftmaxBackward"):
            found = diaghessian(f, *xs)
    finally:
        _alignment._rule.cache_clear()
    torch.testing.assert_close(list(found), by_torch_func(f, xs))


def test_what_is_added_may_promote(rows: list[int]) -> None:
    (w,) = arguments([(6, 5)], torch.float32)
    of = lambda data: lambda w: head(data @ w + X[:, :5])
    (h,) = diaghessian(of(X.float()), w)
    torch.testing.assert_close(h.to(D), by_torch_func(of(X), [w.to(D)])[0], rtol=1e-4, atol=1e-4)


def test_results_have_memory_of_their_own(rows: list[int]) -> None:
    xs = arguments([(5, 6), (5,)])
    for h in diaghessian(FACTORED["linear layer"][0], *xs):
        assert h.is_contiguous()
        assert h.untyped_storage().nbytes() == h.numel() * h.element_size()


@pytest.mark.parametrize("shape", [(0, 6), (0, 4, 6)])
def test_no_samples(shape: tuple[int, ...], rows: list[int]) -> None:
    xs = arguments([(5, 6), (5,)])
    data = torch.zeros(shape, dtype=D)
    for h in diaghessian(lambda w, b: F.linear(data, w, b).tanh().sum(), *xs):
        assert not h.any()


def test_what_cancels_to_zero_is_no_mismatch(rows: list[int]) -> None:
    xs = arguments([(6, 2), (2,)])
    f = lambda w, b: F.layer_norm(X @ w + b, (2,)).cos().sum() + (X @ w).softmax(1).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diaghessian(f, *xs)
    torch.testing.assert_close(list(found), by_torch_func(f, xs), atol=1e-6, rtol=0)


def test_a_factor_that_was_written_into_is_no_factor(rows: list[int]) -> None:
    def f(w: Tensor) -> Tensor:
        data = X.clone()
        y = head(data @ w)
        data.zero_()
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        diaghessian(f, *arguments([(6, 5)]))


def test_infinite_products_are_left_to_the_plain_way(rows: list[int]) -> None:
    f = lambda w: (X @ w).sqrt().sum()  # NaN at negative numbers
    xs = arguments([(6, 5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = diaghessian(f, *xs)
    torch.testing.assert_close(list(found), by_torch_func(f, xs), equal_nan=True)


def test_small_problems_do_not_look_for_affine_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchzygote._second_order.SecondOrder.entrances", None)
    f, shapes, _ = FACTORED["linear layer"]
    diaghessian(f, *arguments(shapes))


def test_large_ones_do(products: list[int]) -> None:
    net = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 10))
    x, labels = torch.randn(64, 40), torch.arange(64) % 10
    grads = diaghessian(lambda: F.cross_entropy(net(x), labels), Params(net))
    assert sum(products) == 30
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert len(grads) == 4
