"""What operations give, seen as they are dispatched."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LargestResult(TorchDispatchMode):
    """Remembers how many elements the largest tensor has that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in _tensors(out)), 0)
        return out


class PeakBytes(TorchDispatchMode):
    """Remembers how many bytes of what operations gave were alive at once, at most, after any of them.

    What an operation needs within itself isn't seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        self._alive = {p: held for p, held in self._alive.items() if not held[0].expired()}
        for x in _tensors(out):
            memory = x.untyped_storage()
            if memory.data_ptr() not in before:  # nor a view
                self._alive[memory.data_ptr()] = StorageWeakRef(memory), memory.nbytes()
        self.nbytes = max(self.nbytes, sum(nbytes for _, nbytes in self._alive.values()))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
