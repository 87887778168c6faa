"""Twice a tensor, written as custom functions, which forward mode leaves to dual numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Doubled", "DoubledOrTripled"]


class Doubled(torch.autograd.Function):
    """In every mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 2 * t


class DoubledOrTripled(Doubled):
    """Says another thing in forward mode than in reverse."""

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        return 3 * t
