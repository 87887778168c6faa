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

__all__ = [
    "CURVED",
    "LINEAR",
    "PRODUCT",
    "RULES",
    "Call",
    "Context",
    "Dep",
    "Rule",
    "rule",
    "shape_of",
    "zero_ids",
]

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
        out_shapes: Sequence[tuple[int, ...] | None],
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
        """Shape of the first result that is a tensor."""
        return next(shape for shape in self.out_shapes if shape is not None)

    def spread(self, ids: Tensor) -> list[Tensor | None]:
        """The same set of ids, repeated, for every result."""
        return [None if shape is None else ids.expand(shape) for shape in self.out_shapes]


def _flat(values: Any) -> Any:
    for value in values:
        if isinstance(value, (Dep, Const)):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _flat(value)


def shape_of(value: Dep | Const) -> torch.Size:
    """Shape of the tensor that an operator took."""
    return value.shape if isinstance(value, Dep) else value.tensor.shape


def zero_ids(shape: Sequence[int] = ()) -> Tensor:
    """Empty sets everywhere."""
    return torch.zeros((), dtype=ID, device="cpu").expand(tuple(shape))


class Context:
    """What rules have at hand: the sets, and where couplings go.

    ``second``: couplings are wanted. ``wanted``: so are the index sets of this operator's results.
    """

    __slots__ = ("_due", "_pairs", "_with_itself", "local", "second", "sets", "wanted")

    def __init__(self, sets: IndexSets, second: bool) -> None:
        self.sets = sets
        self.second = second
        self.wanted = True
        self.local = False
        self._pairs: list[Tensor] = []
        self._with_itself = torch.zeros(sets.count if second else 0, dtype=torch.bool, device="cpu")
        self._due = _MANY

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
            missing = self.sets.count - self._with_itself.numel()
            if missing > 0:
                longer = torch.zeros(missing + self.sets.count // 2, dtype=torch.bool, device="cpu")
                self._with_itself = torch.cat([self._with_itself, longer])
            (small,), _ = collapsed(a)
            self._with_itself[small.reshape(-1).long()] = True
            return
        (a, b), _ = collapsed(a, b)
        if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
            self.couple(a)
            return
        first, second = a.reshape(-1).long(), b.reshape(-1).long()
        there = (first > 0) & (second > 0)
        if not bool(there.all()):
            first, second = first[there], second[there]
        self._remember((torch.minimum(first, second) << 32) | torch.maximum(first, second))

    def _remember(self, pairs: Tensor) -> None:
        self._pairs.append(pairs)
        if sum(part.numel() for part in self._pairs) > self._due:
            self._pairs = [torch.unique(torch.cat(self._pairs))]
            self._due = max(_MANY, 2 * self._pairs[0].numel())

    def pairs(self) -> tuple[Tensor, Tensor]:
        """All pairs of sets that were coupled, without most of those that are part of another."""
        alone = torch.zeros(self.sets.count, dtype=torch.bool, device="cpu")
        marked = min(self.sets.count, self._with_itself.numel())
        alone[:marked] = self._with_itself[:marked]
        alone[0] = False
        keys = (
            torch.unique(torch.cat(self._pairs))
            if self._pairs
            else torch.empty(0, dtype=torch.int64, device="cpu")
        )
        first, second = keys >> 32, keys & 0xFFFFFFFF
        outermost = self.sets.outermost(alone)
        part = outermost[first]
        there = (part == 0) | (part != outermost[second])
        alone = (alone & (outermost == torch.arange(self.sets.count, device="cpu"))).nonzero().squeeze(1)
        return torch.cat([alone, first[there]]), torch.cat([alone, second[there]])

    def by_values(self, *values: Any) -> None:
        """Say that the structure depends on these arguments: it is local if they come from the inputs."""
        for value in values:
            if isinstance(value, Dep) or (isinstance(value, Const) and value.seen):
                self.local = True


# Pairs of sets that are kept before those that repeat are merged.
_MANY = 1 << 22

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
