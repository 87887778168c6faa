"""The walk along a recorded graph that says something of each value after what it comes of.

A value is an output of a node, as in ``node.next_functions``. Knows nothing of what is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["evaluate"]

T = TypeVar("T")


def evaluate(
    value: tuple[Any, int],
    known: dict[tuple[Any, int], T | None],
    say: Callable[[Any, int, Any], T | None],
    most: int,
    is_end: Callable[[Any], bool] | None = None,
) -> bool:
    """Fill ``known`` with what is said of ``value`` and of all that it comes of, each looked at once.

    ``say(node, output, before)``: ``before`` are the values that the node got, which are known. ``is_end``:
    nodes that nothing is said of, nor of what is below. ``False`` if there are more than ``most`` values.
    """
    # Reading what a node comes from builds a tuple of new objects, so that it is done once.
    stack: list[tuple[tuple[Any, int], Any]] = [(value, None)]
    while stack:
        current, before = stack.pop()
        if current in known:
            continue
        if is_end is not None and is_end(current[0]):
            known[current] = None
            continue
        if before is None:
            before = current[0].next_functions
            missing = [(v, None) for v in before if v[0] is not None and v not in known]
            if missing:
                stack.append((current, before))
                stack.extend(missing)
                continue
        known[current] = say(*current, before)
        if len(known) > most:
            return False
    return True
