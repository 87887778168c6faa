"""What inputs go into on their way through a function: affine maps, other layers, values made of them alone.

A weight that is computed from another one, as a standardized or a normed one is, goes into a layer as a value
in between, which has no samples: it is followed as inputs are. Knows shapes and graph nodes, no numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from .._torch_private import count_outputs, node_name, node_shape, number_of, value_of_node
from .affine import AffineMap, Other, entrances
from .layers import Layer, Lookup, layer
from .moves import Value, Way, kind_of_node
from .samples import apart_from, may_have_samples

__all__ = ["Entering"]

# Values in between, at most.
_MOST_BETWEEN = 200


class Entering:
    """Ways of the inputs, numbered as they are given; from their number on, values in between.

    ``maps`` and ``layers``: what they go into; nothing if there are more than ``most`` places. ``between``:
    nodes that are known to have no samples.
    """

    def __init__(self, y: Tensor, inputs: Sequence[Tensor], most: int, between: Collection[Any] = ()) -> None:
        self.y = y
        self.number = number_of(inputs)
        self.values = list(inputs)
        self.maps: list[AffineMap] = []
        self.layers: list[tuple[int, Layer]] = []
        self._layered = self.layers
        self._between = between
        self._numbers: dict[Value, int] = {}
        self._made: dict[int, set[int]] = {}
        self._which = list(range(len(inputs)))
        self._inputs = len(inputs)
        self.maps, self._entering = entrances(y, self.values, self._which, self._rest, most)

    def _rest(self, which: int, other: Other, is_affine: bool) -> list[Way] | None:
        """On through what isn't an affine map."""
        node = other.node
        if node in self._between:
            return self._derived(which, node)
        if is_affine:
            return None
        found = layer(node, other.position, other.way, self.values[which].dtype)
        if isinstance(found, Lookup):
            if not apart_from(self.y, value_of_node(*found.layer.z, self.number), found.layer.own):
                return [found.onward]
            found = found.layer
        shape = node_shape(node, 0)
        if shape is None or not may_have_samples(self.y, shape):
            return self._derived(which, node)
        if found is None:
            return (
                None
                if apart_from(self.y, value_of_node(node, 0, self.number), ())
                else self._derived(which, node)
            )
        self.layers.append((which, found))
        return []

    def _derived(self, which: int, node: Any) -> list[Way] | None:
        """The outputs of a node as values of their own."""
        outputs = range(count_outputs(node))
        known = kind_of_node(node_name(node)) != "" and all(node_shape(node, k) is not None for k in outputs)
        if not known or node is self.y.grad_fn or len(self._numbers) + len(outputs) > _MOST_BETWEEN:
            return None
        for k in outputs:
            if (node, k) not in self._numbers:
                self._numbers[node, k] = len(self.values)
                self.values.append(value_of_node(node, k, self.number))
                self._which.append(self._numbers[node, k])
            self._made.setdefault(which, set()).add(self._numbers[node, k])
        return []

    def made_of(self, which: Collection[int]) -> set[int]:
        """Values in between that are made of these, directly or not."""
        found: set[int] = set()
        pending = list(which)
        while pending:
            for one in self._made.get(pending.pop(), ()):
                if one not in found:
                    found.add(one)
                    pending.append(one)
        return found

    def leading_on(self) -> list[int]:
        """Inputs that go nowhere but into affine maps and layers."""
        whole = {i for i, entrance in self._entering.items() if not entrance.others}
        return [i for i in range(self._inputs) if {i, *self.made_of([i])} <= whole]

    def used(self) -> list[int]:
        """Inputs that go anywhere at all, or so that it isn't known."""
        layered = {i for i, _ in self._layered}
        idle = {
            i
            for i, entrance in self._entering.items()
            if not (entrance.terms or entrance.others or i in layered or i in self._made)
        }
        return [i for i in range(self._inputs) if i not in idle]

    def covered(self, counts: Sequence[int]) -> list[int]:
        """Those of which all ways are taken: ``counts[i]`` ways of value ``i`` are."""
        ways = [0] * len(self.values)
        for i, entrance in self._entering.items():
            ways[i] += len(entrance.terms)
        for i, _ in self.layers:
            ways[i] += 1
        return [
            i
            for i in self.leading_on()
            if all(ways[j] == counts[j] for j in (i, *self.made_of([i]))) and (ways[i] or self._made.get(i))
        ]

    def restricted(self, which: Collection[int]) -> None:
        """Keep these alone, and what is made of them."""
        kept = {*which, *self.made_of(which)}
        maps = [m._replace(terms=[t for t in m.terms if t.which in kept]) for m in self.maps]
        self.maps = [m for m in maps if m.terms]
        self.layers = [(i, one) for i, one in self.layers if i in kept]
