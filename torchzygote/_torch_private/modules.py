"""What modules hold themselves, without the names and sets that the public methods make of it.

These are methods, too, which a module may have made its own; nor do they give the dictionaries, in which a
buffer is replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["Buffers", "buffers_in", "insides_of", "parameters_in"]

Buffers = dict[str, Tensor | None]


def insides_of(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The attributes of ``modules`` and of what is in them, each once."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        inside = module.__dict__
        found.append(inside)
        children = inside.get("_modules")
        if children and type(children) is dict:
            waiting.extend(child for child in children.values() if child is not None)
    return found


def parameters_in(insides: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """The parameters that modules hold themselves, by their attributes."""
    for inside in insides:
        parameters = inside.get("_parameters")
        if parameters and type(parameters) is dict:  # scripted ones have none of their own
            yield from (p for p in parameters.values() if p is not None)


def buffers_in(inside: dict[str, Any]) -> tuple[Buffers, Iterable[str]] | None:
    """The buffers of a module, by its attributes, and the names of those that aren't saved with it."""
    buffers = inside.get("_buffers")
    if not buffers or type(buffers) is not dict:
        return None
    return buffers, inside.get("_non_persistent_buffers_set") or ()
