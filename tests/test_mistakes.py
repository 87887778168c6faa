"""What somebody new gets wrong, and what the error says: the words that help must be in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor.utils import fresh_cache

import torchzygote as tz
from torchzygote import Params, forwarddiff, gradient, hessian, jacobian, pushforward

X = torch.tensor([1.0, 2.0, 3.0])
WORKERS: list[Callable[..., Any]] = [gradient, jacobian, hessian]


def said(error: BaseException) -> str:
    """The message with its notes, which Python 3.10 has as the cause."""
    causes, last = [], error
    while last.__cause__ is not None:
        last = last.__cause__
        causes.append(str(last))
    return "\n".join([str(error), *getattr(error, "__notes__", ()), *causes])


def error_of(call: Callable[[], Any], kind: type[Exception] | tuple[type[Exception], ...]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return said(caught.value)


@pytest.mark.parametrize("worker", [gradient, jacobian])
def test_the_function_comes_first(worker: Callable[..., Any]) -> None:
    text = error_of(lambda: worker(X, torch.sum), TypeError)
    assert "f: expected a function, which comes first, got Tensor of shape (3,)" in text
    text = error_of(lambda: worker(None, 2), TypeError)
    assert "f: expected a function, which comes first, got NoneType" in text
    assert "promoted" not in text


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: tz.checkpointed(X, torch.sum), "checkpointed: f: expected a function, which comes first"),
        (lambda: tz.forwarddiff(X, torch.sum), "forwarddiff: f: expected a function, which comes first"),
        (lambda: tz.pushforward(X, torch.sum), "pushforward: f: expected a function, which comes first"),
        (lambda: hessian(X, torch.sum), "hessian: f: expected a function, which comes first, got Tensor of"),
        (lambda: hessian(torch.sum, torch.sum), "the function comes first, then x"),
        (lambda: tz.hessian_sparsity(X, torch.sum), "hessian_sparsity: f: expected a function, which comes"),
        (lambda: gradient(3, X), "gradient: f: expected a function, which comes first, got int"),
        (
            lambda: gradient(Params([X]), torch.sum),
            "gradient: f: expected a function, which comes first, got",
        ),
        (lambda: tz.pullback(X, torch.sum), "pullback: f: expected a function, which comes first"),
        (lambda: tz.jacobian(X, torch.sum), "jacobian: f: expected a function, which comes first"),
        (lambda: tz.diaghessian(X, torch.sum), "diaghessian: f: expected a function, which comes first"),
        (
            lambda: tz.jacobian_sparsity(X, torch.sum),
            "jacobian_sparsity: f: expected a function, which comes",
        ),
        (lambda: tz.plan_jacobian(X, torch.sum), "plan_jacobian: f: expected a function, which comes first"),
        (lambda: tz.plan_hessian(X, torch.sum), "plan_hessian: f: expected a function, which comes first"),
        (lambda: tz.eager_update(nn.Linear(1, 1), print), "update: expected a function update(param, grad)"),
        (lambda: tz.hook(X, torch.neg), "write hook(fn, x), the function first"),
    ],
)
def test_the_function_comes_first_everywhere(call: Callable[[], Any], expected: str) -> None:
    assert expected in error_of(call, TypeError)


def test_params_and_arguments_are_told_apart() -> None:
    params = Params([X])
    f = lambda x: x.sum()
    text = error_of(lambda: gradient(f, params), TypeError)
    assert "with Params, f is called without arguments" in text
    text = error_of(lambda: gradient(f, params, X), TypeError)
    assert "expected Params alone, in place of all arguments" in text
    text = error_of(lambda: gradient(lambda: X.sum(), X), TypeError)
    assert "given after it (1); for tensors that it closes over, pass Params([...])" in text


def test_a_type_error_from_within_f_gets_no_such_note() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (lambda a, b: a)(x)

    text = error_of(lambda: gradient(f, X), TypeError)
    assert "torchzygote" not in text


@pytest.mark.parametrize("worker", [gradient, jacobian])
@pytest.mark.parametrize("mixed", [np.ones(3), torch.ones(3, dtype=torch.float64)])
def test_differing_floating_dtypes_are_named(worker: Callable[..., Any], mixed: Any) -> None:
    text = error_of(lambda: worker(lambda w, a: (w @ a).sum(), torch.eye(3), mixed), RuntimeError)
    assert "argument 0 is float32, argument 1" in text
    assert "is float64. None is converted" in text


def test_differing_dtypes_are_named_where_one_argument_is_left_out() -> None:
    w, a = torch.eye(3), torch.ones(3, dtype=torch.float64)
    text = error_of(lambda: gradient(lambda w, a: (w @ a).sum(), w, a, argnums=0), RuntimeError)
    assert "argument 0 is float32, argument 1 is float64" in text


def test_one_dtype_gets_no_such_note() -> None:
    w = torch.eye(3, dtype=torch.float64)
    text = error_of(lambda: hessian(lambda x: (w @ x).sum(), X), RuntimeError)
    assert "torchzygote" not in text


def test_differing_dtypes_of_a_module_and_an_array_are_named() -> None:
    text = error_of(lambda: gradient(lambda m, a: m(a).sum(), nn.Linear(3, 1), np.ones((2, 3))), RuntimeError)
    assert "parameters of argument 0 are float32, argument 1, a NumPy array, is float64" in text
    assert "a.astype(numpy.float32)" in text


@pytest.mark.parametrize("worker", WORKERS)
def test_numpy_inside_f(worker: Callable[..., Any]) -> None:
    text = error_of(lambda: worker(lambda x: np.sin(x).sum(), X), RuntimeError)
    assert "write f with PyTorch's" in text


@pytest.mark.parametrize("worker", WORKERS)
def test_writing_into_an_argument(worker: Callable[..., Any]) -> None:
    text = error_of(lambda: worker(lambda x: x.mul_(2).sum(), X), RuntimeError)
    assert "write into a clone() of it, or use torchzygote.Buffer" in text
    assert X.tolist() == [1, 2, 3]


def test_a_batch_norm_in_training_mode_under_a_transform() -> None:
    model = nn.BatchNorm1d(3)
    rows = torch.ones(5, 3)
    f = lambda row: gradient(lambda row: model(row.expand(2, 3)).sum(), row)[0]
    text = error_of(lambda: torch.func.vmap(f)(rows), RuntimeError)
    assert "call module.eval()" in text
    assert "clone()" not in text
    model.eval()
    assert torch.func.vmap(f)(rows).shape == (5, 3)


def test_a_packed_sequence() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    text = error_of(lambda: gradient(lambda p: lstm(p)[0].data.sum(), packed), TypeError)
    assert "pass p.data, and let f make it again, as p._replace(data=...)" in text
    (found,) = gradient(lambda data: lstm(packed._replace(data=data))[0].data.sum(), packed.data)
    rows = packed.data.clone().requires_grad_()
    lstm(packed._replace(data=rows))[0].data.sum().backward()
    torch.testing.assert_close(found, rows.grad)


DONATES: dict[str, Callable[[Callable[[], torch.Tensor], Params], Any]] = {
    "jacobian": lambda f, ps: list(jacobian(f, ps, mode="reverse").values()),
    "pullback": lambda f, ps: list(tz.pullback(f, ps)[1](torch.ones(3, 2)).values()),
}


@pytest.mark.parametrize("worker", DONATES)
@pytest.mark.filterwarnings("ignore:rows are computed one at a time:UserWarning")
def test_a_compiled_model_whose_backward_overwrites_what_it_needs(worker: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 2))
    x = torch.randn(3, 4)
    ps = Params(model)
    # What a model's first backward pass is, alone or one of several, decides how it is compiled, and the
    # compiler's cache keeps that for the next process.
    with fresh_cache():
        torch._dynamo.reset()
        compiled = torch.compile(model)
        compiled(x).sum().backward()
        text = error_of(lambda: DONATES[worker](lambda: compiled(x), ps), RuntimeError)
        assert "set torch._functorch.config.donated_buffer = False before it is compiled" in text
        expected = list(gradient(lambda: model(x).sin().sum(), ps).values())
        torch.testing.assert_close(list(gradient(lambda: compiled(x).sin().sum(), ps).values()), expected)
        torch._dynamo.reset()
        with torch._functorch.config.patch(donated_buffer=False):  # type: ignore[attr-defined]
            compiled = torch.compile(model)
            compiled(x).sum().backward()
            found = DONATES[worker](lambda: compiled(x), ps)
        torch.testing.assert_close(found, DONATES[worker](lambda: model(x), ps))
        torch._dynamo.reset()


def test_a_memory_budget_is_a_number_of_bytes() -> None:
    assert "expected an int, a number of bytes, or None, got '1G'" in error_of(
        lambda: tz.set_memory_budget("1G"),
        TypeError,
    )


WANT_A_NUMBER: dict[str, Callable[[Any], torch.Tensor]] = {
    "leaky_relu": lambda s: nn.functional.leaky_relu(X, s).sum(),
    "full": lambda s: torch.full((3,), s).sum(),
    "dropout": lambda s: nn.functional.dropout(X, s).sum(),
    "arange": lambda s: torch.arange(0, s).sum(),
    "norm": lambda s: X.norm(s),
}


@pytest.mark.parametrize("worker", WORKERS)
@pytest.mark.parametrize("name", WANT_A_NUMBER)
def test_a_number_that_f_needs_as_one(worker: Callable[..., Any], name: str) -> None:
    text = error_of(lambda: worker(WANT_A_NUMBER[name], 0.1), TypeError)
    way = "let f close over it" if worker is hessian else "leave its position out of argnums"
    assert (
        f"argument 0, the number 0.1, reached f as a tensor. To pass an argument to f as it was given, {way}"
        in text
    )
    assert "promoted" not in text


def test_numbers_in_structures_and_beside_integers() -> None:
    f = lambda a, n, s: nn.functional.leaky_relu(X, s["slope"]).sum()
    text = error_of(lambda: gradient(f, 1.5, 2, {"slope": 0.1}), TypeError)
    assert "argument 0, the number 1.5, reached f as a tensor; a leaf of argument 2, the number 0.1" in text
    assert "argument 1, the integer 2, was promoted" in text
    gradient(f, 1.5, 2, {"slope": 0.1}, argnums=0)


def no_module(s: torch.Tensor) -> torch.Tensor:
    raise TypeError("the model must be a Module, not Tensor")


OTHERS: list[Callable[[Any], Any]] = [
    lambda s: s + "a",
    lambda s: len(s),
    lambda s: {}[s],
    lambda s: s.nothing,
    lambda s: torch.cat(X),
    lambda s: nn.functional.conv1d(X, [1, 2]),
    no_module,
]


@pytest.mark.parametrize("f", OTHERS)
def test_other_errors_say_nothing_of_numbers(f: Callable[..., Any]) -> None:
    assert "the number" not in error_of(lambda: gradient(f, 0.1), (TypeError, KeyError, AttributeError))


ARRAY = np.ones(2)


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda x: gradient(lambda x: ((x - ARRAY) ** 2).sum(), x),
        lambda x: gradient(lambda x: (ARRAY * x).sum(), x),
        lambda x: gradient(lambda x: np.sin(x).sum(), x),
        lambda x: pushforward(lambda x: x * ARRAY, x)(x),
        lambda x: gradient(lambda x: forwarddiff(lambda x: x * ARRAY, x).sum(), x),
    ],
)
@pytest.mark.filterwarnings("ignore:__array_wrap__")
def test_arrays_that_meet_tensors(differentiate: Any) -> None:
    text = error_of(lambda: differentiate(torch.ones(2)), (RuntimeError, TypeError))
    assert text.count("make a tensor of an array that f closes over") == 1


def test_arrays_that_meet_no_tensor_get_no_such_note() -> None:
    def f(x: Any) -> Any:
        return x.sum() + ARRAY.foo  # type: ignore[attr-defined]

    assert "torch.as_tensor(a)" not in error_of(lambda: gradient(f, torch.ones(2)), AttributeError)
