"""What detection sees through, and that what it can't see is dense."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from detection import detect_hessian, detect_jacobian
from oracles import covers, true_jacobian
from torch import Tensor

import torchzygote
from torchzygote import _hidden_derivatives
from torchzygote.sparsity.detect import hessian_sparsity


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Mixing(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(0)


@pytest.mark.parametrize("function", [StraightThrough, Mixing])
def test_a_custom_function_counts_as_dense(function: Any) -> None:
    x = torch.rand(4, dtype=torch.float64)
    (pattern,) = detect_jacobian(lambda x: function.apply(x) * 2, [x])
    assert pattern.dense
    (pattern,) = detect_hessian(lambda x: (function.apply(x) ** 2).sum(), [x])
    assert pattern.dense


def test_a_custom_function_that_the_result_does_not_depend_on_is_no_matter() -> None:
    def f(x: Tensor) -> Tensor:
        StraightThrough.apply(x)
        return x * 2

    assert detect_jacobian(f, [torch.rand(3)])[0].nnz == 3


def test_gradients_bent_by_hooks_count_as_dense() -> None:
    def hooked(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: g.flip(0))
        return y * 3

    def noted(x: Tensor) -> Tensor:
        _hidden_derivatives.out_of_sight("something")
        return x * 2

    x = torch.rand(4)
    assert detect_jacobian(hooked, [x])[0].dense
    assert detect_jacobian(noted, [x])[0].dense


def test_checkpointed_functions_are_seen_through() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: x[1:] * x[:-1], x, use_reentrant=False)

    def reentrant(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: x[1:] * x[:-1], x, use_reentrant=True)

    x = torch.rand(5, dtype=torch.float64)
    expected = true_jacobian(lambda x: x[1:] * x[:-1], x)
    for g in (f, reentrant):
        assert torch.equal(detect_jacobian(g, [x])[0].to_dense(), expected)


@torch.library.custom_op("torchzygote_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_autograd(lambda ctx, g: 2 * g)


def test_an_unknown_operator_is_dense_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(torch.utils._python_dispatch.TorchDispatchMode):
        pass

    x = torch.rand(4, dtype=torch.float64)
    with caplog.at_level(logging.DEBUG, logger="torchzygote"):
        for _ in range(2):
            (pattern,) = detect_jacobian(lambda x: torch.special.hermite_polynomial_h(x[:2], 2), [x])
    assert pattern.to_dense()[:, :2].all()
    assert not pattern.to_dense()[:, 2:].any()
    assert len(pattern.unknown) == 1
    assert "hermite" in pattern.unknown[0]
    assert sum("has no rule" in record.message for record in caplog.records) == 1


def test_a_custom_operator_is_dense() -> None:
    (pattern,) = detect_jacobian(lambda x: double(x), [torch.rand(3)])
    assert pattern.to_dense().all()


def test_an_in_place_operator_without_a_rule_taints_what_it_writes() -> None:
    def f(x: Tensor) -> Tensor:
        a = torch.zeros(3)
        torch._foreach_add_([a], [x * 2])
        return a

    x = torch.rand(3)
    assert covers(detect_jacobian(f, [x])[0].to_dense(), torch.eye(3) > 0)


def test_a_rule_that_fails_counts_as_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchzygote.sparsity import rules

    def broken(ctx: Any, call: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setitem(rules.RULES, "sin", rules.Rule(broken))
    (pattern,) = detect_jacobian(torch.sin, [torch.rand(3)])
    assert pattern.to_dense().all()
    assert pattern.unknown == ("aten.sin.default",)


def test_errors_of_f_are_its_own() -> None:
    def f(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        detect_jacobian(f, [torch.rand(3)])
    with pytest.raises(KeyError, match="mine"):
        hessian_sparsity(f, torch.rand(3))


def test_the_utilities_of_this_package() -> None:
    def buffered(x: Tensor) -> Tensor:
        buffer = torchzygote.Buffer(x)
        buffer[0] = x[0]
        for i in range(1, 4):
            buffer[i] = x[i] * x[i - 1]
        return buffer.copy()

    x = torch.rand(4, dtype=torch.float64)
    (pattern,) = detect_jacobian(buffered, [x])
    assert torch.equal(pattern.to_dense(), true_jacobian(buffered, x))
    assert detect_jacobian(lambda x: torchzygote.hook(torch.neg, x) * 2, [x])[0].dense
    (pattern,) = detect_jacobian(lambda x: torchzygote.checkpointed(torch.sin, x), [x])
    assert torch.equal(pattern.to_dense(), torch.eye(4) > 0)
    (pattern,) = detect_jacobian(lambda x: torchzygote.gradient(lambda x: (x**3).sum(), x)[0], [x])
    assert torch.equal(pattern.to_dense(), torch.eye(4) > 0)
