"""Params: an ordered set of tensors, by identity.

Knows nothing of derivatives; the entry points take one in place of arguments, and Grads are bound to one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from ._buffer.refusal import NotATensor
from ._create_graph import keeps_graph
from ._members import checked, collected, collected_at_once, what
from ._multi_tensor import describe, flatten
from ._set_operations import SetOperations
from ._warning import warn

__all__ = ["Params", "finds_parameters"]


class Params(SetOperations):
    """An ordered set of tensors, by identity: what an implicit call differentiates by.

    Parameters
    ----------
    source : iterable or Module
        Floating point or complex tensors, nested iterables of them, modules (their trainable parameters,
        which keep their qualified names). A dict with string keys names what its values hold.

    Raises
    ------
    TypeError
        ``source`` is a bare tensor (it would iterate over its rows), or holds a tensor of an integer or bool
        dtype, a number, or anything else that is no tensor.

    Notes
    -----
    Two equal tensors are two members; the same tensor twice is one. Members are held strongly. The order is
    that of insertion. A ``Params`` can be changed, so it is not hashable, as Python's ``set`` isn't. Names
    that two modules share are told apart by the position of the module: ``0.weight``, ``1.weight``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import Params, gradient
    >>> w, b = torch.tensor([1., 2.]), torch.tensor(3.)
    >>> ps = Params([w, b])
    >>> len(ps), w in ps, w.clone() in ps
    (2, True, False)
    >>> gradient(lambda: (w**2).sum() + b, ps)[w]
    tensor([2., 4.])
    >>> Params(torch.nn.Linear(2, 1))
    Params([weight: float32 (1, 2), bias: float32 (1,)])

    References
    ----------
    ``Params`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """

    # No argument beside others: nothing would be differentiated by them.
    torchzygote_stands_alone = True

    __slots__ = ("__weakref__", "_shared", "_taken_from")

    # Members that a Grads relies on are never written to: changes are then made to a copy.
    _shared: bool
    _taken_from: Params | None

    def __init__(self, source: Iterable[Any] | nn.Module = ()) -> None:
        if isinstance(source, (Tensor, NotATensor)):
            given = "a bare tensor" if isinstance(source, Tensor) else "a Buffer"
            raise TypeError(
                f"Params: expected an iterable of tensors or a module, got {given}, which would iterate over "
                f"its rows; write Params([{'tensor' if isinstance(source, Tensor) else 'buf.copy()'}])"
            )
        self._members = {}
        self._names = {}
        self._shared = False
        self._taken_from = None
        if (known := collected_at_once(source)) is not None:
            self._members, self._names = known
        else:
            self._insert(collected(source))
        if not self._members and isinstance(source, Iterator):
            warn(
                "Params: got an iterator without tensors, so that nothing is differentiated; was it used up "
                "before, as model.parameters() is by one loop?"
            )

    def _insert(self, found: Iterable[tuple[Tensor, str, str]]) -> None:
        """The first members, each with its name and the one that tells it apart where two share the first."""
        new: dict[int, tuple[str, str]] = {}
        for p, name, path in found:
            if id(p) not in self._members:
                self._members[id(p)] = checked(p)
                new[id(p)] = (name, path)
        held = Counter(name for name, _ in new.values())
        names = {key: name if held[name] == 1 else path for key, (name, path) in new.items() if name}
        if len(set(names.values())) < len(names):  # a position reads as another's name
            names = {key: path for key, (name, path) in new.items() if name}
        self._names = names

    @classmethod
    def _of(cls, members: dict[int, Tensor], names: Mapping[int, str]) -> Params:
        new = Params.__new__(Params)
        new._members = members
        new._names = {key: names[key] for key in members if key in names}
        new._shared = False
        new._taken_from = None
        return new

    @classmethod
    def _taking(cls, source: Iterable[Any] | nn.Module) -> Params:
        return source if isinstance(source, Params) else Params(source)

    def _taken(self) -> Params:
        """The members as they are now, for a call: whatever is done to this one meanwhile."""
        new = Params.__new__(Params)
        self._shared = new._shared = True
        new._members, new._names = self._members, self._names
        new._taken_from = self
        return new

    def _as_given(self) -> Params:
        """What this one was taken from, as long as that hasn't changed."""
        given = self._taken_from
        return self if given is None or given._members is not self._members else given

    def _before_change(self) -> None:
        if self._shared:
            self._members, self._names = dict(self._members), dict(self._names)
            self._shared = False

    # -- a sequence of tensors ----------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._members.values())

    def __reversed__(self) -> Iterator[Tensor]:
        return reversed(self._members.values())

    def __contains__(self, p: object) -> bool:
        return id(p) in self._members  # a member is alive, so nothing else has its id

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return list(self._members.values())[index]

    def __repr__(self) -> str:
        members = [self._label(key) for key in self._members]
        if len(members) > 12:
            members[10:] = [f"... {len(members) - 10} more"]
        return f"Params([{', '.join(members)}])"

    def _label(self, key: int) -> str:
        name = self._names.get(key)
        return (f"{name}: " if name else "") + describe(self._members[key])

    # -- a set --------------------------------------------------------------------------------------------

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Whether ``other`` is a ``Params`` of the same tensors in the same order."""
        if not isinstance(other, Params):
            return NotImplemented
        return self._members is other._members or list(self._members) == list(other._members)

    def add(self, p: Tensor) -> None:
        """Add a tensor at the end, if it isn't a member yet.

        Parameters
        ----------
        p : Tensor
            Of floating or complex dtype, and any shape.

        Raises
        ------
        TypeError
            ``p`` is no tensor of floating or complex dtype; ``|`` takes modules and iterables.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b = torch.zeros(1), torch.zeros(2)
        >>> ps = Params([a])
        >>> ps.add(b)
        >>> ps.add(b)
        >>> ps.remove(a)
        >>> [len(p) for p in ps]
        [2]
        """
        if not isinstance(p, Tensor):
            raise TypeError(f"Params.add: expected a tensor, got {what(p)}; ps | other takes more than one")
        if id(p) not in self._members:
            checked(p)
            self._before_change()
            self._members[id(p)] = p

    def discard(self, p: object) -> None:
        """Remove a member; nothing happens where ``p`` isn't one.

        Parameters
        ----------
        p : object
            By identity: an equal tensor is another one.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b = torch.zeros(1), torch.zeros(2)
        >>> ps = Params([a, b])
        >>> ps.discard(a)
        >>> ps.discard(a)
        >>> [len(p) for p in ps]
        [2]
        """
        if p in self:
            self._before_change()
            del self._members[id(p)]
            self._names.pop(id(p), None)

    def remove(self, p: object) -> None:
        """Remove a member.

        Parameters
        ----------
        p : object
            By identity: an equal tensor is another one.

        Raises
        ------
        KeyError
            ``p`` is not a member.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b = torch.zeros(1), torch.zeros(2)
        >>> ps = Params([a, b])
        >>> ps.remove(a)
        >>> [len(p) for p in ps]
        [2]
        """
        if p not in self:
            raise KeyError(f"Params.remove: expected a member, got {what(p)} that isn't one")
        self.discard(p)

    # -- copies -------------------------------------------------------------------------------------------

    def copy(self) -> Params:
        """A new ``Params`` of the same tensors, which are not copied.

        Returns
        -------
        Params
            Changing either of the two doesn't change the other.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> a, b = torch.zeros(1), torch.zeros(2)
        >>> ps = Params([a])
        >>> more = ps.copy()
        >>> more.add(b)
        >>> len(ps), len(more), more[0] is a
        (1, 2, True)
        """
        return Params._of(dict(self._members), self._names)

    __copy__ = copy

    def __reduce__(self) -> tuple[Any, ...]:
        # ids don't outlive the process, nor a deep copy
        return _rebuild, (list(self), [self._names.get(key, "") for key in self._members])

    def to_vector(self) -> Tensor:
        """All members in one new vector, in order, each in row-major order.

        Returns
        -------
        Tensor
            One-dimensional, of the dtype that all members promote to, on the device of the first. It is part
            of a graph only while a differentiation by this package or by ``torch.func`` runs.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import Params
        >>> Params([torch.tensor([[1., 2.], [3., 4.]]), torch.tensor(5.)]).to_vector()
        tensor([1., 2., 3., 4., 5.])
        """
        if keeps_graph(None):
            return flatten(list(self))
        with torch.no_grad():
            return flatten(list(self))


def _rebuild(members: list[Tensor], names: list[str]) -> Params:
    by_id = {id(p): p for p in members}
    return Params._of(by_id, {id(p): name for p, name in zip(members, names, strict=True) if name})


def finds_parameters(x: object) -> bool:
    """Whether ``x`` has tensors that are found by identity: nothing gives it others in their place."""
    return isinstance(x, Params) or (isinstance(x, nn.Module) and any(True for _ in x.parameters()))
