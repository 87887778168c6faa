"""The arguments of a checkpointed call, taken apart: whoever records keeps the tensors, this the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch_private import pytree

__all__ = ["NO_ARGUMENTS", "Arguments", "taken_apart"]


class Arguments:
    """What there is besides tensors, and where those belong.

    ``leaves``: with ``None`` in the places of the tensors; ``_specs``: of each argument's structure, if it
    has one, or ``None`` where all arguments are tensors.
    """

    __slots__ = ("_names", "_places", "_specs", "leaves")

    def __init__(
        self, leaves: list[Any], names: tuple[str, ...], places: list[int], specs: list[Any] | None
    ) -> None:
        self.leaves = leaves
        self._names = names
        self._places = places
        self._specs = specs

    def with_tensors(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Any], dict[str, Any]]:
        """As they were given, in containers of their own: the caller may have changed his."""
        if self._specs is None:
            return tensors, {}
        leaves = list(self.leaves)
        for i, tensor in zip(self._places, tensors, strict=True):
            leaves[i] = tensor
        remaining = iter(leaves)
        values = [
            next(remaining)
            if spec is None
            else pytree.tree_unflatten(list(itertools.islice(remaining, spec.num_leaves)), spec)
            for spec in self._specs
        ]
        count = len(values) - len(self._names)
        return values[:count], dict(zip(self._names, values[count:], strict=True))


NO_ARGUMENTS = Arguments([], (), [], None)


def taken_apart(xs: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Sequence[Tensor], Arguments]:
    """The tensors among the arguments, and the rest."""
    if not kwargs and all(isinstance(x, Tensor) and not x.is_inference() for x in xs):
        return xs, NO_ARGUMENTS
    leaves: list[Any] = []
    specs = []
    for x in (*xs, *kwargs.values()):
        spec = None
        if isinstance(x, Tensor) or pytree.tree_is_leaf(x):
            leaves.append(x)
        else:
            inside, spec = pytree.tree_flatten(x)
            leaves.extend(inside)
        specs.append(spec)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not x.is_inference()]
    tensors = [leaves[i] for i in places]
    for i in places:
        leaves[i] = None
    return tensors, Arguments(leaves, tuple(kwargs), places, specs)
