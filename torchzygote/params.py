"""Params: an ordered set of tensors, by identity.

Knows nothing of derivatives; the entry points take one in place of arguments, and Grads are bound to one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Params"]


class Params:
    """An ordered set of tensors, by identity: what an implicit call differentiates by.

    Parameters
    ----------
    source : iterable or Module
        Floating point or complex tensors, nested iterables of them, modules (their trainable parameters,
        which keep their qualified names). A dict with string keys names what its values hold.

    Raises
    ------
    TypeError
        A bare tensor (it would iterate over its rows), a tensor of an integer or bool dtype, a number, or
        anything else that is no tensor.

    Notes
    -----
    Two equal tensors are two members; the same tensor twice is one. Members are held strongly. A ``Params``
    is mutable, hence not hashable, as Python's ``set``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import Params, gradient
    >>> w, b = torch.tensor([1., 2.]), torch.tensor(3.)
    >>> ps = Params([w, b])
    >>> len(ps), w in ps, w.clone() in ps
    (2, True, False)
    >>> grads = gradient(lambda: (w**2).sum() + b, ps)
    >>> grads[w]
    tensor([2., 4.])
    >>> Params(torch.nn.Linear(2, 1))
    Params([weight: float32 (1, 2), bias: float32 (1,)])

    References
    ----------
    ``Params`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """

    __slots__ = ("__weakref__", "_members", "_names", "_shared")

    # What a Params shares with Grads (``_shared``) is never written to: changes are made to a copy.
    _members: dict[int, Tensor]
    _names: dict[int, str]
    _shared: bool

    def __init__(self, source: Iterable[Any] | nn.Module = ()) -> None:
        self._members = {}
        self._names = {}
        self._shared = False
        if isinstance(source, Tensor):
            raise TypeError(
                "Params: expected an iterable of tensors or a module, got a bare tensor, which would iterate over its "
                "rows; write Params([tensor])"
            )
        self._collect(source, "")

    # -- collecting ---------------------------------------------------------------------------------------

    def _collect(self, source: Any, name: str) -> None:
        if isinstance(source, Tensor):
            self._insert(source, name)
        elif isinstance(source, nn.Module):
            for own, p in source.named_parameters():
                if p.requires_grad:
                    self._insert(p, f"{name}.{own}" if name else own)
        elif isinstance(source, Params):
            for key, p in source._members.items():
                self._insert(p, source._names.get(key, ""))
        elif isinstance(source, Mapping):
            for key, value in source.items():
                if isinstance(key, str):
                    self._collect(value, f"{name}.{key}" if name else key)
                else:
                    self._collect(key, "")
        elif isinstance(source, Iterable) and not isinstance(source, (str, bytes, np.ndarray)):
            for item in source:
                self._collect(item, "")
        else:
            raise TypeError(f"Params: expected tensors, got {_what(source)}")

    def _insert(self, p: Tensor, name: str) -> None:
        if not (p.dtype.is_floating_point or p.dtype.is_complex):
            raise TypeError(
                f"Params: expected tensors of floating or complex dtype, got {_what(p)}; a derivative by integers or "
                "bools doesn't exist: convert it, as in x.float()"
            )
        self._members.setdefault(id(p), p)
        if name:
            self._names.setdefault(id(p), name)

    @classmethod
    def _of(cls, members: dict[int, Tensor], names: dict[int, str]) -> Params:
        new = cls.__new__(cls)
        new._members = members
        new._names = {key: names[key] for key in members if key in names} if names else {}
        new._shared = False
        return new

    def _unshare(self) -> None:
        if self._shared:
            self._members = dict(self._members)
            self._names = dict(self._names)
            self._shared = False

    # -- a sequence ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._members.values())

    def __contains__(self, p: object) -> bool:
        return self._members.get(id(p)) is p

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        return list(self._members.values())[index]


def _what(x: object) -> str:
    if isinstance(x, Tensor):
        return f"a tensor of dtype {x.dtype} and shape {tuple(x.shape)}"
    return f"a {type(x).__name__}"
