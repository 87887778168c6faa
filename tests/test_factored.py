"""Diagonals of Hessians by weights: few products with what affine maps give."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote import (
    Params,
    _affine_products,
    _alignment,
    _alignment_rules,
    _factored,
    _products,
    diaghessian,
)
from torchzygote.checkpointing import checkpointed
from torchzygote.hooks import hook

Loss = Callable[..., Tensor]

D = torch.float64
X, X3 = (
    torch.linspace(-1, 1, 48, dtype=D).sin().view(8, 6),
    torch.linspace(-2, 1, 72, dtype=D).cos().view(3, 4, 6),
)
R = torch.tensor([0.3, -0.7, 1.1, 0.2, -0.4], dtype=D)
T = torch.linspace(-1, 1, 60, dtype=D).view(2, 6, 5)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def head(h: Tensor) -> Tensor:
    """Mixes the channels, not the samples."""
    return (h.tanh() @ R).exp().mean()


def pieces(p: Tensor) -> Tensor:
    w1, b1, w2, b2 = p[:30].view(6, 5), p[30:35], p[35:50].view(5, 3), p[-3:]
    return ((X @ w1 + b1).tanh() @ w2 + b2).square().mean()


def split(p: Tensor) -> Tensor:
    w1, b1, w2, b2 = p.split([30, 5, 15, 3])
    h = F.linear(X, w1.view(5, 6), b1).sin()
    return F.cross_entropy(F.linear(h, w2.view(3, 5), b2), LABELS % 3)


def some_by_row(p: Tensor) -> Tensor:
    w1, scale, w2 = p[:30].view(6, 5), p[30:35], p[35:].view(5, 3)
    return (((X @ w1).tanh() * scale.exp()) @ w2).square().mean()


# the function, the shapes of its arguments, and how many products are taken besides the checks
FACTORED: dict[str, tuple[Loss, list[tuple[int, ...]], int]] = {
    "matrix": (lambda w: head(X @ w), [(6, 5)], 5),
    "transposed": (lambda w: head(X @ w.t()), [(5, 6)], 5),
    "from the left": (lambda w: head((w @ X.t()).t()), [(5, 6)], 5),
    "from the left, transposed": (lambda w: head((w.mT @ X.mT).mT), [(6, 5)], 5),
    "reshaped": (lambda w: head(X @ w.view(6, 5)), [(30,)], 5),
    "permuted": (lambda w: head(X @ w.permute(1, 2, 0).reshape(6, 5)), [(5, 2, 3)], 5),
    "linear layer": (lambda w, b: head(F.linear(X, w, b)), [(5, 6), (5,)], 5),
    "bias added": (lambda w, b: head(X @ w + b), [(6, 5), (5,)], 5),
    "bias in front": (lambda w, b: head(b + X @ w), [(6, 5), (1, 5)], 5),
    "bias of rows": (lambda w, b: head((w @ X.t() + b[:, None]).t()), [(5, 6), (5,)], 5),
    "bias times two": (lambda w, b: head(torch.add(X @ w, b, alpha=2)), [(6, 5), (5,)], 5),
    "addmm": (lambda w, b: head(torch.addmm(b, X, w, beta=0.5, alpha=2)), [(6, 5), (5,)], 5),
    "three axes": (lambda w, b: head(F.linear(X3, w, b)), [(5, 6), (5,)], 5),
    "three axes, no bias": (lambda w: head(F.linear(X3, w)), [(5, 6)], 5),
    "three axes, bias added": (lambda w, b: head(X3 @ w + b), [(6, 5), (5,)], 5),
    "one sample": (lambda w, b: head(F.linear(X[0], w, b)), [(5, 6), (5,)], 5),
    "matrix times vector": (lambda w: head(w @ X[0]), [(5, 6)], 5),
    "addmv": (lambda w, b: head(torch.addmv(b, w, X[0], beta=2, alpha=0.5)), [(5, 6), (5,)], 5),
    "row times matrix": (lambda w: head(X[0] @ w), [(6, 5)], 5),
    "einsum": (lambda w: head(torch.einsum("bk,ck->bc", X, w)), [(5, 6)], 5),
    "generalized linear model": (lambda w: F.softplus(X @ w).sum(), [(6,)], 1),
    "dot": (lambda w: (X[0] @ w).exp(), [(6,)], 1),
    "one channel": (lambda w, b: F.linear(X, w, b).squeeze(-1).exp().mean(), [(1, 6), (1,)], 1),
    "cross entropy": (lambda w, b: F.cross_entropy(F.linear(X, w, b), LABELS), [(5, 6), (5,)], 5),
    "layer norm": (lambda w, b: head(F.layer_norm(F.linear(X, w, b), (5,))), [(5, 6), (5,)], 5),
    "mean squares": (lambda w: F.mse_loss((X @ w).sin() @ R, X[:, 0]), [(6, 5)], 5),
    "linear but for a penalty": (lambda w: (X @ w).sum() + w.pow(3).sum(), [(6, 5)], 1),
    "penalty": (lambda w: head(X @ w) + 0.1 * w.square().sum(), [(6, 5)], 6),
    "penalty, a product": (lambda w: F.softplus(X @ w).sum() + (w * w).sum(), [(6,)], 2),
    "penalty, absolute": (lambda w: head(X @ w) + w.abs().sum(), [(6, 5)], 6),
    "penalty of both": (
        lambda w, b: head(F.linear(X, w, b)) + w.pow(4).sum() + b.cos().sum(),
        [(5, 6), (5,)],
        7,
    ),
    "penalty that mixes": (lambda w: head(X @ w) + w.sum(1).exp().sum(), [(6, 5)], 10),
    "penalty, repeated": (
        lambda w, b: head(X @ w + b) + (w * T).sum() + (b * w.detach()).square().sum(),
        [(6, 5), (5,)],
        6,
    ),
    "pieces": (pieces, [(53,)], 6),
    "split": (split, [(53,)], 8),
    "split, penalty": (lambda p: split(p) + p.square().sum(), [(53,)], 9),
    "rest by row": (some_by_row, [(50,)], 11),
    "strided": (lambda w: head(X @ w[::2]) + (X @ w[1::2]).sin().sum(), [(12, 5)], 6),
    "stacked": (lambda w: head(X @ w[0]) * head(X @ w[1]), [(2, 6, 5)], 10),
    "unbound": (lambda w: head(X @ w.unbind(2)[0]) * head(X @ w.unbind(2)[1]), [(6, 5, 2)], 10),
    "unused piece": (lambda p: head(X @ p[:30].view(6, 5)), [(40,)], 5),
}
# An element that goes two ways, samples that meet, or hooks: the plain way.
PLAIN: dict[str, tuple[Loss, list[tuple[int, ...]]]] = {
    "twice": (lambda w: ((X @ w).tanh() @ w).exp().mean(), [(6, 6)]),
    "tied": (lambda w: ((X @ w).tanh() @ w.t() - X).square().sum(), [(6, 5)]),
    "times a penalty": (lambda w: head(X @ w) * w.square().sum(), [(6, 5)]),
    "factor depends on it": (lambda w: ((X * w.square()) @ w).sum(), [(6,)]),
    "factor depends on it, linear": (lambda w: (X @ w.diag() @ w).exp().sum(), [(6,)]),
    "product with itself": (lambda w: head(w @ w @ X[:5, :5]), [(5, 5)]),
    "overlapping pieces": (lambda w: head(X @ w[:6]) + (X @ w[1:7]).sin().sum(), [(7, 5)]),
    "batch norm": (lambda w: head(F.batch_norm(X @ w, None, None, training=True)), [(6, 5)]),
    "samples meet": (lambda w: head((X @ w).softmax(0)), [(6, 5)]),
    "tokens meet": (lambda w: head((X3 @ w).mean(1)), [(6, 5)]),
    "tensor hook": (lambda w: head(bent(X @ w)), [(6, 5)]),
    "hook": (lambda w: head(hook(lambda g: 2 * g, X @ w)), [(6, 5)]),
    "checkpointed": (lambda w: checkpointed(head, X @ w), [(6, 5)]),
}


def bent(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(h):
        h.register_hook(lambda g: g * 2)
    return h


def doubled(x: Tensor) -> Tensor:
    """``x`` with twice its gradient, as the hooks above have it."""
    return 2 * x - x.detach()


ORACLES: dict[str, Loss] = {
    "tensor hook": lambda w: head(doubled(X @ w)),
    "hook": lambda w: head(doubled(X @ w)),
    "checkpointed": lambda w: head(X @ w),
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products are asked for, where even the smallest problem is worth it."""
    for module in (_factored, _affine_products):
        monkeypatch.setattr(module, "LEAST_SAVING", 0)
    monkeypatch.setattr(_factored, "LEAST_ROWS", 1)
    monkeypatch.setattr(_factored, "LEAST_BYTES", 0)
    monkeypatch.setattr(
        "torchzygote._dense_hessians.diagonals_along_batch", lambda second, _: [None] * len(second.grads)
    )
    monkeypatch.setattr("torchzygote._separable.LEAST_ROWS", 1)
    monkeypatch.setattr("torchzygote._separable.LEAST_BYTES", 0)
    monkeypatch.setattr("torchzygote._separable.LEAST_SAVING", 0)
    seen: list[int] = []
    plain = _products.vjps

    def counted(*args: Any, **kwargs: Any) -> Any:
        for chunk in plain(*args, **kwargs):
            seen.append(chunk[1] - chunk[0])
            yield chunk

    monkeypatch.setattr(_products, "vjps", counted)
    return seen


def arguments(shapes: list[tuple[int, ...]], dtype: torch.dtype = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=D).to(dtype) for shape in shapes]


def by_torch_func(f: Loss, xs: list[Tensor]) -> list[Tensor]:
    found = []
    for i, x in enumerate(xs):
        by_x = lambda v, i=i: f(*xs[:i], v, *xs[i + 1 :])
        found.append(torch.func.hessian(by_x)(x).reshape(x.numel(), -1).diagonal().reshape(x.shape))
    return found


@pytest.mark.parametrize("name", FACTORED)
def test_few_products_give_the_diagonal(name: str, rows: list[int]) -> None:
    f, shapes, products = FACTORED[name]
    xs = arguments(shapes)
    torch.testing.assert_close(list(diaghessian(f, *xs)), by_torch_func(f, xs))
    assert sum(rows) == products


@pytest.mark.parametrize("name", PLAIN)
def test_what_affine_maps_do_not_explain_goes_the_plain_way(name: str, rows: list[int]) -> None:
    f, shapes = PLAIN[name]
    xs = arguments(shapes)
    found = diaghessian(f, *xs)
    torch.testing.assert_close(list(found), by_torch_func(ORACLES.get(name, f), xs))
    assert sum(rows) >= sum(x.numel() for x in xs)


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


@pytest.mark.parametrize("name", ["linear layer", "split, penalty", "rest by row", "from the left"])
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
    f, shapes, products = FACTORED["linear layer"]
    xs = arguments(shapes)
    torch.testing.assert_close(list(diaghessian(f, *xs, chunk_size=chunk_size)), by_torch_func(f, xs))
    assert rows == [min(chunk_size, products - lo) for lo in range(0, products, chunk_size)]


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


def test_large_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = _products.vjps

    def counted(*args: Any, **kwargs: Any) -> Any:
        for chunk in plain(*args, **kwargs):
            sizes.append(chunk[1] - chunk[0])
            yield chunk

    monkeypatch.setattr(_products, "vjps", counted)
    net = nn.Sequential(nn.Linear(40, 20), nn.Tanh(), nn.Linear(20, 10))
    x, labels = torch.randn(64, 40), torch.arange(64) % 10
    grads = diaghessian(lambda: F.cross_entropy(net(x), labels), Params(net))
    assert sum(sizes) == 30
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert len(grads) == 4
