"""Memory that a recorded run writes into: counted, copied where it is read in between, and put back.

Knows nothing of operators or index sets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._torch_private import base_of, is_view, set_versions, version_of, weak_storage

__all__ = ["Const", "Memory"]


class Const:
    """A tensor whose derivative by the inputs is zero.

    ``seen``: computed from the inputs all the same (a mask, an index), or from what varies besides them.
    """

    __slots__ = ("_fixed", "_read", "seen", "tensor")

    def __init__(
        self, tensor: Tensor, seen: bool, fixed: bool, read: tuple[Memory, int, int] | None = None
    ) -> None:
        self.tensor = tensor
        self.seen = seen
        self._fixed = fixed
        self._read = read

    @property
    def fixed(self) -> bool:
        """Neither seen, nor random, trainable or written later, so that its zeros are zeros in every call."""
        return self._fixed and not self._changed()

    @property
    def intact(self) -> bool:
        """Whether its contents are those that the run saw: memory that was there before is put back."""
        return not self._changed() or (self._read is not None and self._read[0].was_there(self._read[1]))

    def _changed(self) -> bool:
        if self._read is None:
            return False
        memory, key, count = self._read
        return memory.writes(key) != count


class Memory:
    """The pieces of memory of one run, each by its :func:`storage_key`."""

    def __init__(self) -> None:
        # Weak references keep an address from being given to another piece of memory.
        self._alive: dict[int, Any] = {}
        self._made: set[int] = set()
        self._writes: dict[int, int] = {}
        self._was_there: set[int] = set()
        self._saved: list[tuple[Tensor, Tensor]] = []
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._copies: dict[int, tuple[int, Any]] = {}

    def keep(self, x: Tensor, key: int) -> int:
        """Have the key name this memory from now on."""
        if key not in self._alive:
            self._alive[key] = weak_storage(x)
        return key

    def made(self, x: Tensor, key: int) -> None:
        """The run has made it: nobody needs it back."""
        self._made.add(self.keep(x, key))

    def before_write(self, x: Tensor, key: int) -> None:
        """Remember what is there, unless the run has made it itself."""
        if not key or key in self._made:
            return
        if key not in self._was_there:
            self._was_there.add(self.keep(x, key))
            self._saved.append((_bytes(x, x.untyped_storage()), _bytes(x, _clone(x))))
        if not x.is_inference():
            # A view has its base's counter; what is detached shares it too, unknown to anybody.
            owner: Tensor = base_of(x) if is_view(x) else x  # type: ignore[assignment]
            self._versions.setdefault(id(owner), (owner, version_of(owner)))

    def after_write(self, keys: Iterable[int]) -> None:
        """Count it."""
        for key in keys:
            self._writes[key] = self._writes.get(key, 0) + 1

    def writes(self, key: int) -> int:
        """How often it has been written into."""
        return self._writes.get(key, 0)

    def was_there(self, key: int) -> bool:
        """Whether it was there before the run, which has written into it."""
        return key in self._was_there

    def constant(self, x: Tensor, key: int, seen: bool, fixed: bool) -> Const:
        """``x`` as it is now: a copy of it where that will be put back to something else."""
        count = self.writes(key)
        if count and key in self._was_there:
            return Const(self._copy(x, key, count), seen, fixed)
        return Const(x, seen, fixed, (self, key, count))

    def _copy(self, x: Tensor, key: int, count: int) -> Tensor:
        if self._copies.get(key, (0, None))[0] != count:
            self._copies[key] = (count, _clone(x))
        copy = torch.empty(0, dtype=x.dtype, device=x.device)
        return copy.set_(self._copies[key][1], x.storage_offset(), x.size(), x.stride())

    def undo(self) -> None:
        """Put back what the run wrote into memory that was there before."""
        for there, copy in self._saved:
            whole = torch.empty(0, dtype=torch.uint8, device=there.device).set_(there.untyped_storage())
            size = min(whole.numel(), copy.numel())  # another one where it was resized
            whole[:size].copy_(copy[:size])
        # The first of those that share a counter last: it knows what it was.
        set_versions(reversed(self._versions.values()))
        self._saved.clear()
        self._versions.clear()


def _clone(x: Tensor) -> Any:
    return x.untyped_storage().clone()  # type: ignore[no-untyped-call]


def _bytes(x: Tensor, storage: Any) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
