"""What one recorded operation does to tangents, and how curved it is along them.

Of tangents ``t`` of the inputs a rule makes those of the output. Where the output ``z`` has the cotangent
``c``, its curvature is the second derivative of ``c . z`` along ``t``: zero for linear operations,
``c f''(x) t^2`` for functions of one element. Knows single operations; it must not know what the curvatures
are summed up to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._alignment import LOSSES, is_linear
from ._alignment_rules import ELEMENTWISE
from ._curvature_linear import (
    MOVES,
    Place,
    Rule,
    Tangents,
    dims_of,
    lifted,
    present,
    sum_of,
    transposed,
)
from ._pieces import kind_of_node
from ._torch_private import curvature_by, node_attribute, pushed_through, slopes

__all__ = ["Operation", "operation"]


class Operation(NamedTuple):
    """``rule`` makes tangents and curvatures, these but for a factor ``scale``.

    ``is_curved``: it isn't linear, and needs the cotangent. ``whole``: its curvature has the shape of what
    goes in; else that of the output.
    """

    rule: Rule
    is_curved: bool
    scale: float = 1.0
    whole: bool = False


def operation(place: Place) -> Operation | None:
    """The rule for what was recorded; ``None`` if there is none."""
    kind, node = kind_of_node(place.node.name()), place.node
    varying = [value is not None for value in place.before]
    if kind in MOVES and (kind != "Cat" or all(varying)):
        return Operation(MOVES[kind], False)
    if kind in _PRODUCTS:
        left, right, rule, scale = _PRODUCTS[kind]
        return Operation(rule, varying[right] and (varying[left] or kind == "Div"), scale)
    if len(node._input_metadata) > 1:
        return None
    if is_linear(kind, varying):
        return Operation(transposed, False)
    if sum(varying) != 1:
        return None
    if kind in _MANY:
        known = kind != "LinalgVectorNorm" or node_attribute(node, "_saved_ord") == 2
        return _MANY[kind] if known else None
    if kind in ("Amax", "Amin"):  # linear, but where elements are equal
        return Operation(transposed, False)
    if kind in LOSSES and not place.out:
        return Operation(_of_many, True, whole=True)
    if kind not in ELEMENTWISE or place.varying()[2] != place.out:
        return None
    if kind == "Pow" and node.name() == "PowBackward0" and node_attribute(node, "_saved_exponent") == 2:
        return _SQUARE
    return _FUNCTIONS.get(kind) or Operation(_of_one, True)


def _saved(place: Place, name: str) -> Tensor:
    found = place.saved(name)
    assert isinstance(found, Tensor)
    return found


# ---------------------------------------------------------------------------------------------------------
# products


def _multiplied(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    rank = len(place.out)
    a, b = (None if t is None else lifted(t, rank) for t in tangents)
    pushed = sum_of(
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
    a, b = (None if t is None else lifted(t, rank) for t in tangents)
    if b is None:
        assert a is not None
        return a / below, None
    scaled = b / below
    pushed = sum_of([None if a is None else a / below, scaled * (place.saved("_saved_self") / -below)])
    return pushed, None if cotangent is None else pushed * scaled * cotangent


def _matrix_product(left: int, right: int, first: str, second: str) -> Rule:
    """Of what ``first`` and ``second`` were saved as; something may be added to it."""

    def rule(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        a, b = tangents[left], tangents[right]
        pushed = None if a is None else a @ _saved(place, second)
        if b is not None:
            other = _saved(place, first) @ b
            pushed = other if pushed is None else pushed + other
        curvature = None if a is None or b is None or cotangent is None else (a @ b) * cotangent
        if left == 0:
            assert pushed is not None
            return pushed, curvature
        alpha, beta = place.number("_saved_alpha"), place.number("_saved_beta")
        if alpha != 1:
            pushed = None if pushed is None else pushed * alpha
            curvature = None if curvature is None else curvature * alpha
        added = tangents[0]
        total = sum_of([pushed, None if added is None else lifted(added, len(place.out)) * beta])
        return total.expand(len(total), *place.out), curvature

    return rule


# ---------------------------------------------------------------------------------------------------------
# functions


def _of_one(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both derivatives by PyTorch's formulas."""
    position, value, _ = place.varying()
    tangent = present(tangents)
    first, second = slopes(place.node, position, value, place.out, tangent, place.keep)
    pushed = tangent * first
    if second is None or cotangent is None:
        return pushed, None
    return pushed, (tangent * tangent).mul_(second * cotangent)


def _of_many(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Of a sum of such functions, likewise: its pullback is linear in the cotangent.

    That must not depend on the input; it doesn't above everything that is curved.
    """
    position, value, _ = place.varying()
    pushed = pushed_through(place.node, tangents, place.out, place.keep)
    if cotangent is None:
        return pushed, None
    return pushed, curvature_by(place.node, position, value, cotangent, present(tangents), place.keep)


def _kept(result: Tensor, x: Tensor, dims: Sequence[int]) -> Tensor:
    """A reduction's result with the axes of ``x``, whether they were kept or not."""
    return result.reshape([1 if 1 + i in dims else n for i, n in enumerate(x.shape)])


def _spread(p: Tensor, tangent: Tensor, dims: list[int]) -> tuple[Tensor, Tensor]:
    """The mean of tangents with weights ``p``, and how far they are from it."""
    mean = (p * tangent).sum(dims, keepdim=True)
    return mean, tangent - mean


def _logsumexp(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x, tangent = _saved(place, "_saved_self"), present(tangents)
    dims, shape = dims_of(place, x.dim()), (len(tangent), *place.out)
    p = (x - _kept(_saved(place, "_saved_result"), x, dims)).exp()
    mean, off = _spread(p, tangent, dims)
    return mean.reshape(shape), None if cotangent is None else (p * off * off).sum(dims).reshape(
        shape
    ) * cotangent


def _log_softmax(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    p, tangent = _saved(place, "_saved_result").exp(), present(tangents)
    (dim,) = dims_of(place, p.dim())
    _, off = _spread(p, tangent, [dim])
    return off, None if cotangent is None else p * off * off * cotangent.sum(dim - 1, keepdim=True)


def _softmax(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    p, tangent = _saved(place, "_saved_result"), present(tangents)
    dims = dims_of(place, p.dim())
    _, off = _spread(p, tangent, dims)
    pushed = p * off
    if cotangent is None:
        return pushed, None
    squares = pushed * off
    return pushed, squares * cotangent - p * squares.sum(dims, keepdim=True) * cotangent


def _vector_norm(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The Euclidean one: how fast a tangent grows, and what is across."""
    x, tangent = _saved(place, "_saved_self"), present(tangents)
    dims, shape = dims_of(place, x.dim()), (len(tangent), *place.out)
    norm = _kept(_saved(place, "_saved_result"), x, dims)
    unit = x / norm
    along = (unit * tangent).sum(dims, keepdim=True)
    if cotangent is None:
        return along.reshape(shape), None
    across = tangent - unit * along
    return along.reshape(shape), ((across * across).sum(dims, keepdim=True) / norm).reshape(shape) * cotangent


def _by_slopes(formula: Callable[[Place], tuple[Tensor, Tensor]]) -> Rule:
    """By ``f'`` and ``f'' / f'``: the second is multiplied by what has been pushed already."""

    def rule(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tangent = present(tangents)
        first, ratio = formula(place)
        pushed = tangent * first
        return pushed, None if cotangent is None else (tangent * pushed).mul_(ratio * cotangent)

    return rule


def _tanh(place: Place) -> tuple[Tensor, Tensor]:
    z = _saved(place, "_saved_result")
    return torch.addcmul(z.new_ones(()), z, z, value=-1), z


def _sigmoid(place: Place) -> tuple[Tensor, Tensor]:
    z = _saved(place, "_saved_result")
    return torch.addcmul(z, z, z, value=-1), 1 - 2 * z


def _exp(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tangent = present(tangents)
    pushed = tangent * _saved(place, "_saved_result")
    return pushed, None if cotangent is None else (tangent * pushed).mul_(cotangent)


def _squared(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    tangent = present(tangents)
    pushed = tangent * (2 * _saved(place, "_saved_self"))
    return pushed, None if cotangent is None else (tangent * tangent).mul_(cotangent)


def _sin(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x, tangent = _saved(place, "_saved_self"), present(tangents)
    pushed = tangent * x.cos()
    return pushed, None if cotangent is None else (tangent * tangent).mul_(x.sin() * cotangent)


def _cos(place: Place, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Tensor | None]:
    x, tangent = _saved(place, "_saved_self"), present(tangents)
    pushed = tangent * x.sin().neg()
    return pushed, None if cotangent is None else (tangent * tangent).mul_(x.cos() * cotangent)


_MANY: dict[str, Operation] = {
    "Logsumexp": Operation(_logsumexp, True),
    "LogSoftmax": Operation(_log_softmax, True, -1.0),
    "Softmax": Operation(_softmax, True),
    "LinalgVectorNorm": Operation(_vector_norm, True),
}

_FUNCTIONS: dict[str, Operation] = {
    "Tanh": Operation(_by_slopes(_tanh), True, -2.0),
    "Sigmoid": Operation(_by_slopes(_sigmoid), True),
    "Exp": Operation(_exp, True),
    "Sin": Operation(_sin, True, -1.0),
    "Cos": Operation(_cos, True, -1.0),
}

_SQUARE = Operation(_squared, True, 2.0)

# The places of their operands, and the scale of their curvature.
_PRODUCTS: dict[str, tuple[int, int, Rule, float]] = {
    "Mul": (0, 1, _multiplied, 2.0),
    "Div": (0, 1, _divided, -2.0),
    "Mm": (0, 1, _matrix_product(0, 1, "_saved_self", "_saved_mat2"), 2.0),
    "Bmm": (0, 1, _matrix_product(0, 1, "_saved_self", "_saved_mat2"), 2.0),
    "Addmm": (1, 2, _matrix_product(1, 2, "_saved_mat1", "_saved_mat2"), 2.0),
    "Baddbmm": (1, 2, _matrix_product(1, 2, "_saved_batch1", "_saved_batch2"), 2.0),
}
