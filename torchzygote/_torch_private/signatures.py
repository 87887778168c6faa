"""What a recorded graph looks like, as a key: graphs of one key differ in their numbers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .nodes import node_name
from .telling import Leaf

__all__ = ["Signature", "Signatures"]


class Signature(NamedTuple):
    """``nodes``: each after what it comes of, but for those that don't lead to the input.

    ``before``: for each of them the numbers of the nodes that its inputs are results of, ``None`` for what is
    constant.
    """

    nodes: list[Any]
    before: list[tuple[int | None, ...]]
    key: tuple[Any, ...]


class Signatures:
    """Walks along graphs of some kinds of nodes, of one output each.

    ``known``: for the name of a node which attributes count besides dtypes and shapes; ``None`` if nothing is
    known of it.
    """

    __slots__ = ("_asked", "_known")

    def __init__(self, known: Callable[[str], tuple[str, ...] | None]) -> None:
        self._known = known
        self._asked: dict[type, tuple[str, ...] | None] = {}

    def of(self, root: Tensor, x: Tensor, most: int) -> Signature | None:
        """The graph of ``root`` down to the leaf ``x``: 3 microseconds for each operation.

        ``None`` where nothing is known of a node, or where there are more than ``most``.
        """
        numbers: dict[Any, int | None] = {None: None}
        found = Signature([], [], ())
        key: list[Any] = []
        stack: list[tuple[Any, Any]] = [(root.grad_fn, None)]
        while stack:
            node, onward = stack.pop()
            if node in numbers:
                continue
            if type(node) is Leaf:
                if node.variable is not x:
                    numbers[node] = None
                    continue
                onward, asked = (), None
            else:
                asked = self._asked_of(node)
                if asked is None or len(numbers) > most:
                    return None
                if onward is None:
                    onward = node.next_functions
                    missing = [(v, None) for v, _ in onward if v not in numbers]
                    if missing:
                        stack.append((node, onward))
                        stack.extend(missing)
                        continue
            before = tuple([numbers[v] for v, _ in onward])
            if onward and before.count(None) == len(before):
                numbers[node] = None
                continue
            metas = node._input_metadata
            if len(metas) != 1 or metas[0].is_nested_tensor:
                return None
            numbers[node] = len(found.nodes)
            found.nodes.append(node)
            found.before.append(before)
            attributes = [getattr(node, name) for name in asked] if asked else None
            key.append(
                (type(node), before, tuple(metas[0].shape), metas[0].dtype, attributes and tuple(attributes))
            )
        return found._replace(key=tuple(key))

    def _asked_of(self, node: Any) -> tuple[str, ...] | None:
        kind = type(node)
        if kind in self._asked:
            return self._asked[kind]
        name = node_name(node)
        asked = self._known(name)
        if kind.__name__ == name:  # not a type that many functions share
            self._asked[kind] = asked
        return asked
