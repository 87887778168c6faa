"""GradDict: a mapping from tensors, by identity, to gradients, with arithmetic.

Knows nothing of where its values come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor

from ._arithmetic import Arithmetic
from ._entries import TENSOR_TYPES, as_tensor, pairs, scalar, version_of_zeros, zeros_of
from ._identity_mapping import IdentityMapping
from ._multi_tensor import apply, apply_, clone_all
from ._operators import NEGATIVE, OPERATORS, REFLECTED
from ._tensor_holders import Holder

__all__ = ["GradDict"]

Self = TypeVar("Self", bound="GradDict")

_NONE = frozenset({type(None)})


class GradDict(Holder, Arithmetic, IdentityMapping):
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

    def __init__(self, source: Mapping[Tensor, Any] | Iterable[tuple[Tensor, Any]] = ()) -> None:
        self._keys = {}
        self._values = {}
        self._keys_shared = False
        for key, value in pairs(source, f"{type(self).__name__}: source"):
            self[key] = value

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
        """A copy with the same keys, whose values have memory of their own.

        Returns
        -------
        GradDict
            Of the same type; values that are no tensors are the same objects.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import GradDict
        >>> w = torch.zeros(2)
        >>> g = GradDict({w: torch.ones(2)})
        >>> h = g.copy()
        >>> h *= 10
        >>> g[w], h[w]
        (tensor([1., 1.]), tensor([10., 10.]))
        """
        if TENSOR_TYPES.issuperset(map(type, self._values.values())):
            return self._like(clone_all(list(self._values.values())))
        tensors = {key: v for key, v in self._values.items() if isinstance(v, Tensor)}
        copies = dict(zip(tensors, clone_all(list(tensors.values())), strict=True))
        return self._like((self._values | copies).values())

    def __copy__(self: Self) -> Self:
        return self.copy()

    def __reduce__(self) -> tuple[Any, ...]:
        # ids don't outlive the process, nor a deep copy
        return _rebuild, (type(self), list(self._keys.values()), list(self._values.values()))

    def merge_(self: Self, *others: Mapping[Tensor, Any]) -> Self:
        """Take over the entries of other mappings, the last one's where several have one.

        As with ``dict.update``, the values are the very objects of the other mapping. The ``Params`` of
        :class:`Grads` on either side stay as they are.

        Parameters
        ----------
        *others : mapping
            From tensors to values, or (tensor, value) pairs.

        Returns
        -------
        GradDict
            Itself.

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
        given = [
            other if isinstance(other, GradDict) else GradDict(pairs(other, f"merge_: argument {i}"))
            for i, other in enumerate(others)
        ]
        more = [each for each in given if each._keys is not self._keys]
        more = [each for each in more if not each._keys.keys() <= self._keys.keys()]
        for each in more:
            for key in each._keys.keys() - self._keys.keys():
                self._check_new(each._keys[key])
        if more:
            self._before_key_change()
        for each in more:
            self._keys.update(each._keys)
        for each in given:
            self._values.update(each._values)
        return self

    # -- elementwise functions ----------------------------------------------------------------------------

    def map(self: Self, fn: Callable[..., Any], *others: Mapping[Tensor, Any]) -> Self:
        """A new mapping with ``fn(value, *values of the others)`` for each key.

        Parameters
        ----------
        fn : callable
            Called with a value of this mapping and one of each other, tensors with zeros for ``None``.
        *others : mapping
            A :class:`GradDict` or any mapping with the same keys.

        Returns
        -------
        GradDict
            Of the same type and with the same keys.

        Raises
        ------
        ValueError
            The others have other keys.
        TypeError
            One of them is no mapping.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import GradDict
        >>> w = torch.zeros(3)
        >>> GradDict({w: torch.tensor([-2., 0., 2.])}).map(lambda g: g.clamp(-1, 1))[w]
        tensor([-1.,  0.,  1.])
        """
        columns = [self._without_none(self._operand(other, "map")) for other in others]
        return self._like([fn(*row) for row in zip(self._tensors(), *columns, strict=True)])

    def map_(self: Self, fn: Callable[..., Any], *others: Mapping[Tensor, Any]) -> Self:
        """As :meth:`map`, in place: each value is replaced, once all have been computed.

        Parameters
        ----------
        fn, *others
            As for :meth:`map`.

        Returns
        -------
        GradDict
            Itself.

        Raises
        ------
        ValueError, TypeError
            As for :meth:`map`; nothing is changed.

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

        Parameters
        ----------
        fn : callable
            Called with a value of this mapping and one of each other. What it returns is ignored.
        *others : mapping
            A :class:`GradDict` or any mapping with the same keys.

        Raises
        ------
        ValueError
            The others have other keys.
        TypeError
            One of them is no mapping.

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
        columns = [self._without_none(self._operand(other, "foreach")) for other in others]
        lacking = [key for key, value in self._values.items() if value is None]
        values = self._tensors()
        fresh = []
        if lacking:
            at = dict(zip(self._keys, values, strict=True))
            fresh = [(key, at[key], version_of_zeros(at[key])) for key in lacking]
        try:
            for row in zip(values, *columns, strict=True):
                fn(*row)
        finally:
            written = [(key, zeros) for key, zeros, version in fresh if version_of_zeros(zeros) != version]
            self._values.update(written)

    # -- arithmetic ---------------------------------------------------------------------------------------

    def _tensors(self) -> list[Any]:
        """The values, zeros for ``None``."""
        return self._without_none(list(self._values.values()))

    def _without_none(self, values: list[Any]) -> list[Any]:
        if _NONE.isdisjoint(map(type, values)):
            return values
        entries = zip(self._keys.values(), values, strict=True)
        return [zeros_of(key) if value is None else value for key, value in entries]

    def _operand(self, other: Mapping[Tensor, Any], symbol: str) -> list[Any]:
        """The values of ``other`` in the order of our keys."""
        if isinstance(other, GradDict) and other._keys is self._keys:
            return list(other._values.values())
        return self._matching(other, symbol)

    def _matching(self, other: Mapping[Tensor, Any], symbol: str) -> list[Any]:
        """The values of ``other``, whose keys are ours, in our order."""
        if isinstance(other, GradDict):
            theirs = other._values
        elif isinstance(other, Mapping):
            theirs = dict(zip(map(id, other.keys()), other.values(), strict=True))
        else:
            raise TypeError(f"{symbol}: expected mappings with the same keys, got a {type(other).__name__}")
        if theirs.keys() != self._keys.keys():
            left = len(theirs.keys() - self._keys.keys())
            right = len(self._keys.keys() - theirs.keys())
            raise ValueError(
                f"{symbol}: expected mappings with the same keys, got {len(self)} on the left and "
                f"{len(theirs)} on the right: the left lacks {left} of them, the right lacks {right}"
            )
        return list(map(theirs.__getitem__, self._keys))

    def _right(self, other: object, symbol: str) -> Any:
        """The right operand as the multi-tensor calls take it; ``NotImplemented`` for what isn't one."""
        if isinstance(other, Mapping):
            return self._as_tensors(self._operand(other, symbol), symbol)
        return scalar(other, symbol)

    def _left(self, symbol: str) -> list[Tensor]:
        return self._as_tensors(list(self._values.values()), symbol)

    def _as_tensors(self, values: list[Any], symbol: str) -> list[Tensor]:
        """The values as operands, zeros for ``None``; themselves, where they are."""
        if TENSOR_TYPES.issuperset(map(type, values)):
            return values
        return [
            zeros_of(key) if value is None else as_tensor(value, key, symbol)
            for key, value in zip(self._keys.values(), values, strict=True)
        ]

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
        values = list(self._values.values())
        left = self._as_tensors(values, symbol)
        results = apply_(OPERATORS[symbol], left, right, self._nth_label)
        if results is not values:  # some are replaced
            self._values.update(zip(self._keys, results, strict=True))
        return self

    def _reflected(self: Self, symbol: str, other: object) -> Self:
        left = NotImplemented if isinstance(other, Mapping) else scalar(other, symbol)
        if left is NotImplemented:
            return left  # type: ignore[no-any-return]
        return self._like(apply(REFLECTED[symbol], self._left(symbol), left, self._nth_label))

    def __pos__(self: Self) -> Self:
        return self._like(clone_all(self._left("+")))

    def __neg__(self: Self) -> Self:
        return self._like(apply(NEGATIVE, self._left("-"), 1, self._nth_label))


def _rebuild(kind: type[GradDict], keys: list[Tensor], values: list[Any]) -> GradDict:
    return kind(zip(keys, values, strict=True))
