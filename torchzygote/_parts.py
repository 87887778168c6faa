"""A result put together of many parts, as the states of a recurrence: a cotangent for each of them.

Knows nothing of what is pulled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch_private import axis_of, node_attribute, node_name, value_of_node

__all__ = ["Parts", "parts_of"]

_JOINS = {"CatBackward0": torch.cat, "StackBackward0": torch.stack}
# Pushed forward through the recorded pullback, each part is zeros of the size of the whole: with so many of
# them it takes a quarter longer (50 states of 1000 elements; twice as long with 200).
_MANY = 32


class Parts(NamedTuple):
    """``values`` stand for parts that are no constants, ``cotangents`` are theirs; ``which`` they are."""

    values: list[Tensor]
    cotangents: list[Tensor]
    which: list[int]
    y: Tensor
    shapes: list[torch.Size]

    def joined(self, products: Sequence[Tensor | None], rows: int) -> Tensor:
        """Products of shape (rows, *part's) as (rows, *y's)."""
        found: list[Tensor | None] = [None] * len(self.shapes)
        for i, product in zip(self.which, products, strict=True):
            found[i] = product
        whole = [
            self.y.new_zeros(rows, *shape) if product is None else product
            for product, shape in zip(found, self.shapes, strict=True)
        ]
        node = self.y.grad_fn
        return _JOINS[node_name(node)](whole, axis_of(node_attribute(node, "_saved_dim"), self.y.dim()) + 1)


def parts_of(y: Tensor, cotangent: Tensor) -> Parts | None:
    """The parts of ``y``, and what its cotangent gives for each, if that is the last that was recorded."""
    node: Any = y.grad_fn
    if node is None or node_name(node) not in _JOINS or len(node.next_functions) < _MANY:
        return None
    found = node(cotangent)
    if any(one.dtype != y.dtype or one.numel() == 0 for one in found):  # promoted, or left out
        return None
    which = [i for i, (source, _) in enumerate(node.next_functions) if source is not None]
    return Parts(
        [value_of_node(*node.next_functions[i]) for i in which],
        [found[i].detach().requires_grad_() for i in which],
        which,
        y,
        [one.shape for one in found],
    )
