"""Which nodes of the graph walks have come to, and when: noted on the nodes, which nobody holds by that.

A loop of derivatives would walk along all that came before, each time. Notes only say where nothing is to be
found: what a walk finds must not depend on others, or a checkpoint that runs again would do something else.
Knows nothing of what walks are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["all_such", "came_before", "keep_number", "leading", "next_number", "number_of"]

# Numbers of differentiations as they begin, and of walks, in one order for all threads.
_numbers = itertools.count()
# Under this key a node's metadata has the number of the first walk that came to it.
_KEY = "torchzygote: first walk"


def next_number() -> int:
    """A number for a differentiation that begins, or a walk: larger than all before."""
    return next(_numbers)


def _noted(node: Any, walk: int) -> int:
    """The number of the first walk that came to ``node``: this one, if there was none."""
    first: int = node.metadata.setdefault(_KEY, walk)
    return first


def came_before(node: Any, number: int) -> bool:
    """Whether a walk had come to ``node`` before the differentiation of this number began.

    It doesn't lead to anything that was made since: what a node comes of never changes.
    """
    first: int = node.metadata.get(_KEY, number)
    return first < number


def leading(
    starts: Sequence[Any],
    targets: Collection[Any],
    leaves: Collection[int],
    ends: Collection[Any],
    number: int,
) -> list[Any]:
    """Nodes on the ways from ``starts`` to ``targets``, or to leaves of these ids.

    Nothing is looked at below ``ends``, nor below what a walk had come to before the differentiation of this
    ``number`` began: that leads to neither.
    """
    walk = next_number()
    before: dict[Any, list[Any]] = {}
    leads: dict[Any, bool] = {None: False}
    found: list[Any] = []
    stack = list(starts)
    while stack:
        node = stack[-1]
        if node in leads:
            stack.pop()
            continue
        taken = before.get(node)
        if taken is None:
            old = _noted(node, walk) < number
            taken = before[node] = [] if old or node in ends else [one for one, _ in node.next_functions]
            missing = [one for one in taken if one not in leads]
            if missing:
                stack.extend(missing)
                continue
            if not (old or taken) and id(getattr(node, "variable", None)) in leaves:
                leads[node] = True
                found.append(node)
                continue
        stack.pop()
        leads[node] = node in targets or any(map(leads.__getitem__, taken))
        if leads[node]:
            found.append(node)
    return found


def all_such(
    starts: Iterable[Any],
    ends: Collection[Any],
    number: int | None,
    kinds: Collection[type],
    is_such: Callable[[Any], bool],
) -> bool:
    """Whether all nodes below ``starts`` are of these kinds, or such that ``is_such`` tells so.

    ``ends``, ``number``: as for :func:`leading`; without a number, all is looked at. A third of the time of
    that, as it isn't asked whether nodes lead to anything.
    """
    walk = next_number()
    seen: set[Any] = {None, *ends}
    stack = [node for node in starts if node not in seen]
    seen.update(stack)
    while stack:
        node = stack.pop()
        onward = node.next_functions
        # Nothing is below a leaf, so that no later walk is shortened by a note.
        if onward and number is not None and _noted(node, walk) < number:
            continue
        if type(node) not in kinds and not is_such(node):
            return False
        for following, _ in onward:
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return True


def keep_number(twin: Tensor, number: int) -> None:
    """Note on an input the number of the differentiation that it was made for."""
    twin._torchzygote_number = number  # type: ignore[attr-defined]


def number_of(inputs: Iterable[Tensor]) -> int | None:
    """The smallest number of these inputs; ``None`` where one of them has none."""
    numbers = [getattr(x, "_torchzygote_number", None) for x in inputs]
    return None if None in numbers else min(numbers, default=None)  # type: ignore[type-var]
