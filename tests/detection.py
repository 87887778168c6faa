"""Patterns of plain functions of tensors, as the sparsity detection gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchzygote.sparsity.detect import DEFAULT_BUDGET, hessian_patterns, jacobian_patterns
from torchzygote.sparsity.pattern import Pattern


def detect_jacobian(
    f: Callable[..., Any],
    inputs: Sequence[Tensor],
    *,
    owned: Sequence[bool] | None = None,
    budget: int = DEFAULT_BUDGET,
) -> list[Pattern]:
    """The pattern of the Jacobian by each input."""
    return jacobian_patterns(f, inputs, owned or [True] * len(inputs), budget)[1]


def detect_hessian(
    f: Callable[..., Any], inputs: Sequence[Tensor], *, budget: int = DEFAULT_BUDGET
) -> list[Pattern]:
    """The pattern of the Hessian by each input."""
    return hessian_patterns(f, inputs, [True] * len(inputs), budget)[1]
