"""How many elements of an input one element of a result depends on, where windows slide over images.

An estimate off the recorded graph, which may be wrong both ways: windows of one chain add up, sums and matrix
products multiply, and what has no rule takes everything. Knows graph nodes and shapes, nothing of products.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._torch_private import (
    came_before,
    is_leaf,
    node_attribute,
    node_name,
    node_names,
    node_shape,
    number_of,
    source_of,
)
from .alignment import keeps_apart
from .alignment_rules import REDUCTIONS, Shape
from .moves import Value, kind_of_node
from .walk import evaluate

__all__ = ["Reach", "reach"]

_log = logging.getLogger("torchzygote")

_MOST_NODES = 2000

_CONVOLUTIONS = frozenset({"Convolution", "ConvolutionBackward"})
_POOLS = frozenset(
    """
    AvgPool2D AvgPool2DBackward AvgPool3D AvgPool3DBackward MaxPool2DWithIndices MaxPool3DWithIndices
    """.split()  # noqa: SIM905
)
_WINDOWS = _CONVOLUTIONS | _POOLS | {"Im2Col", "Unfold"}
# Beside what keeps elements apart: each element of the result is one of the input, or comes of very few.
_FEW = frozenset(
    """
    Expand Im2Col MaxPool2DWithIndicesBackward MaxPool3DWithIndicesBackward Repeat Unfold
    ReflectionPad1D ReflectionPad1DBackward ReflectionPad2D ReflectionPad2DBackward ReflectionPad3D
    ReplicationPad1D ReplicationPad1DBackward ReplicationPad2D ReplicationPad2DBackward ReplicationPad3D
    """.split()  # noqa: SIM905
)
_SUMS = frozenset([*REDUCTIONS, "Col2Im", "UnfoldBackward"])
# In which places matrix products have their factors.
_PRODUCTS = {
    **dict.fromkeys(["Bmm", "Mm", "Mv"], (0, 1)),
    **dict.fromkeys(["Addmm", "Addmv", "Baddbmm"], (1, 2)),
}
# Where there are fewer, their backward computes with zeros in place of the others.
_FEW_CHANNELS = 4
# Writing into a view: what was there, and what is written.
_WRITES = "torch::autograd::CopySlices"


class Reach(NamedTuple):
    """``elements``: of the input, for one of the result. ``members``: the same for all values on the way.

    ``is_slow``: rows are pulled back through convolutions of few channels, or ``unfold``.
    """

    elements: int
    members: int
    is_slow: bool


class _Window(NamedTuple):
    """A box in an ``image`` of the input, ``extent`` more than one element along each of its axes.

    ``extent``: in parts of the image's. ``channels``: elements of the input for one place of the image.
    ``terms``: how many such boxes, wherever they are.
    """

    image: tuple[int, ...] = ()
    extent: tuple[float, ...] = ()
    channels: int = 1
    terms: float = 1

    def elements(self, most: int) -> int:
        """How many, of ``most``."""
        places = math.prod(min(n, 1 + part * n) for n, part in zip(self.image, self.extent, strict=True))
        channels = min(self.channels, most / max(1, math.prod(self.image)))
        return min(most, math.ceil(places * max(1, channels) * self.terms))

    def slid(self, image: Shape, extent: Sequence[float], channels: int) -> _Window:
        """Each element comes of a box of an image of the value, in so many channels."""
        if not self.image:
            return self._replace(image=tuple(image), extent=tuple(extent), channels=channels)
        if len(image) != len(self.image):
            raise _Mixed
        added = tuple(a + b for a, b in zip(self.extent, extent, strict=True))
        return self._replace(extent=added, channels=self.channels * channels)

    def summed(self, terms: float) -> _Window:
        """Each element comes of so many."""
        return self._replace(terms=self.terms * terms)


class _Mixed(Exception):
    """Everything may meet here."""


def reach(root: Tensor, x: Tensor) -> Reach | None:
    """``None`` without windows, and where one element may depend on everything."""
    if root.grad_fn is None or not any(kind_of_node(name) in _WINDOWS for name in node_names(root)):
        return None
    walk = _ReachWalk(x)
    number, value = number_of([x]), (root.grad_fn, root.output_nr)
    is_end = None if number is None else functools.partial(came_before, number=number)
    try:
        if not evaluate(value, walk.known, walk.of_output, _MOST_NODES, is_end):
            return None
    except _Mixed:
        return None
    except Exception as error:  # a form of an operation that its rule doesn't know
        _log.debug("reach: taken as mixing everything: %s: %s", type(error).__name__, error)
        return None
    found = walk.known[value]
    return None if found is None else Reach(found.elements(walk.numel), walk.members, walk.is_slow)


class _ReachWalk:
    """Windows of the recorded values, each value looked at once."""

    def __init__(self, x: Tensor) -> None:
        self.known: dict[Value, _Window | None] = {}
        self.numel = x.numel()
        self.members = 0
        self.is_slow = False
        self._leaf = id(x) if is_leaf(x) else None
        if self._leaf is None:
            self.known[source_of(x)] = _Window()

    def of_output(self, node: Any, number: int, before: Sequence[Value]) -> _Window | None:
        if not before:
            is_input = self._leaf is not None and id(node_attribute(node, "variable")) == self._leaf
            return _Window() if is_input else None
        given = [self.known.get(value) for value in before]
        if not any(given):
            return None
        out = node_shape(node, number)
        shapes = [
            None if one is None else node_shape(*value) for one, value in zip(given, before, strict=True)
        ]
        # Further outputs are by weights, or indices.
        if out is None or (number > 0 and kind_of_node(node_name(node)) in _WINDOWS):
            raise _Mixed
        found = _through(node, given, shapes, out)
        self.is_slow |= _is_slow(node, shapes[0], out)
        if found not in given:
            self.members += math.prod(out) * found.elements(self.numel)
        return found


def _through(
    node: Any, given: Sequence[_Window | None], shapes: Sequence[Shape | None], out: Shape
) -> _Window:
    """What an element of the result takes, from what those of its inputs do."""
    name = node_name(node)
    kind = kind_of_node(name)
    met, shape = _meeting(given), next((one for one in shapes if one is not None), ())
    if keeps_apart(name) or kind in _FEW or name == _WRITES:
        return met
    if kind == "NativeBatchNorm":  # with given statistics it scales and shifts
        training = node_attribute(node, "_saved_training")
        training = node_attribute(node, "_saved_train") if training is None else training
        if training is False and not any(given[1:]):
            return met
    elif kind in _SUMS:
        return met.summed(math.prod(shape) / max(1, math.prod(out)))
    elif kind in _PRODUCTS:
        left, right = (shapes[place] for place in _PRODUCTS[kind])
        length = left[-1] if left is not None else right[-2:][0] if right is not None else 1
        return met.summed(length)
    elif kind in _CONVOLUTIONS and not any(given[2 if kind == "ConvolutionBackward" else 1 :]):
        return _convolved(node, kind, met, shapes[0] or shape, out)
    elif kind in _POOLS:
        return _pooled(node, met, out if kind.endswith("Backward") else shape)
    raise _Mixed


def _is_slow(node: Any, shape: Shape | None, out: Shape) -> bool:
    kind = kind_of_node(node_name(node))
    if kind in _CONVOLUTIONS:
        return shape is not None and min(shape[1], out[1]) < _FEW_CHANNELS
    return kind == "Unfold"


def _meeting(given: Sequence[_Window | None]) -> _Window:
    """The largest of each, as windows of several branches mostly lie in the same places."""
    met, *others = [one for one in given if one is not None]
    for other in others:
        if not (met.image and other.image):
            image, extent = met.image or other.image, met.extent or other.extent
        elif len(met.image) == len(other.image):
            image, extent = met.image, tuple(map(max, met.extent, other.extent))
        else:
            raise _Mixed
        met = _Window(image, extent, max(met.channels, other.channels), max(met.terms, other.terms))
    return met


def _convolved(node: Any, kind: str, met: _Window, shape: Shape, out: Shape) -> _Window:
    """A convolution, or its transpose: the kernel's size is that which fits between the two images."""
    transposed = bool(node_attribute(node, "_saved_transposed")) != (kind == "ConvolutionBackward")
    large, small = (out, shape) if transposed else (shape, out)
    paddings, strides = (node_attribute(node, f"_saved_{name}") for name in ("padding", "stride"))
    extent = [
        max(0, n + 2 * padding - (m - 1) * stride - 1) / max(1, n)
        for n, m, padding, stride in zip(large[2:], small[2:], paddings, strides, strict=True)
    ]
    return met.slid(shape[2:], extent, shape[1] // int(node_attribute(node, "_saved_groups")))


def _pooled(node: Any, met: _Window, large: Shape) -> _Window:
    kernel = node_attribute(node, "_saved_kernel_size")
    dilations = node_attribute(node, "_saved_dilation") or [1] * len(kernel)
    image = large[len(large) - len(kernel) :]
    extent = [(k - 1) * d / max(1, n) for k, d, n in zip(kernel, dilations, image, strict=True)]
    return met.slid(image, extent, 1)
