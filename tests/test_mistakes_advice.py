"""What messages advise: a result that is no scalar, lists, a function without arguments, flags, shapes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_mistakes import error_of
from torch import nn

import torchzygote as tz
from torchzygote import Buffer, Params, gradient, hessian, jacobian, pullback, pushforward, withgradient

X = torch.tensor([1.0, 2.0, 3.0])
square_sum = lambda x: (x**2).sum()


@pytest.mark.parametrize(
    ("call", "kind", "expected"),
    [
        (
            lambda: gradient(lambda x: (x.sum(), 1), X),
            TypeError,
            "pick an entry, as gradient(...)[0] where f differentiates itself, or use withgradient",
        ),
        (lambda: gradient(lambda x: gradient(square_sum, x), X), TypeError, "as gradient(...)[0]"),
        (lambda: gradient(lambda x: [x.sum()], X), TypeError, "got list; pick an entry"),
        (lambda: withgradient(lambda x: [x.sum()], X), TypeError, "got list; pick an entry"),
        (lambda: gradient(lambda x: {"a": x.sum()}, X), TypeError, "got dict; pick an entry"),
        (lambda: gradient(lambda x: None, X), TypeError, "got NoneType; does f return its result?"),
        (lambda: gradient(lambda x: x.sum().backward(), X), TypeError, "; does f return its result?"),
        (lambda: hessian(lambda x: None, X), ValueError, "got NoneType; does f return its result?"),
        (lambda: gradient(lambda x: x[:1], X), ValueError, "jacobian, or a scalar by sum() or squeeze()"),
        (lambda: jacobian(lambda x: [x[0], x[1]], X), ValueError, "got list; make it one array, as by torch"),
        (lambda: jacobian(lambda x: None, X), ValueError, "got NoneType; does f return its result?"),
    ],
)
def test_a_result_that_is_no_scalar(call: Callable[[], Any], kind: type[Exception], expected: str) -> None:
    assert expected in error_of(call, kind)


def test_withgradient_differentiates_the_first_of_a_tuple() -> None:
    assert withgradient(lambda x: (x.sum(), 1), X).grad[0].tolist() == [1, 1, 1]


def test_backward_inside_f() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        loss = (x**2).sum()
        loss.backward()
        return loss

    assert "f must not call backward() on what it returns; return the loss" in error_of(
        lambda: gradient(f, X), RuntimeError
    )


@pytest.mark.parametrize("f", [lambda x: x**2, lambda x: x.sum(), torch.sum])
def test_a_list_for_an_array(f: Callable[..., Any]) -> None:
    text = error_of(lambda: gradient(f, [1.0, 2.0]), (TypeError, AttributeError))
    assert "argument 0 is a list, and f gets it as a list of tensors; for an array, pass torch.tensor" in text
    text = error_of(lambda: gradient(lambda x: x["a"] + "b", {"a": 1.0}), TypeError)
    assert "torch.tensor(...)" not in text


def test_a_function_without_its_arguments() -> None:
    for call in (lambda: gradient(square_sum), lambda: torch.func.vmap(gradient(square_sum))(X)):
        text = error_of(call, TypeError)
        assert "gradient(f, x) gives a value; for a function, write lambda x: gradient(f, x)[0]" in text
    text = error_of(lambda: gradient(square_sum, argnums=0), ValueError)
    assert "number of arguments, 0, got 0; f's arguments come after it, as in gradient(f, x)" in text


@pytest.mark.parametrize(
    "call",
    [lambda: pullback(lambda x: x * 2, X)[1]([1.0] * 3), lambda: pushforward(square_sum, X)((1.0,) * 3)],
)
def test_a_list_of_numbers_as_a_cotangent(call: Callable[[], Any]) -> None:
    assert "pass a tensor of that shape, as torch.tensor(...)" in error_of(call, ValueError)


def test_what_a_hessian_is_not_by() -> None:
    text = error_of(lambda: hessian(lambda: square_sum(X), Params([X])), TypeError)
    assert "got Params; diaghessian takes Params" in text
    text = error_of(lambda: hessian(square_sum, torch.tensor([True])), TypeError)
    assert "torch.bool; convert it, as in x.float()" in text
    assert "opaque" not in text


FLAGGED: dict[str, Callable[..., Any]] = {
    "gradient create_graph": lambda flag: gradient(square_sum, X, create_graph=flag),
    "pullback create_graph": lambda flag: pullback(square_sum, X, create_graph=flag),
    "jacobian sparse": lambda flag: jacobian(torch.sin, X, sparse=flag),
    "jacobian verify": lambda flag: jacobian(torch.sin, X, verify=flag),
    "jacobian progress": lambda flag: jacobian(torch.sin, X, progress=flag),
    "hessian sparse": lambda flag: hessian(square_sum, X, sparse=flag),
    "hessian create_graph": lambda flag: hessian(square_sum, X, create_graph=flag),
    "diaghessian progress": lambda flag: tz.diaghessian(square_sum, X, progress=flag),
    "plan_jacobian verify": lambda flag: tz.plan_jacobian(torch.sin, X, verify=flag),
    "plan_hessian verify": lambda flag: tz.plan_hessian(square_sum, X, verify=flag),
}


@pytest.mark.parametrize("name", FLAGGED)
def test_flags_are_true_or_false(name: str) -> None:
    flag = name.split()[1]
    for wrong in ("no", 1, [True]):
        text = error_of(lambda: FLAGGED[name](wrong), TypeError)
        assert f"{flag}: expected True or False, got {wrong!r}" in text
    if flag != "progress":
        FLAGGED[name](np.bool_(True))


def test_operators_in_place_are_called_by_their_name() -> None:
    model = nn.Linear(3, 1)
    grads = gradient(lambda: model(X).sum(), Params(model))
    kinds = (TypeError, ValueError)
    for wrong in ({model.weight: X}, torch.ones(2)):
        assert error_of(lambda: operator.iadd(grads, wrong), kinds).startswith("+=: ")
        assert error_of(lambda: operator.add(grads, wrong), kinds).startswith("+: ")


def test_a_buffer_of_a_shape() -> None:
    assert "for this shape, write Buffer(torch.zeros(2, 3))" in error_of(lambda: Buffer((2, 3)), TypeError)
    assert "start with Buffer() and append" in error_of(lambda: Buffer([X]), TypeError)


def test_an_iterator_that_is_used_up() -> None:
    parameters = nn.Linear(1, 1).parameters()
    assert len(Params(parameters)) == 2
    with pytest.warns(UserWarning, match="an iterator without tensors.*was it used up") as caught:
        assert len(Params(parameters)) == 0
    assert caught[0].filename == __file__
    for empty in ((), [], nn.ReLU()):  # on purpose, no iterators
        assert len(Params(empty)) == 0


def test_numpys_ints_are_memory_budgets() -> None:
    try:
        tz.set_memory_budget(np.int64(1000))
        with pytest.raises(ValueError, match="positive"):
            tz.set_memory_budget(np.int32(0))
    finally:
        tz.set_memory_budget(None)


@pytest.mark.parametrize("holder", [lambda b: [b], lambda b: {"a": b}, lambda b: [[X], b]])
def test_buffers_are_no_parameters(holder: Callable[[Any], Any]) -> None:
    text = error_of(lambda: Params(holder(Buffer(X, 2))), TypeError)
    assert "got a Buffer" in text
    assert "buf.copy()" in text


@pytest.mark.parametrize(
    ("call", "kind"), [(gradient, TypeError), (jacobian, ValueError), (hessian, ValueError)]
)
def test_a_buffer_that_is_returned_is_to_be_copied(call: Callable[..., Any], kind: type[Exception]) -> None:
    text = error_of(lambda: call(lambda x: Buffer(x, 1), X), kind)
    assert "got Buffer, which is no tensor; copy it first, as in return buf.copy()" in text


def test_promoted_integers_are_told_of_where_the_backward_pass_fails() -> None:
    text = error_of(lambda: gradient(lambda x, n: x * (n // 2), 3.0, 4), RuntimeError)
    assert "argument 1" in text
    assert "argnums" in text
    close = gradient(lambda x, n: x * (n // 2), 3.0, 4, argnums=0)[0]
    assert close == 2
