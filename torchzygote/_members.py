"""What can be a member of Params, where members are found, and what is said of the rest.

Knows tensors and their names; what is done with a set of them is the business of ``params``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._arguments import is_inexact, is_number, trainable
from ._buffer.refusal import NotATensor
from ._metadata import TENSOR_TYPES
from ._multi_tensor import describe

__all__ = ["NamedMembers", "checked", "collected", "collected_at_once", "qualified", "what"]

_dtype: Callable[[Any], torch.dtype] = operator.attrgetter("dtype")


class NamedMembers:
    """Tensors by their ids, in order, and the names of those that have one."""

    __slots__ = ("_members", "_names")

    _members: dict[int, Tensor]
    _names: dict[int, str]


def checked(p: Tensor) -> Tensor:
    """``p``, if it can be a member."""
    if not is_inexact(p):
        raise TypeError(
            f"Params: expected tensors of floating or complex dtype, got {what(p)}; there is no derivative "
            "by integers or bools: convert it, as in x.float(), and let f use that"
        )
    return p


def what(x: object) -> str:
    """``x`` for a message."""
    if isinstance(x, Tensor):
        return f"a tensor {describe(x)}"
    if is_number(x):
        return f"the number {x}"
    return f"a {type(x).__name__}"


def _advice(x: object) -> str:
    """What to give in place of ``x``, which is no tensor."""
    if is_number(x):
        return ", which has no identity that f could close over: make it a tensor, as in torch.tensor(2.0)"
    if isinstance(x, (np.ndarray, np.generic)):
        return ", which f can't be differentiated by: make it a tensor, as in torch.from_numpy(x)"
    if isinstance(x, NotATensor):
        return ", whose rows f doesn't use: copy it first, as in buf.copy(), and let f use that"
    if isinstance(x, str):
        return "; for (name, tensor) pairs write Params(dict(pairs))"
    return ""


def collected(source: Any, name: str = "", path: str = "") -> Iterator[tuple[Tensor, str, str]]:
    """Each tensor below ``source`` with its qualified name and the same with the positions on the way."""
    if isinstance(source, Tensor):
        yield source, name, path
    elif isinstance(source, nn.Module):
        for own, parameter in trainable(source).items():
            yield parameter, qualified(name, own), qualified(path, own)
    elif isinstance(source, NamedMembers):
        for key, p in source._members.items():
            own = source._names.get(key, "")
            yield p, own, qualified(path, own) if own else ""
    elif isinstance(source, Mapping):
        for key, value in source.items():
            if isinstance(key, str):
                yield from collected(value, qualified(name, key), qualified(path, key))
            else:
                yield from collected(key)
    elif isinstance(source, Iterable) and not isinstance(
        source, (str, bytes, np.ndarray, np.generic, NotATensor)
    ):
        for position, item in enumerate(source):
            # a bare tensor in a list has no name of its own
            below = qualified(path, str(position))
            yield from collected(item, name, "" if isinstance(item, Tensor) and not name else below)
    else:
        raise TypeError(f"Params: expected tensors, got {what(source)}{_advice(source)}")


def collected_at_once(source: Any) -> tuple[dict[int, Tensor], dict[int, str]] | None:
    """Members and names of a module, or of a list of tensors; ``None`` for what takes a closer look.

    A sixth of a microsecond for each of a list, where to go through them one by one takes one.
    """
    if torch.compiler.is_compiling():
        return None
    names: Iterable[str] = ()
    if isinstance(source, nn.Module):
        found = trainable(source)
        tensors, names = list(found.values()), found
    elif type(source) in (list, tuple) and TENSOR_TYPES.issuperset(map(type, source)):
        tensors = source
    else:
        return None
    ids = list(map(id, tensors))
    members = dict(zip(ids, tensors, strict=True))
    if not all(dtype.is_floating_point or dtype.is_complex for dtype in set(map(_dtype, tensors))):
        return None
    if names and ("" in names or len(members) < len(ids)):
        return None
    return members, dict(zip(ids, names, strict=False))


def qualified(prefix: str, name: str) -> str:
    """The name of a member of what is called ``prefix``, which may be nameless."""
    return f"{prefix}.{name}" if prefix else name
