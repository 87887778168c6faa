"""Which nodes of the graph walks have come to, and when: noted on the nodes, which nobody holds by that.

Knows nothing of what walks are for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor

__all__ = ["came_before", "keep_number", "next_number", "noted", "number_of"]

# Numbers of differentiations as they begin, and of walks, in one order for all threads.
_numbers = itertools.count()
# Under this key a node's metadata has the number of the first walk that came to it.
_KEY = "torchzygote: first walk"


def next_number() -> int:
    """A number for a differentiation that begins, or a walk: larger than all before."""
    return next(_numbers)


def noted(node: Any, walk: int) -> int:
    """The number of the first walk that came to ``node``: this one, if there was none."""
    first: int = node.metadata.setdefault(_KEY, walk)
    return first


def came_before(node: Any, number: int) -> bool:
    """Whether a walk had come to ``node`` before the differentiation of this number began.

    It doesn't lead to anything that was made since: what a node comes of never changes.
    """
    first: int = node.metadata.get(_KEY, number)
    return first < number


def keep_number(twin: Tensor, number: int) -> None:
    """Note on an input the number of the differentiation that it was made for."""
    twin._torchzygote_number = number  # type: ignore[attr-defined]


def number_of(inputs: Iterable[Tensor]) -> int | None:
    """The smallest number of these inputs; ``None`` where one of them has none."""
    numbers = [getattr(x, "_torchzygote_number", None) for x in inputs]
    return None if None in numbers else min(numbers, default=None)  # type: ignore[type-var]
