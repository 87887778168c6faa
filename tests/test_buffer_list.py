"""The list form of Buffer: a growing list of tensors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchzygote import Buffer, gradient, hessian, jacobian

close = torch.testing.assert_close


@pytest.mark.parametrize("make", [Buffer, lambda: Buffer([])])
def test_it_grows_and_shrinks_as_a_list_does(make: Any) -> None:
    buf = make()
    assert len(buf) == 0
    for k in range(5):
        buf.append(torch.full((k,), float(k)))
    buf[1] = torch.tensor([-1.0])
    assert buf.pop().shape == (4,)
    assert buf.pop(0).shape == (0,)
    del buf[-1]
    assert [item.tolist() for item in buf] == [[-1], [2, 2]]
    assert buf[-1].tolist() == [2, 2]
    assert [item.tolist() for item in buf[:1]] == [[-1]]
    buf.append(3)
    buf.append(np.array([1.5]))
    del buf[:2]
    assert [item.tolist() for item in copy.copy(buf)] == [3, [1.5]]


@given(
    st.lists(
        st.tuples(st.sampled_from(["append", "pop", "del", "set", "add"]), st.integers(-6, 5)), max_size=12
    )
)
def test_any_sequence_of_operations_does_what_a_list_does(operations: list[tuple[str, int]]) -> None:
    def f(x: Tensor, items: Any) -> Any:
        for k, (what, i) in enumerate(operations):
            value = torch.sin(x * (k + 1))
            if what == "append" or not -len(items) <= i < len(items):
                items.append(value)
            elif what == "pop":
                items.append(items.pop(i) * value)
            elif what == "del":
                del items[i]
            elif what == "set":
                items[i] = value * items[i - 1 if i > 0 else 0]
            else:
                items[i] = items[i] + value
        items.append(x * 0)
        return torch.stack(items.copy()).sum(0)

    x = torch.tensor([0.3, 0.8], dtype=torch.float64)
    close(f(x, Buffer()), f(x, []))
    ours, plain = (lambda x: f(x, Buffer())), (lambda x: f(x, []))
    expected = torch.func.jacrev(plain)(x)
    for mode in ("reverse", "forward"):
        close(jacobian(ours, x, mode=mode)[0], expected)
    second = torch.func.hessian(lambda x: plain(x).prod())(x)
    close(hessian(lambda x: ours(x).prod(), x), second)
    close(torch.func.hessian(lambda x: ours(x).prod())(x), second)
    points = torch.stack([x, x + 1])
    close(torch.func.vmap(ours)(points), torch.func.vmap(plain)(points))


def test_elements_are_values() -> None:
    x = torch.ones(2, requires_grad=True)
    h = x * 2
    buf = Buffer()
    buf.append(h)
    h.mul_(5)
    first = buf[0]
    buf[0] += x
    assert first.tolist() == [2, 2]
    out = torch.stack(buf.copy())
    assert out.tolist() == [[3, 3]]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [3, 3]


def test_adding_something_batched_to_something_that_is_not() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer()
        buf.append(torch.ones(()))
        buf[0] += x
        return buf.copy()[0]

    assert torch.func.vmap(f)(torch.tensor([1.0, 2.0])).tolist() == [2, 3]


def test_a_copied_list_is_frozen() -> None:
    buf = Buffer()
    buf.append(torch.ones(2))
    assert len(copy.copy(buf)) == 1
    for change in (lambda: buf.append(1), buf.pop, lambda: buf.__delitem__(0), lambda: buf.__setitem__(0, 1)):
        with pytest.raises(RuntimeError, match="copied"):
            change()
    assert len(buf) == 1
    assert "frozen" in repr(buf)


def test_bad_use_is_refused() -> None:
    buf = Buffer()
    with pytest.raises(IndexError, match="empty"):
        buf.pop()
    buf.append(torch.ones(2))
    with pytest.raises(IndexError, match="within 1 elements, got 1"):
        buf[1]
    with pytest.raises(IndexError, match="got -2"):
        buf[-2] = 1
    with pytest.raises(TypeError, match="expected an int"):
        buf[0, 1]
    with pytest.raises(TypeError, match="expected a tensor"):
        buf.append("x")
    with pytest.raises(TypeError, match="growing list"):
        Buffer(torch.zeros(2)).append(1)
    with pytest.raises(TypeError, match="growing list"):
        Buffer(torch.zeros(2)).pop()
    with pytest.raises(TypeError, match="growing list"):
        del Buffer(torch.zeros(2))[0]
    with pytest.raises(TypeError, match="append"):
        Buffer([torch.zeros(2)])
    with pytest.raises(TypeError, match="like"):
        Buffer([], 3)
    with pytest.raises(TypeError, match="like"):
        Buffer(dtype=torch.float64)


def test_numbers_become_tensors() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer()
        buf.append(1)
        for _ in range(3):
            buf.append(buf[-1] * x)
        return torch.stack(buf.copy()).sum()

    assert gradient(f, 2)[0].item() == 1 + 2 * 2 + 3 * 4


@pytest.mark.slow
def test_under_compile() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer()
        buf.append(x)
        for _ in range(3):
            buf.append(torch.sin(buf[-1]) * x)
        buf[0] = buf.pop()
        del buf[1]
        return torch.stack(buf.copy()).sum()

    x = torch.tensor([0.3, 0.8], dtype=torch.float64)
    compiled = torch.compile(lambda x: gradient(f, x)[0], fullgraph=True, backend="aot_eager")
    close(compiled(x), gradient(f, x)[0])


@pytest.mark.parametrize("name", ["shape", "ndim", "dtype", "device"])
def test_what_a_list_has_not_is_refused_in_words_that_fit(name: str) -> None:
    assert not hasattr(Buffer(), name)
    for error in (TypeError, AttributeError):
        with pytest.raises(error, match=f"^{name}: expected a Buffer with a shape, got a growing list"):
            getattr(Buffer(), name)
    with pytest.raises(TypeError, match="^size: expected a Buffer with a shape, got a growing list"):
        Buffer().size()


def test_a_list_is_true_if_there_is_anything_in_it() -> None:
    buf = Buffer()
    assert not buf
    buf.append(torch.zeros(()))
    assert buf


def test_what_is_appended_meanwhile_is_iterated_too() -> None:
    buf = Buffer()
    buf.append(3)
    seen = []
    for item in buf:
        seen.append(item.item())
        if item > 0:
            buf.append(item - 1)
    assert seen == [3, 2, 1, 0]
    seen = []
    for item in buf:
        seen.append(item.item())
        buf.pop()
    assert seen == [3, 2]


@pytest.mark.parametrize("write", ["row", "element", "append"])
def test_values_of_a_transform_that_has_ended_are_refused(write: str) -> None:
    buf = Buffer() if write == "append" else Buffer(torch.zeros(()), 3, 2)

    def inner(x: Tensor) -> Tensor:
        if write == "append":
            buf.append(x)
        else:
            buf[(0,) if write == "row" else (0, 1)] = x
        return x

    torch.func.vmap(inner)(torch.arange(4.0))
    with pytest.raises(RuntimeError, match="inside a torch.func.vmap or grad that has ended"):
        buf.copy()
