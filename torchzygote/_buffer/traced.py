"""Writes as out-of-place operations, for what can't be read now: a tracer's tensors, indices under ``vmap``.

Knows nothing of logs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._torch_private import known_to_be_one
from .values import as_value, fit

__all__ = ["TracedStore", "out_of_place", "selected"]


def selected(whole: Tensor, index: tuple[Any, ...]) -> Tensor:
    """``whole[index]``; a 0-dim index tensor isn't asked for its value, as indexing does."""
    taken = sum(
        (item.ndim if item.dtype is torch.bool else 1)
        if isinstance(item, Tensor)
        else item not in (None, ...)
        for item in index
    )
    axis = 0
    items = []
    for item in index:
        if isinstance(item, Tensor) and item.ndim == 0 and item.dtype is not torch.bool:
            number = torch.where(item < 0, item + whole.shape[axis], item)
            whole = whole.index_select(axis, number.reshape(1))
            item = 0
        items.append(item)
        if item is Ellipsis:
            axis += whole.ndim - taken
        elif item is not None:
            axis += item.ndim if isinstance(item, Tensor) and item.dtype is torch.bool else 1
    return whole[tuple(items)]


def out_of_place(whole: Tensor, index: tuple[Any, ...], value: Tensor) -> Tensor:
    """``whole`` with ``value`` at ``index``, as a new tensor; either may be batched, the index too."""
    masks = [item for item in index if isinstance(item, Tensor) and item.dtype is torch.bool]
    if masks:
        return _masked(whole, index, masks[0], value)
    # Not index_put of the values: compiled by Inductor (PyTorch 2.13), torch.func.grad through it gives wrong
    # numbers where the whole came from a recurrence.
    count = math.prod(whole.shape)
    numbers = torch.arange(count, device=whole.device).reshape(whole.shape)
    where = selected(numbers, index)
    value = fit(value, where.shape, whole.shape)
    offsets = torch.arange(count, count + math.prod(value.shape), device=whole.device).reshape(value.shape)
    owner = numbers.reshape(-1).index_put((where.reshape(-1),), offsets.expand(where.shape).reshape(-1))
    return torch.cat([whole.reshape(-1), value.reshape(-1)]).index_select(0, owner).reshape(whole.shape)


def _masked(whole: Tensor, index: tuple[Any, ...], mask: Tensor, value: Tensor) -> Tensor:
    alone = all(
        item is mask or item is Ellipsis or (isinstance(item, slice) and item == slice(None))
        for item in index
    )
    if not alone or (index[0] is not mask):
        raise IndexError(
            "index: expected a mask alone, where it differs between examples or is traced, got it together "
            "with other indices; write the whole with torch.where"
        )
    if mask.shape != whole.shape[: mask.ndim]:
        raise IndexError(
            f"index: expected a mask of shape {tuple(whole.shape[: mask.ndim])}, got {tuple(mask.shape)}"
        )
    rest = whole.shape[mask.ndim :]
    mask = mask.reshape(tuple(mask.shape) + (1,) * len(rest)).expand(whole.shape)
    if value.ndim <= len(rest) or known_to_be_one(value.shape[0]):
        return torch.where(mask, fit(value, (1, *rest), whole.shape), whole)
    value = fit(value, (value.shape[0], *rest), whole.shape)
    return whole.masked_scatter(mask, value.expand(value.shape[0], *rest))


class TracedStore:
    """What a Buffer is under ``torch.compile``: rows as long as whole rows are written, else one tensor."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, zeros: Tensor
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        # Lists that are written into, no attributes that are set: what is set after a hook was registered,
        # the tracer forgets (PyTorch 2.13). No rows: everything is in the whole.
        self._whole = [zeros]
        self.rows: list[Any] = [None] * shape[0] if len(shape) > 0 else []

    @property
    def whole(self) -> Tensor:
        """All elements, but for the rows that have been written since."""
        return self._whole[0]

    def _row(self, index: Any) -> bool:
        return len(self.rows) > 0 and isinstance(index, int) and not isinstance(index, bool)

    def _check_row(self, index: int) -> None:
        if not -self.shape[0] <= index < self.shape[0]:
            raise IndexError(
                f"index: expected an int from {-self.shape[0]} to {self.shape[0] - 1}, for a Buffer of shape "
                f"{tuple(self.shape)}, got {index}"
            )

    def write(self, index: Any, given: Any) -> None:
        """Write a value of any kind."""
        value = as_value(given, self.dtype, self.device)
        if self._row(index):
            self._check_row(index)
            row_shape = self.shape[1:]
            self.rows[index] = fit(value, row_shape, self.shape).expand(row_shape).clone()
            return
        whole = self.assemble()
        items = index if isinstance(index, tuple) else (index,)
        self._whole[0] = out_of_place(whole, tuple(_as_index(item) for item in items), value)
        self.rows.clear()

    def read(self, index: Any) -> Tensor:
        """A fresh tensor of what the index selects."""
        if self._row(index):
            self._check_row(index)
            row = self.rows[index]
            return self.whole[index].clone() if row is None else row.clone()
        items = index if isinstance(index, tuple) else (index,)
        return selected(self.assemble(), tuple(_as_index(item) for item in items)).clone()

    def assemble(self) -> Tensor:
        """The whole."""
        if all(row is None for row in self.rows):
            return self.whole
        return torch.stack([self.whole[i] if row is None else row for i, row in enumerate(self.rows)])


def _as_index(item: Any) -> Any:
    return torch.tensor(item) if isinstance(item, list) else item
