"""Tensors on the meta device where elements are needed: told of before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from torchzygote import Buffer, Grads, Params, copy_, gradient, pullback, pushforward

X, W = torch.ones(3), torch.ones(2)
NOTHING = torch.zeros(3, device="meta")


def double(x: Tensor) -> Tensor:
    return 2 * x


def written(value: Tensor) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 3)
        buf[:] = value
        return buf.copy().sum() + x.sum()

    return f


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a source": (lambda: copy_(Params([X]), NOTHING), ValueError, "copy_: .* got src on the meta device"),
    "a destination": (
        lambda: copy_(NOTHING, Params([X])),
        ValueError,
        "copy_: .* got dst on the meta device",
    ),
    "values": (
        lambda: copy_(Grads(Params([X]), [X.clone()]), NOTHING),
        ValueError,
        "copy_: .* got src on the meta device",
    ),
    "a cotangent": (
        lambda: pullback(double, X)[1](NOTHING),
        ValueError,
        "ybar: .* got one on the meta device",
    ),
    "a tangent": (
        lambda: pushforward(double, X)(NOTHING),
        ValueError,
        "tangent .* got one on the meta device",
    ),
    "a vector": (lambda: Params([X, NOTHING]).to_vector(), ValueError, "to_vector: .* beside one on cpu"),
    "a write": (lambda: written(NOTHING)(X), TypeError, "value: .* got one on the meta device"),
    "a recorded write": (lambda: gradient(written(NOTHING), X), TypeError, "value: .* the meta device"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_elements_are_asked_for(name: str) -> None:
    attempt, kind, text = MISTAKES[name]
    with pytest.raises(kind, match=text):
        attempt()


def test_a_vector_is_not_half_written() -> None:
    vector = torch.zeros(5)
    with pytest.raises(ValueError, match="copy_: .* got a tensor of src on the meta device"):
        copy_(vector, Params([W, NOTHING]))
    assert vector.tolist() == [0] * 5


def test_shapes_alone_are_taken_where_all_are_shapes() -> None:
    assert Params([NOTHING, NOTHING.clone()]).to_vector().shape == (6,)
    assert copy_(Params([NOTHING]), X)[0] is NOTHING
    assert pullback(double, NOTHING)[1](NOTHING)[0].is_meta


def test_integers_that_a_buffer_does_not_hold() -> None:
    buf = Buffer(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"expected what a Buffer of dtype torch.int64 .* a larger number"):
        buf[0] = 2**70
    buf[0] = -(2**63)
    assert buf.copy()[0] == -(2**63)
    small = Buffer(torch.tensor([1, 2], dtype=torch.uint8))
    for value in (300, np.array([300, 1]), np.int64(-300)):
        with pytest.raises(ValueError, match="value: expected what a Buffer of dtype torch.uint8 can hold"):
            small[0:2] = value
    assert small.copy().tolist() == [0, 0]


def test_a_factor_without_a_value() -> None:
    g = gradient(lambda: (W**2).sum(), Params([W]))
    for combine in (g.__mul__, g.__imul__):
        with pytest.raises(ValueError, match="an operand with a value, got a tensor on the meta device"):
            combine(torch.ones((), device="meta"))
    assert g[W].tolist() == [2, 2]
