"""GradDict: a mapping from tensors, by identity, to gradients, with arithmetic.

Knows nothing of where its values come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from torch import Tensor

from ._entries import TENSOR_TYPES, as_tensor, equal, missing, pairs, scalar, show, version_of, zeros_of
from ._holder import Holder
from ._multi_tensor import apply, apply_, clone_all, describe
from ._operators import NEGATIVE, OPERATORS, REFLECTED

__all__ = ["GradDict"]

Self = TypeVar("Self", bound="GradDict")


class GradDict(Holder, MutableMapping[Tensor, Any]):
    """A mapping from tensor to value that goes by the identity of its keys, with arithmetic.

    Parameters
    ----------
    source : mapping or iterable of pairs, optional
        What it starts with: keys are tensors, values mostly tensors or ``None``.

    Raises
    ------
    TypeError
        A key is not a tensor. In arithmetic: an operand or a value that isn't a number, tensor or ``None``.
    ValueError
        In arithmetic between mappings: the key sets differ, or two values don't fit in shape or device.
        Nothing is changed then.

    Notes
    -----
    Iterating gives the keys, in the order of insertion; they are held strongly.

    ``+ - * / **`` take a number, a 0-dim tensor, another ``GradDict`` or any mapping with the same keys, and
    keep the left operand's type and keys; with a number or a 0-dim tensor on the left they work as well.
    ``None`` counts as zeros like its key. ``+= -= *= /=`` and ``**=`` write into the values' memory. A value
    that can't be written into (expanded, sparse, lazily conjugated, overlapping another value, part of a
    graph, made in inference mode) is replaced by a new one instead. Each operation is one multi-tensor call
    per device and dtype.

    ``==`` says whether two mappings have the same keys and equal values.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import GradDict
    >>> v, w = torch.zeros(2), torch.zeros(2)
    >>> g = GradDict({v: torch.tensor([1., 2.]), w: None})
    >>> len(g), v in g, torch.zeros(2) in g
    (2, True, False)
    >>> h = 2 * g + {v: torch.ones(2), w: torch.ones(2)}
    >>> h[v], h[w]
    (tensor([3., 5.]), tensor([1., 1.]))
    >>> h
    GradDict({float32 (2,): float32 (2,), float32 (2,): float32 (2,)})

    References
    ----------
    ``Grads`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """

    # NumPy leaves `np.float64(2) * g` to __rmul__.
    __array_ufunc__ = None

    _keys: dict[int, Tensor]
    _values: dict[int, Any]  # in the order of the keys
    # Keys that others rely on are never written to: changes are then made to a copy.
    _keys_shared: bool

    def __init__(self, source: Mapping[Tensor, Any] | Iterable[tuple[Tensor, Any]] = ()) -> None:
        self._keys = {}
        self._values = {}
        self._keys_shared = False
        for key, value in pairs(source, f"{type(self).__name__}: source"):
            self[key] = value

    # -- a mapping ----------------------------------------------------------------------------------------

    def __getitem__(self, key: Tensor) -> Any:
        try:
            return self._values[id(key)]
        except KeyError:
            raise KeyError(f"{type(self).__name__}: {missing(key)}") from None

    def __setitem__(self, key: Tensor, value: Any) -> None:
        if id(key) not in self._keys:
            if not isinstance(key, Tensor):
                raise TypeError(
                    f"{type(self).__name__}: expected a tensor as key, got a {type(key).__name__}"
                )
            self._before_key_change()
            self._keys[id(key)] = key
        self._values[id(key)] = value

    def __delitem__(self, key: Tensor) -> None:
        if id(key) not in self._keys:
            raise KeyError(f"{type(self).__name__}: {missing(key)}")
        self._before_key_change()
        del self._keys[id(key)], self._values[id(key)]

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
        theirs = {id(key): value for key, value in other.items()}
        return self._keys.keys() == theirs.keys() and all(
            equal(value, theirs[key]) for key, value in self._values.items()
        )

    def __repr__(self) -> str:
        entries = [f"{self._label(key)}: {show(value)}" for key, value in self._values.items()]
        if len(entries) > 12:
            entries[10:] = [f"... {len(entries) - 10} more"]
        return f"{type(self).__name__}({{{', '.join(entries)}}})"

    def _label(self, key: int) -> str:
        return describe(self._keys[key])

    # -- making more of the same kind ---------------------------------------------------------------------

    def _like(self: Self, values: Iterable[Any]) -> Self:
        """The same type and keys, with other values."""
        new = type(self).__new__(type(self))
        self._keys_shared = True
        new.__dict__.update(self.__dict__)
        new._values = dict(zip(self._keys, values, strict=True))
        return new

    def _with_each(self: Self, fn: Callable[[Tensor], Tensor]) -> Self:
        values = [fn(v) if isinstance(v, Tensor) else v for v in self._values.values()]
        same = all(new is old for new, old in zip(values, self._values.values(), strict=True))
        return self if same else self._like(values)

    def copy(self: Self) -> Self:
        """A copy with the same keys, whose values have memory of their own."""
        tensors = {key: v for key, v in self._values.items() if isinstance(v, Tensor)}
        copies = dict(zip(tensors, clone_all(list(tensors.values())), strict=True))
        return self._like((self._values | copies).values())

    def __copy__(self: Self) -> Self:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        # ids don't outlive the process, nor a deep copy
        return _rebuild, (type(self), list(self._keys.values()), list(self._values.values()))

    def merge_(self: Self, *others: Mapping[Tensor, Any]) -> Self:
        """Take over the entries of other mappings, the last one's where several have one; returns itself.

        As with ``dict.update``, the values are the very objects of the other mapping. The ``Params`` of
        :class:`Grads` on either side stay as they are.

        Raises
        ------
        TypeError
            One is neither a mapping nor (tensor, value) pairs, or a key is no tensor; nothing is changed.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import GradDict
        >>> v, w = torch.zeros(1), torch.zeros(1)
        >>> list(GradDict({v: 1}).merge_({w: 2}, {v: 3}).values())
        [3, 2]
        """
        given = [list(pairs(other, f"merge_: argument {i}")) for i, other in enumerate(others)]
        merged = GradDict(entry for entries in given for entry in entries)  # refuses what is no key
        for key, value in merged.items():
            self[key] = value
        return self

    # -- elementwise functions ----------------------------------------------------------------------------

    def map(self: Self, fn: Callable[..., Any], *others: Mapping[Tensor, Any]) -> Self:
        """A new mapping with ``fn(value, *values of the others)`` for each key.

        Raises
        ------
        ValueError
            The others have other keys.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import GradDict
        >>> w = torch.zeros(3)
        >>> GradDict({w: torch.tensor([-2., 0., 2.])}).map(lambda g: g.clamp(-1, 1))[w]
        tensor([-1.,  0.,  1.])
        """
        columns = [self._operand(other, "map") for other in others]
        return self._like([fn(*row) for row in zip(self._tensors(), *columns, strict=True)])

    def map_(self: Self, fn: Callable[..., Any], *others: Mapping[Tensor, Any]) -> Self:
        """The same in place: each value is replaced, once all have been computed; returns itself.

        Raises
        ------
        ValueError
            The others have other keys; nothing is changed.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import GradDict
        >>> w = torch.zeros(2)
        >>> GradDict({w: torch.ones(2)}).map_(torch.add, {w: torch.tensor([1., 2.])})[w]
        tensor([2., 3.])
        """
        mapped = self.map(fn, *others)._values
        self._values.update(mapped)
        return self

    def foreach(self, fn: Callable[..., Any], *others: Mapping[Tensor, Any]) -> None:
        """Call ``fn(value, *values of the others)`` for each key, for its effects on the value.

        A ``None`` is passed as zeros, which become the value if ``fn`` writes into them.

        Raises
        ------
        ValueError
            The others have other keys.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import GradDict
        >>> w = torch.zeros(2)
        >>> g = GradDict({w: None})
        >>> g.foreach(lambda value, other: value.copy_(other), {w: torch.tensor([1., 2.])})
        >>> g[w]
        tensor([1., 2.])
        """
        columns = [self._operand(other, "foreach") for other in others]
        values = self._tensors()
        fresh = [
            (key, zeros, version_of(zeros))
            for (key, value), zeros in zip(self._values.items(), values, strict=True)
            if value is None
        ]
        try:
            for row in zip(values, *columns, strict=True):
                fn(*row)
        finally:
            self._values.update((key, zeros) for key, zeros, version in fresh if version_of(zeros) != version)

    # -- arithmetic ---------------------------------------------------------------------------------------

    def _tensors(self) -> list[Any]:
        """The values, zeros for ``None``."""
        return self._without_none(list(self._values.values()))

    def _without_none(self, values: list[Any]) -> list[Any]:
        if TENSOR_TYPES.issuperset(map(type, values)):
            return values
        entries = zip(self._keys.values(), values, strict=True)
        return [zeros_of(key) if value is None else value for key, value in entries]

    def _operand(self, other: Mapping[Tensor, Any], symbol: str) -> list[Any]:
        """The values of ``other`` in the order of our keys, zeros for ``None``."""
        if isinstance(other, GradDict) and other._keys is self._keys:
            return self._without_none(list(other._values.values()))
        theirs = self._matching(other, symbol)
        return self._without_none([theirs[key] for key in self._keys])

    def _matching(self, other: Mapping[Tensor, Any], symbol: str) -> dict[int, Any]:
        """The values of ``other`` by the ids of its keys, which are ours."""
        if isinstance(other, GradDict):
            theirs = other._values
        elif isinstance(other, Mapping):
            theirs = {id(key): value for key, value in other.items()}
        else:
            raise TypeError(f"{symbol}: expected mappings with the same keys, got a {type(other).__name__}")
        if theirs.keys() != self._keys.keys():
            left = len(theirs.keys() - self._keys.keys())
            right = len(self._keys.keys() - theirs.keys())
            raise ValueError(
                f"{symbol}: expected mappings with the same keys, got {len(self)} on the left and "
                f"{len(theirs)} on the right: the left lacks {left} of them, the right lacks {right}"
            )
        return theirs

    def _right(self, other: object, symbol: str) -> Any:
        """The right operand as the multi-tensor calls take it; ``NotImplemented`` for what isn't one."""
        if isinstance(other, Mapping):
            return self._as_tensors(self._operand(other, symbol), symbol)
        return scalar(other, symbol)

    def _left(self, symbol: str) -> list[Tensor]:
        return self._as_tensors(self._tensors(), symbol)

    def _as_tensors(self, values: list[Any], symbol: str) -> list[Tensor]:
        if TENSOR_TYPES.issuperset(map(type, values)):
            return values
        return [as_tensor(v, key, symbol) for v, key in zip(values, self._keys.values(), strict=True)]

    def _nth_label(self, i: int) -> str:
        return self._label(list(self._keys)[i])

    def _combined(self: Self, symbol: str, other: object) -> Self:
        right = self._right(other, symbol)
        if right is NotImplemented:
            return right  # type: ignore[no-any-return]
        return self._like(apply(OPERATORS[symbol], self._left(symbol), right, self._nth_label))

    def _combined_(self: Self, symbol: str, other: object) -> Self:
        right = self._right(other, f"{symbol}=")
        if right is NotImplemented:
            return right  # type: ignore[no-any-return]
        values = apply_(OPERATORS[symbol], self._left(symbol), right, self._nth_label)
        self._values = dict(zip(self._keys, values, strict=True))
        return self

    def _reflected(self: Self, symbol: str, other: object) -> Self:
        left = NotImplemented if isinstance(other, Mapping) else scalar(other, symbol)
        if left is NotImplemented:
            return left  # type: ignore[no-any-return]
        return self._like(apply(REFLECTED[symbol], self._left(symbol), left))

    def __pos__(self: Self) -> Self:
        return self._like(clone_all(self._left("+")))

    def __neg__(self: Self) -> Self:
        return self._like(apply(NEGATIVE, self._left("-"), 1))

    def __add__(self: Self, other: object) -> Self:
        return self._combined("+", other)

    def __sub__(self: Self, other: object) -> Self:
        return self._combined("-", other)

    def __mul__(self: Self, other: object) -> Self:
        return self._combined("*", other)

    def __truediv__(self: Self, other: object) -> Self:
        return self._combined("/", other)

    def __pow__(self: Self, other: object) -> Self:
        return self._combined("**", other)

    def __iadd__(self: Self, other: object) -> Self:
        return self._combined_("+", other)

    def __isub__(self: Self, other: object) -> Self:
        return self._combined_("-", other)

    def __imul__(self: Self, other: object) -> Self:
        return self._combined_("*", other)

    def __itruediv__(self: Self, other: object) -> Self:
        return self._combined_("/", other)

    def __ipow__(self: Self, other: object) -> Self:
        return self._combined_("**", other)

    def __radd__(self: Self, other: object) -> Self:
        return self._reflected("+", other)

    def __rsub__(self: Self, other: object) -> Self:
        return self._reflected("-", other)

    def __rmul__(self: Self, other: object) -> Self:
        return self._reflected("*", other)

    def __rtruediv__(self: Self, other: object) -> Self:
        return self._reflected("/", other)

    def __rpow__(self: Self, other: object) -> Self:
        return self._reflected("**", other)


def _rebuild(kind: type[GradDict], keys: list[Tensor], values: list[Any]) -> GradDict:
    return kind(zip(keys, values, strict=True))
