"""Functions of single elements: what they do to tangents, and how curved they are along them.

Where ``z = f(x)`` has the cotangent ``c``, a tangent ``t`` becomes ``f'(x) t``, and the curvature is
``c f''(x) t^2``. Knows functions and their derivatives; it must not know what the curvatures are summed up
to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch_private import node_attribute, node_name, slopes
from ..native.elementwise import push_elementwise, slope_and_weight
from .linear import Recorded
from .samples import Samples

__all__ = ["Function", "Slopes", "function", "pushed"]


class Slopes(NamedTuple):
    """``slope``: ``f'(x)``; ``weight``: of the curvature, but for a factor, ``None`` where there is none.

    It is multiplied by the tangent and, if ``squared``, by the tangent again, else by what becomes of it.
    ``function``: its result and the cotangent stand in their place.
    """

    slope: Tensor
    weight: Tensor | None
    squared: bool
    function: str = ""


# The recorded function, the cotangent of what it gives, tangents like those that are pushed
Derivatives = Callable[[Recorded, "Tensor | None", Tensor], Slopes]


class Function(NamedTuple):
    """Its derivatives; ``scale``: the factor that curvatures are to be multiplied by."""

    derivatives: Derivatives
    scale: float = 1.0


def function(kind: str, place: Recorded) -> Function:
    """Of a node of this kind, which works element by element."""
    node = place.node
    if kind == "Pow" and node_name(node) == "PowBackward0" and node_attribute(node, "_saved_exponent") == 2:
        return _SQUARE
    return _FUNCTIONS.get(kind, _ANY)


def pushed(
    given: Slopes, tangents: Tensor, samples: Samples, overwrite: bool
) -> tuple[Tensor, Tensor | None]:
    """What becomes of the tangents, and their curvature for each direction and sample, if there is any.

    ``overwrite``: nobody else reads the memory of ``tangents``.
    """
    slope, weight, squared, function = given
    if weight is None:
        return tangents * slope, None
    if samples.are_first and slope.shape == weight.shape == tangents.shape[1:]:
        rows = len(tangents)
        found, terms = push_elementwise(
            tangents.reshape(rows, samples.number, -1),
            slope.reshape(samples.number, -1),
            weight.reshape(samples.number, -1),
            squared=squared,
            function=function,
            overwrite=overwrite and tangents.is_contiguous(),
        )
        return found.view(tangents.shape), terms
    slope, weight = slope_and_weight(function, slope, weight)
    found = tangents * slope
    return found, samples.summed((tangents * (tangents if squared else found)).mul_(weight))


def _any(place: Recorded, cotangent: Tensor | None, like: Tensor) -> Slopes:
    """By PyTorch's formulas."""
    position, value, _ = place.varying()
    first, second = slopes(
        place.node, position, value if cotangent is not None else None, place.out, like, place.keep
    )
    return Slopes(first, None if second is None or cotangent is None else second * cotangent, True)


def _tanh(place: Recorded, cotangent: Tensor | None, like: Tensor) -> Slopes:
    z = place.tensor("_saved_result")
    if cotangent is not None:
        return Slopes(z, cotangent, False, "tanh")
    return Slopes(torch.addcmul(z.new_ones(()), z, z, value=-1), None, False)


def _sigmoid(place: Recorded, cotangent: Tensor | None, like: Tensor) -> Slopes:
    z = place.tensor("_saved_result")
    if cotangent is not None:
        return Slopes(z, cotangent, False, "sigmoid")
    return Slopes(torch.addcmul(z, z, z, value=-1), None, False)


def _exp(place: Recorded, cotangent: Tensor | None, like: Tensor) -> Slopes:
    return Slopes(place.tensor("_saved_result"), cotangent, False)


def _squared(place: Recorded, cotangent: Tensor | None, like: Tensor) -> Slopes:
    return Slopes(2 * place.tensor("_saved_self"), cotangent, True)


def _sin(place: Recorded, cotangent: Tensor | None, like: Tensor) -> Slopes:
    x = place.tensor("_saved_self")
    return Slopes(x.cos(), None if cotangent is None else x.sin() * cotangent, True)


def _cos(place: Recorded, cotangent: Tensor | None, like: Tensor) -> Slopes:
    x = place.tensor("_saved_self")
    return Slopes(x.sin().neg(), None if cotangent is None else x.cos() * cotangent, True)


_FUNCTIONS: dict[str, Function] = {
    "Tanh": Function(_tanh, -2.0),
    "Sigmoid": Function(_sigmoid),
    "Exp": Function(_exp),
    "Sin": Function(_sin, -1.0),
    "Cos": Function(_cos, -1.0),
}
_SQUARE = Function(_squared, 2.0)
_ANY = Function(_any)
