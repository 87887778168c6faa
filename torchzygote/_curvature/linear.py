"""Tangents through recorded operations that move elements, add them or sum them up.

Tangents have one more axis than the values, the first one, for directions. What has no rule isn't guessed.
Knows single operations and shapes; it must not know what else becomes of the tangents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._recorded.moves import RESHAPES, Value, moved, whole
from .._torch_private import axis_of, node_attribute, node_name, pushed_through, saved_by, signed

__all__ = [
    "MOVES",
    "Form",
    "Recorded",
    "Rule",
    "Tangents",
    "dims_of",
    "lifted",
    "present",
    "sum_of",
    "transposed",
]

Tangents = Sequence["Tensor | None"]
# Tangents of the inputs (None for constants), cotangent of the output if it is curved -> tangent, curvature
Rule = Callable[["Recorded", Tangents, "Tensor | None"], "tuple[Tensor, Form | None]"]


class Form(NamedTuple):
    """A curvature, as a quadratic form of tangents: ``left weight right``, element by element.

    What is on the left and on the right has an axis of directions, ``weight`` none; they broadcast.
    """

    left: Tensor
    weight: Tensor | None
    right: Tensor

    def along(self) -> Tensor:
        """The terms for each direction."""
        terms = self.left * self.right
        return terms if self.weight is None else terms.mul_(self.weight)


class Recorded(NamedTuple):
    """One operation as it was recorded; ``before``: the values it takes, ``None`` for constants.

    ``keep``: what is made here is going to be differentiated.
    """

    value: Value
    out: tuple[int, ...]
    before: tuple[Value | None, ...]
    shapes: tuple[tuple[int, ...] | None, ...]
    keep: bool

    @property
    def node(self) -> Any:
        return self.value[0]

    def saved(self, name: str) -> Tensor | float:
        """An operand, as the operation has saved it."""
        found: Any = saved_by(self.node, name)
        if isinstance(found, Tensor):
            return found if self.keep else found.detach()
        return float(found)

    def tensor(self, name: str) -> Tensor:
        """One that must be a tensor."""
        found = self.saved(name)
        assert isinstance(found, Tensor)
        return found

    def number(self, name: str) -> float:
        return float(saved_by(self.node, name))

    def varying(self) -> tuple[int, Value, tuple[int, ...]]:
        """The only input that isn't constant: its place, itself, its shape."""
        ((place, value, shape),) = [
            (i, v, s)
            for i, (v, s) in enumerate(zip(self.before, self.shapes, strict=True))
            if v is not None and s is not None
        ]
        return place, value, shape


def dims_of(place: Recorded, rank: int) -> list[int]:
    """The axes that go, of tangents of a value of this rank."""
    dims = node_attribute(place.node, "_saved_dim")
    dims = dims if isinstance(dims, (tuple, list)) else [] if dims is None else [dims]
    return [1 + axis_of(dim, rank) for dim in dims] if dims else list(range(1, 1 + rank))


def lifted(tangent: Tensor, rank: int) -> Tensor:
    """With as many axes as tangents of a value of this rank, for broadcasting."""
    missing = rank + 1 - tangent.dim()
    if missing <= 0:
        return tangent
    return tangent.reshape(tangent.shape[:1] + (1,) * missing + tangent.shape[1:])


def present(tangents: Tangents) -> Tensor:
    (tangent,) = (t for t in tangents if t is not None)
    return tangent


def sum_of(terms: Sequence[Tensor | None]) -> Tensor:
    present = [term for term in terms if term is not None]
    total = present[0]
    for term in present[1:]:
        total = total + term
    return total


def _reshaped(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = present(tangents)
    return tangent.reshape(len(tangent), *place.out), None


def _expanded(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = lifted(present(tangents), len(place.out))
    return tangent.expand(len(tangent), *place.out), None


def _reversed(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = present(tangents)
    return tangent.mT if len(place.out) == 2 else tangent, None


def _swapped(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    rank = len(place.out)
    a, b = (axis_of(node_attribute(place.node, name), rank) for name in ("_saved_dim0", "_saved_dim1"))
    tangent = present(tangents)
    return tangent.transpose(1 + a, 1 + b) if rank > 0 else tangent, None


def _permuted(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    dims = [1 + axis_of(dim, len(place.out)) for dim in node_attribute(place.node, "_saved_dims")]
    return present(tangents).permute(0, *dims), None


def _sliced(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent, node = present(tangents), place.node
    dim = axis_of(node_attribute(node, "_saved_dim"), tangent.dim() - 1)
    lo, hi = (node_attribute(node, name) for name in ("_saved_start", "_saved_end"))
    lo, hi = (None if end is None else signed(end) for end in (lo, hi))
    part = slice(lo, hi, node_attribute(node, "_saved_step"))
    return tangent[(slice(None),) * (1 + dim) + (part,)], None


def _selected(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent, node = present(tangents), place.node
    dim = axis_of(node_attribute(node, "_saved_dim"), tangent.dim() - 1)
    return tangent.select(1 + dim, signed(node_attribute(node, "_saved_index"))), None


def _taken(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """One of several parts along an axis; that counts from the first, so that the directions go last."""
    _, value, shape = place.varying()
    ways = moved(place.node, whole(value, shape))
    if ways is None:
        raise RuntimeError(f"{node_name(place.node)} takes no part of {shape}")
    return ways[place.value[1]].forth(present(tangents).movedim(0, -1)).movedim(-1, 0), None


def _stacked(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    dim = axis_of(node_attribute(place.node, "_saved_dim"), len(place.out))
    like = next(t for t in tangents if t is not None)
    if place.keep:
        return torch.stack([torch.zeros_like(like) if t is None else t for t in tangents], 1 + dim), None
    # Of columns, stack() copies one number at a time, and needs zeros for those that have no tangent.
    found = like.new_zeros(len(like), *place.out)
    for part, t in zip(found.unbind(1 + dim), tangents, strict=True):
        if t is not None:
            part.copy_(t)
    return found, None


def _joined(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """Where all parts vary: of a constant, nobody knows how long it is."""
    dim = axis_of(node_attribute(place.node, "_saved_dim"), len(place.out))
    return torch.cat([t for t in tangents if t is not None], 1 + dim), None


def _summed(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = present(tangents)
    gone = dims_of(place, tangent.dim() - 1)
    return (tangent.sum(gone) if gone else tangent).reshape(len(tangent), *place.out), None


def _averaged(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    total, _ = _summed(place, tangents, None)
    _, _, shape = place.varying()
    return total * (math.prod(place.out) / math.prod(shape)), None


def _added(sign: int) -> Rule:
    def rule(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
        if len(tangents) == 1:  # to a number
            return present(tangents), None
        scale, rank = sign * place.number("_saved_alpha"), len(place.out)
        first, second = (None if t is None else lifted(t, rank) for t in tangents)
        total = sum_of([first, second if second is None or scale == 1 else second * scale])
        return total.expand(len(total), *place.out), None

    return rule


def _negated(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    return -present(tangents), None


def _subtracted_from(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """``other - alpha x``; a number has no tangent."""
    first, *others = (None if t is None else lifted(t, len(place.out)) for t in tangents)
    total = sum_of([None if first is None else first * -place.number("_saved_alpha"), *others])
    return total.expand(len(total), *place.out), None


def _padded(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """The numbers that are saved begin with the last axis."""
    pad = [signed(size) for size in node_attribute(place.node, "_saved_pad")]
    return torch.nn.functional.pad(present(tangents), pad), None


def transposed(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """Any other: the pullback of a linear operation is linear, too, and its pullback is the operation."""
    return pushed_through(place.node, tangents, place.out, place.keep), None


MOVES: dict[str, Rule] = {
    **dict.fromkeys(RESHAPES, _reshaped),
    "Expand": _expanded,
    "T": _reversed,
    "Transpose": _swapped,
    "Permute": _permuted,
    "Slice": _sliced,
    "Select": _selected,
    **dict.fromkeys(["Split", "SplitWithSizes", "Unbind"], _taken),
    "Stack": _stacked,
    "Cat": _joined,
    "Sum": _summed,
    "Mean": _averaged,
    "Add": _added(1),
    "Sub": _added(-1),
    "Neg": _negated,
    "Rsub": _subtracted_from,
    "ConstantPadNd": _padded,
}
