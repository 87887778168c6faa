"""Sines written as custom functions, each with some of its derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["ForwardSine", "OnceSine"]


class ForwardSine(torch.autograd.Function):
    """Without a backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        result: Tensor = tangent * ctx.saved_tensors[0].cos()
        return result


class OnceSine(ForwardSine):
    """Without a second backward."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        if g.requires_grad and torch._C._functorch.peek_interpreter_stack() is None:
            raise RuntimeError("no second backward")
        result: Tensor = g * ctx.saved_tensors[0].cos()
        return result
