"""What a Buffer that has a shape says of itself, as a tensor does.

Knows nothing of where values are kept.
"""

from __future__ import annotations

from typing import Any, overload

import torch

from .growing import ListStore
from .refusal import NotTensorError

__all__ = ["ArrayForm"]


class ArrayForm:
    """Shape, dtype and device; a growing list has none."""

    __slots__ = ()

    _store: Any
    _shape: torch.Size
    _dtype: torch.dtype
    _device: torch.device

    def _array(self, what: str) -> None:
        if isinstance(self._store, ListStore):
            raise NotTensorError(
                f"{what}: expected a Buffer with a shape, got a growing list; copy it first, and stack "
                "the list that this gives"
            )

    @property
    def shape(self) -> torch.Size:
        """The shape."""
        self._array("shape")
        return self._shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        self._array("ndim")
        return len(self._shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype, which written values are converted to."""
        self._array("dtype")
        return self._dtype

    @property
    def device(self) -> torch.device:
        """The device, which written values are moved to."""
        self._array("device")
        return self._device

    @overload
    def size(self, dim: None = None) -> torch.Size: ...
    @overload
    def size(self, dim: int) -> int: ...
    def size(self, dim: int | None = None) -> Any:
        """The shape, or its size along one axis.

        Parameters
        ----------
        dim : int, optional
            The axis, counted from the end where it is negative.

        Returns
        -------
        torch.Size or int
            As ``Tensor.size`` gives.

        Raises
        ------
        TypeError
            The Buffer is a growing list, which has no shape.
        IndexError
            There is no such axis.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Buffer
        >>> buf = Buffer(torch.zeros(()), 2, 3)
        >>> buf.size(), buf.size(-1)
        (torch.Size([2, 3]), 3)
        """
        self._array("size")
        return self._shape if dim is None else self._shape[dim]
