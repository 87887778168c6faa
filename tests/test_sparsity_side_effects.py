"""Detection leaves random numbers, statistics, flags and memory that f writes into as they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote.sparsity.detect import detect_jacobian


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
