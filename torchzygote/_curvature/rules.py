"""What one recorded operation does to tangents, and how curved it is along them.

Of tangents ``t`` of the inputs a rule makes those of the output. Where the output ``z`` has the cotangent
``c``, its curvature is the second derivative of ``c . z`` along ``t``: zero for linear operations,
``c f''(x) t^2`` for functions of one element. Knows single operations; it must not know what the curvatures
are summed up to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._recorded.alignment import LOSSES, is_linear
from .._recorded.alignment_rules import ELEMENTWISE
from .._recorded.moves import kind_of_node
from .._torch_private import count_outputs, curvature_by, node_attribute, node_name
from .elementwise import Derivatives, function, pushed
from .linear import MOVES, Form, Recorded, Rule, Tangents, dims_of, lifted, present, sum_of, transposed
from .samples import Samples

__all__ = ["Operation", "operation"]


class Operation(NamedTuple):
    """What makes tangents and curvatures: a rule, or the derivatives of a function of one element.

    ``is_curved``: it isn't linear, and needs the cotangent. ``scale``: what curvatures are to be multiplied
    by. ``shaped_by``: the place of the input that they have the shape of; ``None``: that of the output.
    ``is_fresh``: the tangents that it makes have memory of their own, and are no views of others.
    """

    rule: Rule | None
    is_curved: bool
    scale: float = 1.0
    shaped_by: int | None = None
    is_fresh: bool = False
    derivatives: Derivatives | None = None

    def push(
        self,
        at: Recorded,
        given: Tangents,
        cotangent: Tensor | None,
        samples: Samples | None,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Tangents of the output and, for each direction and sample, the curvature, if there is any.

        ``samples``: those of what the curvature has the shape of. ``overwrite``: nobody else reads the memory
        of the tangents.
        """
        if self.derivatives is not None:
            assert samples is not None
            tangent = present(given)
            return pushed(self.derivatives(at, cotangent, tangent), tangent, samples, overwrite)
        assert self.rule is not None
        tangent, form = self.rule(at, given, cotangent)
        if form is None:
            return tangent, None
        assert samples is not None
        return tangent, samples.summed(form.along())


def operation(place: Recorded) -> Operation | None:
    """The rule for what was recorded; ``None`` if there is none."""
    kind, node = kind_of_node(node_name(place.node)), place.node
    varying = [value is not None for value in place.before]
    if kind in MOVES and (kind != "Cat" or all(varying)):
        return Operation(MOVES[kind], False)
    if kind in _PRODUCTS and len(varying) > 1:
        left, right, found = _PRODUCTS[kind]
        return found._replace(is_curved=varying[right] and (varying[left] or kind == "Div"))
    if count_outputs(node) > 1:
        return None
    if is_linear(kind, varying):
        return Operation(transposed, False)
    if sum(varying) != 1:
        return None
    position, _, shape = place.varying()
    if kind in _MANY:
        known = kind != "LinalgVectorNorm" or node_attribute(node, "_saved_ord") == 2
        return _MANY[kind] if known else None
    if kind in ("Amax", "Amin"):  # linear, but where elements are equal
        return Operation(transposed, False)
    if kind in LOSSES and not place.out:
        return Operation(_of_many, True, shaped_by=position)
    if kind not in ELEMENTWISE or shape != place.out:
        return None
    derivatives, scale = function(kind, place)
    return Operation(None, True, scale, is_fresh=True, derivatives=derivatives)


# ---------------------------------------------------------------------------------------------------------
# products


def _multiplied(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
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
    return pushed, Form(a, cotangent, b)


def _divided(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
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
    return pushed, None if cotangent is None else Form(pushed, cotangent, scaled)


def _matrix_product(left: int, first: str, second: str) -> Rule:
    """Of what ``first`` and ``second`` were saved as; something may be added to it."""

    def rule(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
        a, b = tangents[left], tangents[left + 1]
        pushed = None if a is None else a @ place.tensor(second)
        if b is not None:
            other = place.tensor(first) @ b
            pushed = other if pushed is None else pushed + other
        if left > 0 and (alpha := place.number("_saved_alpha")) != 1:
            pushed = None if pushed is None else pushed * alpha
            cotangent = None if cotangent is None else cotangent * alpha
        form = None
        if a is not None and b is not None and cotangent is not None:
            form = Form(a, None, cotangent @ b.mT)
        if left > 0 and (added := tangents[0]) is not None:
            total = sum_of([pushed, lifted(added, len(place.out)) * place.number("_saved_beta")])
            return total.expand(len(total), *place.out), form
        assert pushed is not None
        return pushed, form

    return rule


def _times_vector(
    place: Recorded, tangents: Tangents, cotangent: Tensor | None
) -> tuple[Tensor, Form | None]:
    a, b = tangents
    pushed = sum_of(
        [
            None if a is None else a @ place.tensor("_saved_vec"),
            None if b is None else b @ place.tensor("_saved_self").mT,
        ]
    )
    if a is None or b is None or cotangent is None:
        return pushed, None
    return pushed, Form(a, cotangent.unsqueeze(1), b.unsqueeze(1))


def _dot(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
    a, b = tangents
    pushed = sum_of(
        [
            None if a is None else a @ place.tensor("_saved_tensor"),
            None if b is None else b @ place.tensor("_saved_self"),
        ]
    )
    return pushed, None if a is None or b is None or cotangent is None else Form(a, cotangent, b)


# ---------------------------------------------------------------------------------------------------------
# functions of many elements


def _of_many(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
    """Of a sum of such functions, likewise: its pullback is linear in the cotangent.

    That must not depend on the input; it doesn't above everything that is curved.
    """
    position, value, _ = place.varying()
    pushed, _ = transposed(place, tangents, None)
    if cotangent is None:
        return pushed, None
    tangent = present(tangents)
    rows = curvature_by(place.node, position, value, cotangent, tangent, place.keep)
    return pushed, None if rows is None else Form(rows, None, tangent)


def _kept(result: Tensor, shape: Sequence[int], dims: Sequence[int]) -> Tensor:
    """A reduction's result with as many axes as what it is of, whether they were kept or not."""
    return result.reshape([1 if 1 + i in dims else n for i, n in enumerate(shape)])


def _logsumexp(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
    x, tangent = place.tensor("_saved_self"), present(tangents)
    dims = dims_of(place, x.dim())
    p = (x - _kept(place.tensor("_saved_result"), x.shape, dims)).exp()
    mean = (p * tangent).sum(dims, keepdim=True)
    pushed = mean.reshape(len(tangent), *place.out)
    if cotangent is None:
        return pushed, None
    off = tangent - mean
    return pushed, Form(off, p * _kept(cotangent, x.shape, dims), off)


def _log_softmax(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
    p, tangent = place.tensor("_saved_result").exp(), present(tangents)
    dims = dims_of(place, p.dim())
    off = tangent - (p * tangent).sum(dims, keepdim=True)
    return off, None if cotangent is None else Form(off, p * cotangent.sum(dims[0] - 1, keepdim=True), off)


def _softmax(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
    p, tangent = place.tensor("_saved_result"), present(tangents)
    dims = dims_of(place, p.dim())
    off = tangent - (p * tangent).sum(dims, keepdim=True)
    if cotangent is None:
        return p * off, None
    weight = p * (cotangent - (p * cotangent).sum(dims[0] - 1, keepdim=True))
    return p * off, Form(off, weight, off)


def _vector_norm(place: Recorded, tangents: Tangents, cotangent: Tensor | None) -> tuple[Tensor, Form | None]:
    """The Euclidean one: how fast a tangent grows, and what is across."""
    x, tangent = place.tensor("_saved_self"), present(tangents)
    dims = dims_of(place, x.dim())
    norm = _kept(place.tensor("_saved_result"), x.shape, dims)
    unit = x / norm
    along = (unit * tangent).sum(dims, keepdim=True)
    pushed = along.reshape(len(tangent), *place.out)
    if cotangent is None:
        return pushed, None
    across = tangent - unit * along
    return pushed, Form(across, _kept(cotangent, x.shape, dims) / norm, across)


_MANY: dict[str, Operation] = {
    "Logsumexp": Operation(_logsumexp, True, shaped_by=0),
    "LogSoftmax": Operation(_log_softmax, True, -1.0),
    "Softmax": Operation(_softmax, True),
    "LinalgVectorNorm": Operation(_vector_norm, True, shaped_by=0),
}


def _product(rule: Rule, shaped_by: int | None, scale: float = 2.0) -> Operation:
    return Operation(rule, True, scale, shaped_by, is_fresh=True)


# The places of their operands; curved where both vary.
_PRODUCTS: dict[str, tuple[int, int, Operation]] = {
    "Mul": (0, 1, _product(_multiplied, None)),
    "Div": (0, 1, _product(_divided, None, -2.0)),
    "Mm": (0, 1, _product(_matrix_product(0, "_saved_self", "_saved_mat2"), 0)),
    "Bmm": (0, 1, _product(_matrix_product(0, "_saved_self", "_saved_mat2"), 0)),
    "Addmm": (1, 2, _product(_matrix_product(1, "_saved_mat1", "_saved_mat2"), 1)),
    "Baddbmm": (1, 2, _product(_matrix_product(1, "_saved_batch1", "_saved_batch2"), 1)),
    "Mv": (0, 1, _product(_times_vector, 0)),
    "Dot": (0, 1, _product(_dot, 0)),
}
