"""Detection leaves random numbers, statistics, flags and memory that f writes into as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detection import detect_jacobian
from oracles import covers, fd_jacobian
from torch import Tensor, nn

from torchzygote import hessian, jacobian


def test_random_numbers_statistics_and_flags_are_left_as_they_were() -> None:
    layer = nn.BatchNorm1d(3)
    x = torch.rand(4, 3)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    state = torch.get_rng_state()
    detect_jacobian(lambda x: F.dropout(layer(x)), [x])
    assert torch.equal(state, torch.get_rng_state())
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    assert not x.requires_grad
    assert x.grad is None


def test_memory_that_f_writes_into_is_put_back() -> None:
    memory = torch.zeros(3)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            memory.add_(1)
            memory.copy_(x.detach())
        return x * 2

    detect_jacobian(f, [torch.rand(3)])
    assert torch.equal(memory, torch.zeros(3))


class Masked(nn.Module):
    """Writes its own buffer in each call, and multiplies with it."""

    mask: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("mask", torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        self.mask.copy_(torch.arange(x.numel()) % 2)
        return x * self.mask


def stencil(net: nn.Module) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        y = net(x)
        return y[1:] * x[:-1] + y[:-1].sin()

    return f


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_the_tape_stays_valid_where_f_writes_into_a_buffer_of_its_own(mode: str, sparse: bool) -> None:
    n = 1000
    x = torch.rand(n, dtype=torch.float64)
    mask = (torch.arange(n) % 2).double()
    expected = torch.diag(x[1:].mul(0) + mask[1:] * x[:-1], 1)[:-1] + torch.diag(mask * (x * mask).cos())[:-1]
    expected += torch.diag(mask * x)[1:].roll(-1, 1)
    (J,) = jacobian(stencil(Masked(n).double()), x, mode=mode, sparse=sparse)
    torch.testing.assert_close(J.to_dense() if sparse else J, expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_so_it_does_for_hessians(sparse: bool) -> None:
    n = 600
    x = torch.rand(n, dtype=torch.float64)
    net = Masked(n).double()
    H = hessian(lambda x: (stencil(net)(x) ** 2).sum(), x, sparse=sparse)
    mask = (torch.arange(n) % 2).double()
    plain = torch.func.hessian(lambda x: (((x * mask)[1:] * x[:-1] + (x * mask)[:-1].sin()) ** 2).sum())(x)
    torch.testing.assert_close(H.to_dense() if sparse else H, plain)


def test_each_version_counter_is_put_back() -> None:
    memory = torch.zeros(4)
    views = [memory[0], memory.data, memory[1:].detach(), torch.zeros(4)]
    before = [memory._version, *(view._version for view in views)]

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            for i in range(3):
                memory[i] = i
            views[1].add_(1)
            torch._foreach_add_([memory, views[3]], 1)
        return x * 2

    detect_jacobian(f, [torch.rand(3)])
    assert [memory._version, *(view._version for view in views)] == before
    assert torch.equal(memory, torch.zeros(4))
    assert torch.equal(views[3], torch.zeros(4))


# ---- what is read from such memory -------------------------------------------------------------------------


def read_after_writing() -> Callable[[Tensor], Tensor]:
    mask = torch.zeros(4, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        mask.copy_(torch.tensor([0.0, 1, 0, 1]))
        return x * mask

    return f


def read_between_writes() -> Callable[[Tensor], Tensor]:
    mask, other = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        mask[1].fill_(1)
        y = x * mask
        mask.copy_(torch.tensor([0.0, 0, 0, 1]))
        other.data.copy_(mask)
        y = y + x * other
        mask.zero_()
        other.zero_()
        return y

    return f


def index_written() -> Callable[[Tensor], Tensor]:
    index = torch.zeros(4, dtype=torch.int64)

    def f(x: Tensor) -> Tensor:
        index.copy_(torch.tensor([3, 2, 1, 0]))
        return x[index]

    return f


def matrix_written() -> Callable[[Tensor], Tensor]:
    matrix = torch.zeros(4, 4, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        torch.diag(torch.tensor([1.0, 0, 1, 1]).double(), out=matrix)
        return matrix @ x

    return f


@pytest.mark.parametrize("make", [read_after_writing, read_between_writes, index_written, matrix_written])
def test_structure_is_read_from_a_buffer_as_f_saw_it(make: Callable[[], Any]) -> None:
    x = torch.rand(4, dtype=torch.float64)
    (pattern,) = detect_jacobian(make(), [x])
    assert torch.equal(pattern.to_dense(), fd_jacobian(make(), x)[0] != 0)


def test_zeros_of_a_state_that_changes_from_call_to_call_are_no_structure() -> None:
    state = torch.zeros(3)

    def counted(x: Tensor) -> Tensor:
        state.add_(1)
        return x * (state - 1)

    def delayed(x: Tensor) -> Tensor:
        y = x * state
        state.fill_(1)
        return y

    for f in (counted, delayed):
        assert detect_jacobian(f, [torch.rand(3)])[0].nnz == 3


def test_what_f_makes_and_writes_behind_a_version_counter_is_dense() -> None:
    def f(x: Tensor) -> Tensor:
        mask = torch.ones(3)
        y = x * mask
        mask.data.zero_()
        return y

    assert covers(detect_jacobian(f, [torch.rand(3)])[0].to_dense(), torch.eye(3) > 0)


def test_memory_that_f_resizes_is_given_back_its_contents() -> None:
    memory = torch.ones(2)

    def f(x: Tensor) -> Tensor:
        torch.neg(x.detach(), out=memory.resize_(0))
        return x * 2

    assert detect_jacobian(f, [torch.rand(3)])[0].nnz == 3
    assert memory.shape == (3,)
