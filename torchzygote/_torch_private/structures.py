"""What PyTorch's pytrees know of a structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils import _pytree as pytree

__all__ = ["names_of_fields", "rebuilt"]


def names_of_fields(
    x: Any, parts: Sequence[Any], spec: pytree.TreeSpec
) -> tuple[list[str], list[str]] | None:
    """Fields of ``x`` that hold its ``parts``, and those that hold ``None``; ``None`` if it has no fields.

    A registered dataclass leaves fields with ``None`` out, and what it puts into its ``spec`` isn't public;
    other types may put there whatever they like.
    """
    context = spec.context
    if not (isinstance(context, list) and len(context) == 2 and all(isinstance(c, list) for c in context)):
        return None
    names, absent = context
    if len(names) != len(parts):
        return None
    if not all(isinstance(name, str) and hasattr(x, name) for name in (*names, *absent)):
        return None
    held = all(getattr(x, name) is part for name, part in zip(names, parts, strict=True))
    return (names, absent) if held and all(getattr(x, name) is None for name in absent) else None


def rebuilt(parts: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The structure with these parts; a named tuple whose constructor refuses them is made without it.

    ``PackedSequence`` wants sizes where there is no gradient. Functions that unflatten are in PyTorch's own
    table alone.
    """
    try:
        return pytree.tree_unflatten(parts, spec)
    except Exception:
        return _rebuilt(iter(parts), spec)


def _rebuilt(parts: Iterator[Any], spec: pytree.TreeSpec) -> Any:
    """One level after the other."""
    if spec.is_leaf():
        return next(parts)
    values = [_rebuilt(parts, spec.child(i)) for i in range(spec.num_children)]
    try:
        return pytree.SUPPORTED_NODES[spec.type].unflatten_fn(values, spec.context)
    except Exception:
        make = getattr(spec.context, "_make", None)  # the class, of a named tuple
        if not (isinstance(spec.context, type) and callable(make)):
            raise
        return make(values)
