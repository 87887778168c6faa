"""Checkpointing functions that read a Buffer from outside, which is written later."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoint_cases import Checkpoint, plainly, ways
from torch import Tensor

from torchzygote import Buffer, checkpointed, gradient


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -0.7, 1.1, 0.2], dtype=torch.float64)


W = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

DERIVATIVES = ways("gradient", "jacobian, row by row", "hessian", "func.grad")


# ---- elements that stay ------------------------------------------------------------------------------------


def row_after_row(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    buf = Buffer(x, 80, 4)  # rows are stacked on the way
    buf[0] = x
    for i in range(79):
        buf[i + 1] = checkpoint(lambda buf, i: torch.tanh(buf[i] * W), buf, i)
    return buf.copy().sum(0)


def closed_over(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    buf = Buffer(x, 3, 4)
    buf[0] = x
    for i in range(2):
        buf[i + 1] = checkpoint(lambda: torch.tanh(buf[i] * W))
    return buf.copy()[2]


def column_after_column(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    buf = Buffer(x, 4, 3)
    buf[:, 0] = x
    for i in range(2):
        buf[:, i + 1] = checkpoint(lambda: torch.tanh(buf[:, i] * W) * buf[[0, 1, 2, 3], i])
    return buf.copy()[:, 2]


def a_list(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    buf = Buffer()
    buf.append(x)
    for i in range(3):
        buf.append(checkpoint(lambda: torch.tanh(buf[i] * W) + buf[0:1][0]))
    return buf.copy()[-1]


def overwritten_before(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    buf = Buffer(x, 2, 4)
    buf[0] = x * 3
    buf[0] = x * 2
    y = checkpoint(lambda: torch.tanh(buf[0] * W))
    buf[1] = y
    return buf.copy()[1]


def written_inside(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    """Before it is read: the rerun writes the same."""
    buf = Buffer(x, 2, 4)

    def f(x: Tensor) -> Tensor:
        buf[0] = x.sin()
        return torch.tanh(buf[0] * W)

    return checkpoint(f, x)


def of_its_own(checkpoint: Checkpoint, x: Tensor) -> Tensor:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 4)
        buf[0] = x[0]
        for i in range(3):
            buf[i] = buf[i] * 2 + x[i + 1]
        return torch.exp(buf.copy() * W)

    return checkpoint(f, x)


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize(
    "body",
    [row_after_row, closed_over, column_after_column, a_list, overwritten_before, written_inside, of_its_own],
)
def test_elements_that_are_not_overwritten(body: Any, derivative: str, x: Tensor) -> None:
    expected = DERIVATIVES[derivative](lambda x: body(plainly, x), x)
    torch.testing.assert_close(DERIVATIVES[derivative](lambda x: body(checkpointed, x), x), expected)


# ---- elements that are overwritten -------------------------------------------------------------------------


def a_row(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer(x, 1, 4)
    buf[0] = x
    for _ in range(3):
        buf[0] = checkpoint(lambda: torch.tanh(buf[0] * W))
    return buf.copy()


def an_argument(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer(x, 1, 4)
    buf[0] = x
    for _ in range(3):
        buf[0] = checkpoint(lambda b: torch.tanh(b["buf"][0] * W), {"buf": buf})
    return buf.copy()


def by_a_constant(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer(x, 2, 4)
    buf[0] = x
    buf[1] = checkpoint(lambda: torch.tanh(buf[0] * W) + buf[0] * x)
    buf[0] = W
    return buf.copy()


def one_element_of_those_read(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer(x, 4)
    buf[:] = x
    buf[2] = checkpoint(lambda: torch.tanh(buf[1:] * W[1:])).sum()
    return buf.copy()


def parts_that_are_gathered(checkpoint: Checkpoint, x: Tensor) -> Any:
    """The read saves where they are, which what runs again doesn't."""
    buf = Buffer(x, 4, 3)
    buf[:] = x[:, None] * W[:3]
    y = checkpoint(lambda: torch.tanh(buf[::2, 1:] * x[0]) + buf[[3, 0], :2])
    buf[0:3] = y[0, 0]
    return buf.copy().sum(1) + checkpoint(lambda: buf[::3, ::2] * x[1]).sum()


def constants(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer(x, 4)
    buf[:] = W
    y = checkpoint(lambda: torch.tanh(buf[0:] * x))
    buf[0] = 7.0
    return y


def the_last_of_a_list(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer()
    buf.append(x)
    for _ in range(3):
        buf.append(checkpoint(lambda: torch.tanh(buf[-1] * W)))
    return buf.copy()[-1]


def how_many_of_a_list(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer()
    buf.append(x)
    for _ in range(3):
        buf.append(checkpoint(lambda: torch.stack([torch.tanh(b * W) for b in buf]).sum(0)))
    return buf.copy()[-1]


def popped(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer()
    buf.append(x)
    y = checkpoint(lambda: torch.tanh(buf[0] * W))
    buf.pop()
    return y


def written_in_place_inside(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer(x, 2, 4)
    buf[0] = x

    def f() -> Tensor:
        h = buf[0]
        h *= W
        return torch.tanh(h * buf[0])

    buf[0] = checkpoint(f)
    buf[1] = checkpoint(f)
    return buf.copy()[1]


def nested(checkpoint: Checkpoint, x: Tensor) -> Any:
    buf = Buffer(x, 2, 4)
    buf[0] = x
    for _ in range(2):
        buf[0] = checkpoint(lambda: checkpoint(lambda: torch.tanh(buf[0] * W)) * buf[0] + buf[1])
        buf[1] = buf[0] * x
    return buf.copy()[0]


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize(
    "body",
    [
        a_row,
        an_argument,
        by_a_constant,
        one_element_of_those_read,
        parts_that_are_gathered,
        constants,
        the_last_of_a_list,
        how_many_of_a_list,
        popped,
        written_in_place_inside,
        nested,
    ],
)
def test_elements_are_read_as_they_were(body: Any, derivative: str, x: Tensor) -> None:
    expected = DERIVATIVES[derivative](lambda x: body(plainly, x), x)
    torch.testing.assert_close(DERIVATIVES[derivative](lambda x: body(checkpointed, x), x), expected)


def test_a_watched_buffer_is_a_buffer_like_others(x: Tensor) -> None:
    buf, other = Buffer(x, 2, 4), Buffer(x, 2, 4)
    checkpointed(lambda x: buf[0] + x, x.requires_grad_())
    buf[0], other[0] = x, x
    assert repr(buf) == repr(other)
    assert len(buf) == 2
    assert isinstance(buf, Buffer)
    with pytest.raises(TypeError, match="copy it first"):
        buf + 1
    with pytest.raises(IndexError, match="a Buffer of shape"):
        buf[2] = x
    assert torch.equal(buf.copy(), other.copy())
    with pytest.raises(RuntimeError, match="freezes it"):
        buf[0] = x


def test_reads_of_what_was_written_keep_their_place_among_the_others() -> None:
    buf = Buffer(torch.zeros(2, dtype=torch.float64))
    buf[1] = 3.0

    def f(x: Tensor) -> Tensor:
        buf[0] = x * x
        return (buf[0] * buf[1]).sin()

    def g(x: Tensor) -> Tensor:
        y = checkpointed(f, x)
        buf[1] = 7.0
        return y

    x = torch.tensor(0.4, dtype=torch.float64)
    torch.testing.assert_close(gradient(g, x)[0], 6 * x * torch.cos(3 * x * x))
