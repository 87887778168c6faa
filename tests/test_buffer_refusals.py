"""What a Buffer refuses: being taken for a tensor, and bad indices, values and shapes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from torchzygote import Buffer, gradient

close = torch.testing.assert_close


@pytest.mark.parametrize("first", [torch.ones(3), torch.ones(3, requires_grad=True)])
def test_a_row_must_be_dense(first: torch.Tensor) -> None:
    buf = Buffer(first, 3, 3)
    buf[0] = first * 2
    with pytest.raises(TypeError, match="expected a dense tensor, got layout torch.sparse_coo; use to_dense"):
        buf[1] = (first * 2).to_sparse()
    close(buf.copy().sum().item(), 6.0)


@pytest.mark.parametrize("first", [torch.ones(3), torch.ones(3, requires_grad=True)])
@pytest.mark.parametrize("index", [1, slice(1, 2)])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_other_kinds_of_tensors_are_refused(first: torch.Tensor, index: Any) -> None:
    """A nested tensor ended the process where another row had been written before."""
    buf = Buffer(first, 3, 3)
    buf[0] = first * 2
    layouts = (torch.strided, torch.jagged)
    nested = [torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=one) for one in layouts]
    kinds = [(one, "a nested tensor; use torch.nested.to_padded_tensor") for one in nested]
    kinds.append((torch.nn.LazyLinear(3).weight, "an uninitialized parameter; run its lazy module"))
    for value, words in kinds:
        with pytest.raises(TypeError, match=f"expected a dense tensor, got {words}"):
            buf[index] = value
    close(buf.copy().sum().item(), 6.0)


@pytest.mark.parametrize("like", [torch.ones(3), torch.ones(3, requires_grad=True), None])
def test_it_may_be_pickled_and_copied_deeply(like: torch.Tensor | None) -> None:
    buf = Buffer() if like is None else Buffer(like, 2, 3)
    if like is None:
        buf.append(torch.ones(3))
    else:
        buf[0] = like.detach() * 2
    for other in (pickle.loads(pickle.dumps(buf)), copy.deepcopy(buf)):
        other[0] = torch.zeros(3)
        close(other[0], torch.zeros(3))
        assert len(other) == len(buf)
    assert float(buf[0].sum()) > 0


# ---------------------------------------------------------------------------------------------------------
# not a tensor


@pytest.mark.parametrize(
    "use",
    [
        lambda b, x: torch.matmul(b, x),
        lambda b, x: torch.matmul(x, b),
        lambda b, x: torch.stack([b, b]),
        lambda b, x: torch.sin(b),
        lambda b, x: torch.tensor(b),
        lambda b, x: torch.as_tensor(b),
        lambda b, x: torch.asarray(b),
        lambda b, x: torch.nn.functional.linear(b, x),
        lambda b, x: b + x,
        lambda b, x: x + b,
        lambda b, x: 2 * b,
        lambda b, x: b / 2,
        lambda b, x: x @ b,
        lambda b, x: b @ x,
        lambda b, x: b**2,
        lambda b, x: -b,
        lambda b, x: abs(b),
        lambda b, x: b < 1,
        lambda b, x: x < b,
        lambda b, x: b == x,
        lambda b, x: x == b,
        lambda b, x: b != 0,
        lambda b, x: operator_iadd(b, x),
        lambda b, x: operator_iadd(x.clone(), b),
        lambda b, x: np.asarray(b),
        lambda b, x: np.sin(b),
        lambda b, x: np.ones(3) + b,
        lambda b, x: np.stack([b, b]),
        lambda b, x: b.sum(),
        lambda b, x: b.T,
        lambda b, x: x in b,
        lambda b, x: x.__setitem__(slice(None), b),
        lambda b, x: b.append(Buffer(x)) if len(b) == 0 else b.__setitem__(0, Buffer(x)),
        lambda b, x: float(b),
    ],
)
@pytest.mark.parametrize("form", ["array", "list"])
def test_it_is_not_a_tensor(use: Any, form: str) -> None:
    x = torch.ones(3)
    buf = Buffer(x) if form == "array" else Buffer()
    with pytest.raises(TypeError, match="copy it first"):
        use(buf, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda b: torch.tensor([b, b]),
        lambda b: torch.tensor((b,), dtype=torch.float64),
        lambda b: torch.as_tensor([b, b]),
        lambda b: torch.asarray([b]),
        lambda b: torch.ones(1).new_tensor([[b]]),
        lambda b: torch.Tensor([b, b]),
    ],
)
@pytest.mark.parametrize("form", ["rows", "elements", "memory", "list"])
def test_a_sequence_of_buffers_is_not_one_of_tensors(use: Any, form: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        buf = Buffer() if form == "list" else Buffer(x)
        if form == "list":
            buf.append(x[0])
        elif form == "memory":
            buf[0] = 1.0
        else:
            buf[0 if form == "rows" else slice(1)] = x[0]
        assert [len(row.shape) for row in buf] == [0] * len(buf)
        return use(buf).sum()

    batched = lambda x: torch.func.vmap(f)(x[None])
    for run in (f, lambda x: gradient(f, x), torch.func.grad(f), batched):
        with pytest.raises(TypeError, match="copy it first"):
            run(torch.ones(3))


def operator_iadd(a: Any, b: Any) -> Any:
    a += b
    return a


def test_asking_for_a_method_says_no() -> None:
    buf = Buffer(torch.zeros(2))
    assert not hasattr(buf, "sum")
    assert not hasattr(buf, "nonsense")
    assert buf == buf
    assert len({buf, buf}) == 1


# ---------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(
    ("index", "error"),
    [
        (3, IndexError),
        (-4, IndexError),
        ((0, 4), IndexError),
        ((0, 0, 0), IndexError),
        ([0, 3], IndexError),
        (torch.tensor([0, -4]), IndexError),
        ((slice(None), torch.tensor([0, 9])), IndexError),
        (torch.ones(2, dtype=torch.bool), IndexError),
        (torch.ones(3, 3, dtype=torch.bool), IndexError),
        (torch.tensor([0.0, 1.0]), IndexError),
        (slice(None, None, -1), ValueError),
        ("x", TypeError),
        (1.5, TypeError),
    ],
)
@pytest.mark.parametrize("before", [None, 0, (slice(None), 0)])
def test_a_bad_index_is_refused_and_nothing_is_written(
    index: Any, error: type[Exception], tracked: bool, before: Any
) -> None:
    x = torch.ones(4, requires_grad=tracked)
    buf = Buffer(x, 3, 4)
    if before is not None:
        buf[before] = x[0] * 2
    expected = buf[...]
    with pytest.raises(error, match="index"):
        buf[index] = x[0] * 5
    with pytest.raises(error, match="index"):
        buf[index]
    assert torch.equal(buf.copy(), expected)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("index", [0, (0, slice(None)), slice(1, 3), ([0, 1],), (slice(None), 1), ...])
def test_a_value_that_does_not_broadcast_is_refused(index: Any, tracked: bool) -> None:
    x = torch.ones(5, requires_grad=tracked)
    for error in (ValueError, RuntimeError):
        buf = Buffer(x, 3, 4)
        with pytest.raises(error, match="value: expected a shape that broadcasts"):
            buf[index] = x * 2
        assert not buf.copy().any()


@pytest.mark.parametrize("value", ["x", None, [1.0, 2.0], object()])
def test_a_value_of_another_kind_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="value: expected a tensor"):
        Buffer(torch.zeros(2))[0] = value


def test_bad_shapes_are_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="shape: expected nonnegative"):
        Buffer(x, -1)
    for shape in ((1.5,), ("3",), (True,)):
        with pytest.raises(TypeError, match="shape: expected ints"):
            Buffer(x, *shape)
    with pytest.raises(TypeError, match="like"):
        Buffer("x", 3)
    with pytest.raises(TypeError, match="dtype"):
        Buffer(x, 3, dtype="float32")


def test_a_mask_of_another_size_after_an_ellipsis_is_refused() -> None:
    for mask in (torch.zeros(0, dtype=torch.bool), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(IndexError, match="expected a mask of shape"):
            Buffer(torch.ones(()), 2, 3)[..., mask] = 1.0


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,)])
def test_it_is_neither_true_nor_false(shape: tuple[int, ...]) -> None:
    """A tensor would say what is in it, or that this is ambiguous; a list says whether it is empty."""
    buf = Buffer(torch.zeros(shape))
    for use in (bool, lambda buf: 1 if buf else 2):
        with pytest.raises(TypeError, match="copy it first"):
            use(buf)


@pytest.mark.parametrize("index", [1.5, {}, object(), 1j])
def test_what_can_not_be_an_index_is_refused_as_by_a_tensor(index: Any) -> None:
    buf = Buffer(torch.zeros(3))
    for error in (IndexError, TypeError):
        with pytest.raises(error, match="index: expected ints, slices"):
            buf[index]
