"""Hessians by all of the weights of one linear layer: as many products as channels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from factored_cases import FACTORED, LABELS, PLAIN, X3, D, X, arguments, everything_is_worth_it, head
from torch import Tensor

from torchzygote import diaghessian, hessian, withhessian
from torchzygote._recorded import alignment as _alignment
from torchzygote._recorded import alignment_rules as _alignment_rules


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, products: list[int]) -> list[int]:
    """How many products are asked for, where even the smallest problem is worth it."""
    everything_is_worth_it(monkeypatch)
    return products


# the function, the shape of its argument, and how many products are taken besides the checks
WHOLE: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "matrix": (lambda w: head(X @ w), (6, 5), 5),
    "transposed": (lambda w: head(X @ w.t()), (5, 6), 5),
    "from the left": (lambda w: head((w @ X.t()).t()), (5, 6), 5),
    "permuted": (lambda w: head(X @ w.permute(1, 2, 0).reshape(6, 5)), (5, 2, 3), 5),
    "three axes": (lambda w: head(F.linear(X3, w)), (5, 6), 5),
    "one sample": (lambda w: head(F.linear(X[0], w)), (5, 6), 5),
    "channels apart": (lambda w: (X @ w).exp().mean(), (6, 5), 1),
    "generalized linear model": (lambda w: F.softplus(X @ w).sum(), (6,), 1),
    "its elements moved": (lambda w: F.softplus(X @ w.t().reshape(-1)).sum(), (2, 3), 1),
    "softmax regression": (lambda w: F.cross_entropy(X @ w, LABELS), (6, 5), 5),
    "dot": (lambda w: (X[0] @ w).exp(), (6,), 1),
    "penalty": (lambda w: F.cross_entropy(X @ w, LABELS) + w.pow(4).sum(), (6, 5), 6),
    "penalty that mixes": (lambda w: head(X @ w) + w.sum(1).exp().sum(), (6, 5), 10),
}


@pytest.mark.parametrize("name", WHOLE)
def test_few_products_give_the_matrix(name: str, rows: list[int]) -> None:
    f, shape, few = WHOLE[name]
    (x,) = arguments([shape])
    value, grad, H = withhessian(f, x)
    expected = torch.func.hessian(f)(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(H, expected)
    torch.testing.assert_close(value, f(x))
    torch.testing.assert_close(grad, torch.func.grad(f)(x))
    assert H.is_contiguous()
    assert sum(rows) == few


OTHERS = [
    *((name, f, shapes) for name, (f, shapes, _) in FACTORED.items()),
    *((n, *rest) for n, rest in PLAIN.items()),
]


@pytest.mark.parametrize(
    ("f", "shapes"),
    [(f, shapes) for name, f, shapes in OTHERS if len(shapes) == 1 and "hook" not in name],
    ids=[name for name, _, shapes in OTHERS if len(shapes) == 1 and "hook" not in name],
)
def test_hessians_of_all_others(f: Any, shapes: list[tuple[int, ...]], rows: list[int]) -> None:
    (x,) = arguments(shapes)
    expected = torch.autograd.functional.hessian(f, x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(hessian(f, x), expected)


@pytest.mark.parametrize("name", ["generalized linear model", "softmax regression", "its elements moved"])
def test_the_matrix_is_differentiable(name: str, rows: list[int]) -> None:
    f, shape, _ = WHOLE[name]
    x = arguments([shape])[0].requires_grad_()
    weights = torch.linspace(1, 2, x.numel() ** 2, dtype=D).view(x.numel(), x.numel())
    total = lambda H: (H.reshape(weights.shape) * weights).sum()
    (found,) = torch.autograd.grad(total(hessian(f, x, create_graph=True)), x)
    torch.testing.assert_close(found, torch.func.grad(lambda v: total(torch.func.hessian(f)(v)))(x.detach()))
    assert not hessian(f, x).requires_grad


def test_a_wrong_rule_is_noticed(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    elementwise = _alignment_rules._elementwise
    wrong = {**_alignment.RULES, "Softmax": elementwise, "SoftmaxBackwardData": elementwise}
    monkeypatch.setattr(_alignment, "RULES", wrong)
    _alignment._rule.cache_clear()
    f = lambda w: head((X @ w).softmax(0))
    (x,) = arguments([(6, 5)])
    try:
        with pytest.warns(UserWarning, match="contradicts.*SoftmaxBackward"):
            H = hessian(f, x)
    finally:
        _alignment._rule.cache_clear()
    torch.testing.assert_close(H, torch.func.hessian(f)(x).reshape(H.shape))


def test_forward_over_reverse_is_what_it_says(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchzygote._second_order.SecondOrder.entrances", None)
    f, shape, _ = WHOLE["softmax regression"]
    (x,) = arguments([shape])
    H: Tensor = hessian(f, x, mode="forward_over_reverse")
    torch.testing.assert_close(H, torch.func.hessian(f)(x).reshape(H.shape))


@pytest.mark.parametrize("d", [40, 200])
def test_few_columns_pay_off_by_the_multiplications_that_they_take(d: int, products: list[int]) -> None:
    """What a row makes is small, but batched rows read the data again for each."""
    torch.manual_seed(0)
    data, labels = torch.randn(1000, d, dtype=D), torch.rand(1000, 1, dtype=D).round()
    closed_form = data.T @ data / 4000
    losses = {
        (d, 1): lambda w: F.binary_cross_entropy_with_logits(data @ w, labels),
        (1, d): lambda w: F.binary_cross_entropy_with_logits(F.linear(data, w), labels),
    }
    for shape, f in losses.items():
        del products[:]
        torch.testing.assert_close(hessian(f, torch.zeros(shape, dtype=D)), closed_form)
        assert sum(products) == 1
        del products[:]
        diagonal = diaghessian(f, torch.zeros(shape, dtype=D))[0]
        torch.testing.assert_close(diagonal.flatten(), closed_form.diagonal())
        assert sum(products) == 1


def test_a_few_samples_do_not(products: list[int]) -> None:
    data = torch.randn(20, 40, dtype=D)
    hessian(lambda w: F.softplus(data @ w).sum(), torch.zeros(40, 1, dtype=D))
    assert sum(products) == 40
