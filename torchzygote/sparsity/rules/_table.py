"""The table of rules, and what a rule is given to work with.

A rule says how the index sets of an operator's results come from those of its arguments, and, for Hessians,
which arguments the operator couples. It must not know where tensors lie in memory, nor what is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._sets import ID, IndexSets, collapsed
from .._trace import Const

__all__ = ["CURVED", "LINEAR", "PRODUCT", "RULES", "Call", "Context", "Dep", "Rule", "rule", "zero_ids"]

# When an operator has second derivatives: never; always; only where two of its operands are dependent.
LINEAR = "linear"
CURVED = "curved"
PRODUCT = "product"


class Dep:
    """A dependent tensor as a rule sees it: the set of each element."""

    __slots__ = ("dtype", "ids")

    def __init__(self, ids: Tensor, dtype: torch.dtype) -> None:
        self.ids = ids
        self.dtype = dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.ids.shape


class Call:
    """One operator with its arguments by name."""

    __slots__ = ("args", "extra", "name", "out_shapes", "outs")

    def __init__(
        self,
        name: str,
        args: dict[str, Any],
        outs: Sequence[Any],
        out_shapes: Sequence[tuple[int, ...]],
        extra: Any,
    ) -> None:
        self.name = name
        self.args = args
        self.outs = outs
        self.out_shapes = out_shapes
        self.extra = extra

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def first(self, *names: str) -> Any:
        """The first of these arguments that there is, whatever this overload calls it."""
        for name in names:
            if name in self.args:
                return self.args[name]
        return None

    def tensors(self) -> list[Any]:
        """All tensor arguments, those in lists too."""
        return list(_flat(self.args.values()))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first dependent result."""
        return self.out_shapes[0]


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, (Dep, Const)):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def zero_ids(shape: Sequence[int] = ()) -> Tensor:
    """Empty sets everywhere."""
    return torch.zeros((), dtype=ID).expand(tuple(shape))


class Context:
    """What rules have at hand: the sets, and where couplings go.

    ``second``: couplings are wanted. ``wanted``: so are the index sets of this operator's results.
    """

    __slots__ = ("local", "pairs", "second", "sets", "wanted")

    def __init__(self, sets: IndexSets, second: bool) -> None:
        self.sets = sets
        self.second = second
        self.wanted = True
        self.local = False
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def ids(self, value: Any) -> Tensor:
        """The sets of an argument, empty ones for what is constant."""
        if isinstance(value, Dep):
            return value.ids
        if isinstance(value, Const):
            return zero_ids(value.tensor.shape)
        return zero_ids()

    def unite(self, *ids: Tensor) -> Tensor:
        """Elementwise union, with broadcasting."""
        return self.sets.unite(*ids)

    def unite_dims(self, ids: Tensor, dims: Sequence[int] | None, keepdim: bool = False) -> Tensor:
        """Union along dimensions."""
        return self.sets.unite_dims(ids, dims, keepdim)

    def everything(self, call: Call) -> Tensor:
        """The union of all that an operator's arguments depend on, 0-dim."""
        parts = [self.unite_dims(value.ids, None) for value in call.tensors() if isinstance(value, Dep)]
        return self.unite(*parts) if parts else zero_ids()

    def couple(self, a: Tensor, b: Tensor | None = None) -> None:
        """Second derivatives by a member of ``a`` and one of ``b``, element by element (``a`` twice)."""
        if not self.second:
            return
        if b is None:
            found = self.sets.distinct(a)
            self.pairs.append((found, found))
            return
        (a, b), _ = collapsed(a, b)
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            self.couple(a)
            return
        first, second = a.reshape(-1).long(), b.reshape(-1).long()
        there = (first > 0) & (second > 0)
        keys = torch.unique((first[there] << 32) | second[there])
        self.pairs.append((keys >> 32, keys & 0xFFFFFFFF))

    def by_values(self, *values: Any) -> None:
        """Say that the structure hangs on these arguments: it is local if they come from the inputs."""
        for value in values:
            if isinstance(value, Dep) or (isinstance(value, Const) and value.seen):
                self.local = True


Handler = Callable[[Context, Call], Any]


class Rule(NamedTuple):
    """A handler, and when the operator has second derivatives (:data:`LINEAR`, ... or pairs of positions)."""

    handler: Handler
    curvature: str = LINEAR


RULES: dict[str, Rule] = {}


def rule(*names: str, curvature: str = LINEAR) -> Callable[[Handler], Handler]:
    """Enter a handler into the table under these operator names (``aten`` is left out)."""

    def enter(handler: Handler) -> Handler:
        for name in names:
            if name in RULES:
                raise ValueError(f"rule: {name} has one already")
            RULES[name] = Rule(handler, curvature)
        return handler

    return enter
