"""A mapping from tensors that goes by their identity: two equal tensors are two keys.

Knows nothing of what the values are for.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import Any

from torch import Tensor

from ._entries import all_equal, missing, show
from ._multi_tensor import describe

__all__ = ["IdentityMapping"]


class IdentityMapping(MutableMapping[Tensor, Any]):
    """Keys and values by the ids of the keys, which are held strongly, in the order of insertion."""

    _keys: dict[int, Tensor]
    _values: dict[int, Any]  # in the order of the keys
    # Keys that others rely on are never written to: changes are then made to a copy.
    _keys_shared: bool

    def __getitem__(self, key: Tensor) -> Any:
        try:
            return self._values[id(key)]
        except KeyError:
            raise KeyError(f"{type(self).__name__}: {missing(key)}") from None

    def __setitem__(self, key: Tensor, value: Any) -> None:
        if id(key) not in self._keys:
            self._check_new(key)
            self._before_key_change()
            self._keys[id(key)] = key
        self._values[id(key)] = value

    def _check_new(self, key: Any) -> None:
        """Refuse what can't become a key."""
        if not isinstance(key, Tensor):
            raise TypeError(f"{type(self).__name__}: expected a tensor as key, got a {type(key).__name__}")

    def __delitem__(self, key: Tensor) -> None:
        if id(key) not in self._keys:
            raise KeyError(f"{type(self).__name__}: {missing(key)}")
        self._before_key_change()
        del self._keys[id(key)], self._values[id(key)]

    def items(self) -> ItemsView[Tensor, Any]:
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        return _Values(self)

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._keys.values())

    def __reversed__(self) -> Iterator[Tensor]:
        return reversed(self._keys.values())

    def __contains__(self, key: object) -> bool:
        return id(key) in self._keys  # a key is alive, so nothing else has its id

    def _before_key_change(self) -> None:
        if self._keys_shared:
            self._keys = dict(self._keys)
            self._keys_shared = False

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        theirs = dict(zip(map(id, other.keys()), other.values(), strict=True))
        if self._keys.keys() != theirs.keys():
            return False
        mine = list(self._values.values())
        return all_equal(mine, list(map(theirs.__getitem__, self._values)))

    def __repr__(self) -> str:
        entries = [f"{self._label(key)}: {show(value)}" for key, value in self._values.items()]
        if len(entries) > 12:
            entries[10:] = [f"... {len(entries) - 10} more"]
        return f"{type(self).__name__}({{{', '.join(entries)}}})"

    def _label(self, key: int) -> str:
        return describe(self._keys[key])


class _Items(ItemsView[Tensor, Any]):
    """The entries, without a lookup for each."""

    _mapping: IdentityMapping

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return zip(self._mapping._keys.values(), self._mapping._values.values(), strict=True)


class _Values(ValuesView[Any]):
    """The values, without a lookup for each."""

    _mapping: IdentityMapping

    def __iter__(self) -> Iterator[Any]:
        return iter(self._mapping._values.values())
