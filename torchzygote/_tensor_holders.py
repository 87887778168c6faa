"""Objects of this package that hold tensors and that PyTorch doesn't take for structures.

Lets low-level modules reach those tensors without importing the classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ._torch_private import pytree

__all__ = ["Holder", "each_tensor"]


class Holder:
    """What holds tensors."""

    def _with_each(self, fn: Callable[[Tensor], Tensor]) -> Any:
        """One like this, with ``fn`` of each tensor; itself, where that is the same tensors."""
        raise NotImplementedError


def each_tensor(fn: Callable[[Tensor], Tensor], y: Any) -> Any:
    """``y`` with ``fn`` of each tensor in it."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return fn(leaf)
        return leaf._with_each(fn) if isinstance(leaf, Holder) else leaf

    return pytree.tree_map(of_leaf, y)
