"""GradDict and Grads: mappings from tensors, by identity, to gradients."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from .params import Params

__all__ = ["GradDict", "Grads"]


class GradDict(MutableMapping[Tensor, Any]):
    """A mapping from tensor, by identity, to value."""

    def __init__(self, source: Any = ()) -> None:
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Any] = {}
        self.update(source)

    def __getitem__(self, key: Tensor) -> Any:
        if self._keys.get(id(key)) is not key:
            raise KeyError(key)
        return self._values[id(key)]

    def __setitem__(self, key: Tensor, value: Any) -> None:
        self._keys[id(key)] = key
        self._values[id(key)] = value

    def __delitem__(self, key: Tensor) -> None:
        del self._keys[id(key)], self._values[id(key)]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._keys.values())

    def __contains__(self, key: object) -> bool:
        return self._keys.get(id(key)) is key


class Grads(GradDict):
    """Gradients of a scalar by the tensors of a :class:`Params`."""

    def __init__(self, params: Params, flat: Sequence[Any]) -> None:
        self.params = params
        self._keys = dict(params._members)
        self._values = dict(zip(params._members, flat, strict=True))
