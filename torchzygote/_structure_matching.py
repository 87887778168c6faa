"""Two structures side by side: what one of them holds for each leaf of the other.

Knows pytrees, and nothing of what the leaves are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ._torch_private import names_of_fields, pytree

__all__ = ["parts_for"]


class _Misfit(Exception):
    """The two have different structures somewhere."""


def parts_for(like: Any, given: Any, where: str, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """What ``given`` holds for each leaf of ``like``; ``None`` in ``given`` stands for any part of it.

    ``is_leaf``: what is a leaf of ``like`` besides what PyTorch takes for one.
    """
    try:
        return list(_walk(like, given, is_leaf))
    except _Misfit:
        expected, got = _outline(like, is_leaf), _outline(given, is_leaf)
        raise ValueError(f"{where}: expected the structure {expected}, got {got}") from None


def _walk(like: Any, given: Any, is_leaf: Callable[[Any], bool] | None) -> Iterator[Any]:
    if pytree.tree_is_leaf(like, is_leaf=is_leaf):
        yield given
    elif given is None:
        yield from [None] * len(pytree.tree_leaves(like, is_leaf=is_leaf))
    else:
        parts, found = _side_by_side(like, given)
        for part, its in zip(parts, found, strict=True):
            yield from _walk(part, its, is_leaf)


def _side_by_side(like: Any, given: Any) -> tuple[list[Any], list[Any]]:
    """One level of both."""
    if type(given) is not type(like):
        raise _Misfit
    parts, spec = _children(like)
    if isinstance(like, dict) and like.keys() == given.keys():
        return parts, [given[key] for key in like]  # in whatever order
    try:
        if (fields := names_of_fields(like, parts, spec)) is not None:
            return parts, _of_fields(given, *fields)
        found, found_spec = _children(given)
    except AttributeError:  # it lacks a field
        raise _Misfit from None
    if found_spec != spec:
        raise _Misfit
    return parts, found


def _of_fields(given: Any, names: list[str], absent: list[str]) -> list[Any]:
    """What is in these fields; to flatten ``given`` would leave out those that hold ``None``."""
    if any(getattr(given, name) is not None for name in absent):
        raise _Misfit
    return [getattr(given, name) for name in names]


def _children(x: Any) -> tuple[list[Any], Any]:
    """One level of a structure."""
    return pytree.tree_flatten(x, is_leaf=lambda part: part is not x)


class _Leaf:
    def __repr__(self) -> str:
        return "*"


def _outline(x: Any, is_leaf: Callable[[Any], bool] | None) -> Any:
    """The structure of ``x``, to be shown; a type that won't hold anything but its own is named only."""
    try:
        return repr(pytree.tree_map(lambda _: _Leaf(), x, is_leaf=is_leaf))
    except Exception:
        return type(x).__name__
