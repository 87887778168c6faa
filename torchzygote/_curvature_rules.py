"""What one recorded operation does to tangents, and how much it bends what passes through it.

Of tangents ``t`` of the inputs it makes those of its output. Where the output has the cotangent ``c``, the
second derivative of ``c . z`` along ``t`` is its bend: zero for linear operations, ``c f''(x) t^2`` for
functions of one element. Tangents have one more axis than the values, the first one, for directions. What has
no rule isn't guessed. Knows single operations; it must not know what the bends are summed up to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._alignment import is_linear
from ._alignment_rules import ELEMENTWISE
from ._pieces import RESHAPES, Value, kind_of_node, moved, whole
from ._torch_private import axis_of, node_attribute, pushed_through, slopes

__all__ = ["Operation", "Place", "operation"]

Tangents = Sequence["Tensor | None"]
# Tangents of the inputs (None for constants), cotangent of the output where it bends -> tangent, bend
Rule = Callable[["Place", Tangents, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


class Place(NamedTuple):
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
        found: Any = getattr(self.node, name)
        if isinstance(found, Tensor):
            return found if self.keep else found.detach()
        return float(found)

    def number(self, name: str) -> float:
        return float(getattr(self.node, name))

    def varying(self) -> tuple[int, Value, tuple[int, ...]]:
        """The only input that isn't constant: its place, itself, its shape."""
        ((place, value, shape),) = [
            (i, v, s)
            for i, (v, s) in enumerate(zip(self.before, self.shapes, strict=True))
            if v is not None and s is not None
        ]
        return place, value, shape


class Operation(NamedTuple):
    """``rule`` makes tangents and bends, those but for a factor ``scale``; ``bends``: it needs the cotangent."""

    rule: Rule
    bends: bool
    scale: float = 1.0


def operation(place: Place) -> Operation | None:
    """The rule for what was recorded; ``None`` if there is none."""
    kind, node = kind_of_node(place.node.name()), place.node
    varying = [value is not None for value in place.before]
    if kind in _MOVES and (kind != "Cat" or all(varying)):
        return Operation(_MOVES[kind], False)
    if kind in _PRODUCTS:
        left, right, rule, scale = _PRODUCTS[kind]
        return Operation(rule, varying[right] and (varying[left] or kind == "Div"), scale)
    if len(node._input_metadata) > 1:
        return None
    if is_linear(kind, varying):
        return Operation(_transposed, False)
    if kind not in ELEMENTWISE or sum(varying) != 1 or place.varying()[2] != place.out:
        return None
    if kind == "Pow":
        kind = "Square" if node_attribute(node, "_saved_exponent") == 2 else ""
    return _FUNCTIONS.get(kind) or Operation(_of_one, True)


def _lifted(tangent: Tensor, rank: int) -> Tensor:
    """With as many axes as tangents of a value of this rank, for broadcasting."""
    missing = rank + 1 - tangent.dim()
    if missing <= 0:
        return tangent
    return tangent.reshape(tangent.shape[:1] + (1,) * missing + tangent.shape[1:])


def _present(tangents: Tangents) -> Tensor:
    (tangent,) = (t for t in tangents if t is not None)
    return tangent


def _sum(terms: Sequence[Tensor | None]) -> Tensor:
    present = [term for term in terms if term is not None]
    total = present[0]
    for term in present[1:]:
        total = total + term
    return total


# ---------------------------------------------------------------------------------------------------------
# linear


def _reshaped(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = _present(tangents)
    return tangent.reshape(len(tangent), *place.out), None


def _expanded(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = _lifted(_present(tangents), len(place.out))
    return tangent.expand(len(tangent), *place.out), None


def _reversed(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = _present(tangents)
    return tangent.mT if len(place.out) == 2 else tangent, None


def _swapped(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    rank = len(place.out)
    a, b = (axis_of(node_attribute(place.node, name), rank) for name in ("_saved_dim0", "_saved_dim1"))
    tangent = _present(tangents)
    return tangent.transpose(1 + a, 1 + b) if rank > 0 else tangent, None


def _permuted(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    dims = [1 + axis_of(dim, len(place.out)) for dim in node_attribute(place.node, "_saved_dims")]
    return _present(tangents).permute(0, *dims), None


def _taken(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """A part along one axis; which one counts from the first axis, so that the directions go last."""
    _, value, shape = place.varying()
    ways = moved(place.node, whole(value, shape))
    if ways is None:
        raise RuntimeError(f"{place.node.name()} takes no part of {shape}")
    return ways[place.value[1]].forth(_present(tangents).movedim(0, -1)).movedim(-1, 0), None


def _stacked(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    dim = axis_of(node_attribute(place.node, "_saved_dim"), len(place.out))
    like = next(t for t in tangents if t is not None)
    return torch.stack([torch.zeros_like(like) if t is None else t for t in tangents], 1 + dim), None


def _joined(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """Where all parts vary: of a constant, nobody knows how long it is."""
    dim = axis_of(node_attribute(place.node, "_saved_dim"), len(place.out))
    return torch.cat([t for t in tangents if t is not None], 1 + dim), None


def _summed(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    tangent = _present(tangents)
    rank = tangent.dim() - 1
    dims = node_attribute(place.node, "_saved_dim")
    gone = [1 + axis_of(dim, rank) for dim in dims] if dims else list(range(1, 1 + rank))
    return (tangent.sum(gone) if gone else tangent).reshape(len(tangent), *place.out), None


def _averaged(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    total, _ = _summed(place, tangents, None)
    _, _, shape = place.varying()
    return total * (math.prod(place.out) / math.prod(shape)), None


def _added(sign: int) -> Rule:
    def rule(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
        scale, rank = sign * place.number("_saved_alpha"), len(place.out)
        first, second = (None if t is None else _lifted(t, rank) for t in tangents)
        total = _sum([first, second if second is None or scale == 1 else second * scale])
        return total.expand(len(total), *place.out), None

    return rule


def _negated(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    return -_present(tangents), None


def _transposed(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, None]:
    """Any other: the pullback of a linear operation is linear, too, and its pullback is the operation."""
    return pushed_through(place.node, tangents, place.out, place.keep), None


# ---------------------------------------------------------------------------------------------------------
# products


def _multiplied(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rank = len(place.out)
    a, b = (None if t is None else _lifted(t, rank) for t in tangents)
    pushed = _sum(
        [
            None if a is None else a * place.saved("_saved_other"),
            None if b is None else b * place.saved("_saved_self"),
        ]
    )
    if a is None or b is None or cotangent is None:
        return pushed, None
    return pushed, a * b * cotangent


def _divided(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of ``q = a / b``: ``q' = (a' - q b') / b``, and ``-2 q' b' / b``."""
    if node_attribute(place.node, "_saved_rounding_mode") is not None:
        raise RuntimeError("a division that rounds")
    rank, below = len(place.out), place.saved("_saved_other")
    a, b = (None if t is None else _lifted(t, rank) for t in tangents)
    if b is None:
        assert a is not None
        return a / below, None
    scaled = b / below
    pushed = _sum([None if a is None else a / below, scaled * (place.saved("_saved_self") / -below)])
    return pushed, None if cotangent is None else pushed * scaled * cotangent


def _matrix_product(left: int, right: int, first: str, second: str) -> Rule:
    """Of what ``first`` and ``second`` were saved as; something may be added to it."""

    def rule(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = tangents[left], tangents[right]
        pushed = None if a is None else a @ place.saved(second)  # type: ignore[operator]
        if b is not None:
            other = place.saved(first) @ b  # type: ignore[operator]
            pushed = other if pushed is None else pushed + other
        bend = None if a is None or b is None or cotangent is None else (a @ b) * cotangent
        if left == 0:
            assert pushed is not None
            return pushed, bend
        alpha, beta = place.number("_saved_alpha"), place.number("_saved_beta")
        if alpha != 1:
            pushed = None if pushed is None else pushed * alpha
            bend = None if bend is None else bend * alpha
        added = tangents[0]
        total = _sum([pushed, None if added is None else _lifted(added, len(place.out)) * beta])
        return total.expand(len(total), *place.out), bend

    return rule


# ---------------------------------------------------------------------------------------------------------
# functions of one element


def _of_one(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both derivatives by PyTorch's formulas."""
    position, value, _ = place.varying()
    tangent = _present(tangents)
    first, second = slopes(place.node, position, value, place.out, tangent, place.keep)
    pushed = tangent * first
    if second is None or cotangent is None:
        return pushed, None
    return pushed, (tangent * tangent).mul_(second * cotangent)


def _by_slopes(formula: Callable[[Place], tuple[Tensor, Tensor]]) -> Rule:
    """By ``f'`` and ``f'' / f'``: the second is multiplied by what has been pushed already."""

    def rule(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tangent = _present(tangents)
        first, ratio = formula(place)
        pushed = tangent * first
        return pushed, None if cotangent is None else (tangent * pushed).mul_(ratio * cotangent)

    return rule


def _saved(place: Place, name: str) -> Tensor:
    found = place.saved(name)
    assert isinstance(found, Tensor)
    return found


def _tanh(place: Place) -> tuple[Tensor, Tensor]:
    z = _saved(place, "_saved_result")
    return torch.addcmul(z.new_ones(()), z, z, value=-1), z


def _sigmoid(place: Place) -> tuple[Tensor, Tensor]:
    z = _saved(place, "_saved_result")
    return torch.addcmul(z, z, z, value=-1), 1 - 2 * z


def _exp(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tangent = _present(tangents)
    pushed = tangent * _saved(place, "_saved_result")
    return pushed, None if cotangent is None else (tangent * pushed).mul_(cotangent)


def _squared(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tangent = _present(tangents)
    pushed = tangent * (2 * _saved(place, "_saved_self"))
    return pushed, None if cotangent is None else (tangent * tangent).mul_(cotangent)


def _sin(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x, tangent = _saved(place, "_saved_self"), _present(tangents)
    pushed = tangent * x.cos()
    return pushed, None if cotangent is None else (tangent * tangent).mul_(x.sin() * cotangent)


def _cos(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x, tangent = _saved(place, "_saved_self"), _present(tangents)
    pushed = tangent * x.sin().neg()
    return pushed, None if cotangent is None else (tangent * tangent).mul_(x.cos() * cotangent)


_FUNCTIONS: dict[str, Operation] = {
    "Tanh": Operation(_by_slopes(_tanh), True, -2.0),
    "Sigmoid": Operation(_by_slopes(_sigmoid), True),
    "Exp": Operation(_exp, True),
    "Square": Operation(_squared, True, 2.0),
    "Sin": Operation(_sin, True, -1.0),
    "Cos": Operation(_cos, True, -1.0),
}

# The places of their operands, and the scale of what they bend.
_PRODUCTS: dict[str, tuple[int, int, Rule, float]] = {
    "Mul": (0, 1, _multiplied, 2.0),
    "Div": (0, 1, _divided, -2.0),
    "Mm": (0, 1, _matrix_product(0, 1, "_saved_self", "_saved_mat2"), 2.0),
    "Bmm": (0, 1, _matrix_product(0, 1, "_saved_self", "_saved_mat2"), 2.0),
    "Addmm": (1, 2, _matrix_product(1, 2, "_saved_mat1", "_saved_mat2"), 2.0),
    "Baddbmm": (1, 2, _matrix_product(1, 2, "_saved_batch1", "_saved_batch2"), 2.0),
}

_MOVES: dict[str, Rule] = {
    **dict.fromkeys(RESHAPES, _reshaped),
    "Expand": _expanded,
    "T": _reversed,
    "Transpose": _swapped,
    "Permute": _permuted,
    **dict.fromkeys(["Select", "Slice", "Split", "SplitWithSizes", "Unbind"], _taken),
    "Stack": _stacked,
    "Cat": _joined,
    "Sum": _summed,
    "Mean": _averaged,
    "Add": _added(1),
    "Sub": _added(-1),
    "Neg": _negated,
}
