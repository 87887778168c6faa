"""What Params does as a set: unions, intersections and differences, in the order of the left one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ._members import NamedMembers
from .graddict import GradDict

__all__ = ["SetOperations"]

Self = TypeVar("Self", bound="SetOperations")


class SetOperations(NamedMembers):
    """New sets of these and others; none is changed."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Tensor]:
        raise NotImplementedError

    def copy(self: Self) -> Self:
        """A new one of the same tensors."""
        raise NotImplementedError

    @classmethod
    def _of(cls: type[Self], members: dict[int, Tensor], names: Mapping[int, str]) -> Self:
        raise NotImplementedError

    @classmethod
    def _taking(cls: type[Self], source: Any) -> Self:
        """What an operand stands for."""
        raise NotImplementedError

    def issetequal(self, other: Iterable[Any] | nn.Module) -> bool:
        """Whether the two hold the same tensors, in any order.

        Parameters
        ----------
        other : iterable or Module
            What :class:`Params` takes.

        Returns
        -------
        bool
            ``==`` asks for the same order as well, and for a :class:`Params`.

        Raises
        ------
        TypeError
            ``other`` can't be made a :class:`Params`.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b = torch.zeros(2), torch.zeros(2)
        >>> Params([a, b]) == Params([b, a]), Params([a, b]).issetequal([b, a])
        (False, True)
        """
        return self._members.keys() == self._taking(other)._members.keys()

    def union(self: Self, *others: Iterable[Any] | nn.Module) -> Self:
        """The members of this one, then what the others add; also ``|``.

        A name that this one has already is not taken over from the others.

        Parameters
        ----------
        *others : iterable or Module
            What :class:`Params` takes.

        Returns
        -------
        Params
            A new one.

        Raises
        ------
        TypeError
            One of the others can't be made a :class:`Params`.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
        >>> [len(p) for p in Params([a, b]).union([b], [c])], [len(p) for p in Params([a]) | [c]]
        ([1, 2, 3], [1, 3])
        """
        return self._union(map(self._taking, others))

    def _union(self: Self, others: Iterable[NamedMembers]) -> Self:
        new = self.copy()
        taken = set(new._names.values())
        for other in others:
            for key, p in other._members.items():
                if key not in new._members:
                    new._members[key] = p
                    name = other._names.get(key)
                    if name is not None and name not in taken:
                        taken.add(name)
                        new._names[key] = name
        return new

    def intersection(self: Self, *others: Iterable[Any] | nn.Module) -> Self:
        """The members that all the others have too, in this order; also ``&``.

        Parameters
        ----------
        *others : iterable or Module
            What :class:`Params` takes.

        Returns
        -------
        Params
            A new one.

        Raises
        ------
        TypeError
            One of the others can't be made a :class:`Params`.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
        >>> [len(p) for p in Params([a, b]).intersection([c, b])], [len(p) for p in Params([a, b]) & [a]]
        ([2], [1])
        """
        return self._kept(others, all)

    def difference(self: Self, *others: Iterable[Any] | nn.Module) -> Self:
        """The members that none of the others has, in this order; also ``-``, but for gradients.

        Parameters
        ----------
        *others : iterable or Module
            What :class:`Params` takes.

        Returns
        -------
        Params
            A new one.

        Raises
        ------
        TypeError
            One of the others can't be made a :class:`Params`.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
        >>> [len(p) for p in Params([a, b, c]).difference([b], [c])], [len(p) for p in Params([a, b]) - [a]]
        ([1], [2])
        """
        return self._kept(others, lambda held: not any(held))

    def _kept(
        self: Self, others: Iterable[Iterable[Any] | nn.Module], wanted: Callable[[Iterable[bool]], bool]
    ) -> Self:
        """The members of which it is ``wanted`` that these of the others hold them."""
        sets = [self._taking(other)._members for other in others]
        kept = {key: p for key, p in self._members.items() if wanted(key in s for s in sets)}
        return self._of(kept, self._names)

    def __or__(self: Self, other: Iterable[Any] | nn.Module) -> Self:
        return self.union(other)

    def __and__(self: Self, other: Iterable[Any] | nn.Module) -> Self:
        return self.intersection(other)

    def __sub__(self: Self, other: Iterable[Any] | nn.Module) -> Self:
        _refuse_gradients(other)
        return self.difference(other)

    def __ror__(self: Self, other: Iterable[Any] | nn.Module) -> Self:
        return self._taking(other).union(self)

    def __rand__(self: Self, other: Iterable[Any] | nn.Module) -> Self:
        return self._taking(other).intersection(self)

    def __rsub__(self: Self, other: Iterable[Any] | nn.Module) -> Self:
        _refuse_gradients(other)
        return self._taking(other).difference(self)


def _refuse_gradients(other: object) -> None:
    """A step along gradients is meant, and a difference of sets would be empty, silently."""
    if isinstance(other, GradDict):
        raise TypeError(
            f"-: expected sets of tensors, got a {type(other).__name__} beside Params; for a step by Grads "
            "gs write copy_(ps, ps.to_vector() - lr * gs.to_vector()), or gs.assign_() and an optimizer's "
            "step(); for the members without gradients ps.difference(gs)"
        )
