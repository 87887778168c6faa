"""Arithmetic on Grads that fails at one value has changed none, and says at which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from grads_samples import BINARY, IN_PLACE
from torch import Tensor

from torchzygote import GradDict, Grads, Params, gradient

W, M, B = torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 5.0], dtype=torch.float64)
TRUTH = torch.tensor([True])


def one() -> Grads:
    return gradient(lambda: (W**2).sum() + M.sum() + (B**2).sum(), Params([W, M, B]))


def changes_nothing(g: GradDict, attempt: Callable[[], Any], kind: type[Exception], text: str) -> None:
    values = list(g.values())
    before = [v.clone() for v in values]
    with pytest.raises(kind, match=text):
        attempt()
    assert all(now is then for now, then in zip(g.values(), values, strict=True))
    assert all(torch.equal(v, was) for v, was in zip(values, before, strict=True))


@pytest.mark.parametrize("truth", [TRUTH, TRUTH.to_sparse(), TRUTH.numpy(), torch.tensor(True)])
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_bools_are_subtracted_nowhere(truth: Any) -> None:
    g = one()
    other = {W: W, M: truth, B: B}
    message = r"expected tensors of numbers for float32 \(1,\), got a bool tensor; .*x\.float"
    changes_nothing(g, lambda: IN_PLACE["-"](g, other), TypeError, f"^-=: {message}")
    changes_nothing(g, lambda: g - other, TypeError, f"^-: {message}")
    h = GradDict({W: W.clone(), M: TRUTH.clone()})
    for attempt in (lambda: h - 1, lambda: 1 - h, lambda: -h):
        changes_nothing(h, attempt, TypeError, f"^-: {message}")
    changes_nothing(h, lambda: IN_PLACE["-"](h, 1), TypeError, f"^-=: {message}")


@pytest.mark.parametrize("symbol", "+*/")
def test_bools_count_as_zero_and_one_elsewhere(symbol: str) -> None:
    g, h = one(), one()
    IN_PLACE[symbol](g, {W: W > 0, M: TRUTH, B: B > 0})
    IN_PLACE[symbol](h, {W: torch.ones(2), M: torch.ones(1), B: torch.ones(2).double()})
    assert g == h


# What PyTorch adds, or divides by a tensor, in no version: other calls have been made when it says so.
FAILING: list[tuple[str, torch.dtype, Any]] = [
    ("+", torch.float8_e5m2, 2.0),
    ("-", torch.float8_e5m2, torch.tensor(2.0)),
    ("*", torch.float8_e5m2, torch.tensor(2.0)),
    ("/", torch.complex32, torch.tensor(2.0)),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("last", [torch.float32, torch.float64])
@pytest.mark.parametrize(("symbol", "dtype", "right"), FAILING)
def test_dtypes_without_the_operation(symbol: str, dtype: torch.dtype, right: Any, last: torch.dtype) -> None:
    a, b, c = torch.zeros(2), torch.zeros(3), torch.zeros(4)
    second = torch.float32 if last is torch.float64 else torch.float64
    values = [torch.ones(2, dtype=last), torch.ones(3).to(dtype), torch.ones(4, dtype=second)]
    g = Grads(Params([a, b, c]), values)
    before = [v.float().tolist() for v in values if not v.is_complex()]
    with pytest.raises(TypeError, match=rf"^\{symbol}=: expected .*(float8|complex32)"):
        IN_PLACE[symbol](g, right)
    assert [v.float().tolist() for v in g.values() if not v.is_complex()] == before


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_values() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    w, b = torch.zeros(2), torch.zeros(1)
    g = GradDict({w: torch.ones(2, dtype=torch.float64), b: nested})
    with pytest.raises(NotImplementedError):
        g *= 2
    assert g[w].tolist() == [1, 1]


@pytest.mark.parametrize("number", [2**70, -(2**70), 2**63, 3 * 2**1000])
def test_integers_beyond_64_bits_count_as_floats(number: int) -> None:
    h, w = torch.ones(2, dtype=torch.float16), torch.ones(2)
    values = [torch.full((2,), 2.0, dtype=torch.float16), torch.full((2,), 3.0)]
    for symbol, op in BINARY.items():
        g = Grads(Params([h, w]), [v.clone() for v in values])
        if symbol != "**":
            expected = [op(v, float(number)) for v in values]
            for found in (op(g, number), IN_PLACE[symbol](g, number)):
                assert all(torch.equal(v, e) for v, e in zip(found.values(), expected, strict=True))
            changes_nothing(g, lambda g=g, symbol=symbol: IN_PLACE[symbol](g, 10**400), OverflowError, "int")


def test_float8_gradients_are_accumulated_nowhere() -> None:
    w, b = torch.ones(2), torch.ones(2).to(torch.float8_e5m2)
    w.grad, b.grad = torch.ones(2), torch.ones(2).to(torch.float8_e5m2)
    g = Grads(Params([w, b]), [torch.ones(2), torch.ones(2).to(torch.float8_e5m2)])
    kept: Tensor = w.grad
    with pytest.raises(NotImplementedError):
        g.accumulate_()
    assert w.grad is kept
    assert kept.tolist() == [1, 1]


def test_integers_that_pytorch_takes_are_taken_as_they_are() -> None:
    """Up to 64 bits without a sign."""
    key, number = torch.zeros(1), 2**63 + 2**39 + 1
    assert torch.equal((GradDict({key: key}) + number)[key], key + number)
    whole = torch.ones(1, dtype=torch.int64)
    assert (GradDict({key: whole}) * 2**63)[key].dtype is (whole * 2**63).dtype
