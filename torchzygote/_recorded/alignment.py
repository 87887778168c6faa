"""Which axes of a result run along with which axes of an input, read off the recorded autograd graph.

A batch axis that every operation carries along unmixed makes a Jacobian block diagonal. Walking the recorded
graph proves it in microseconds, where tracing the function takes milliseconds; an operation that isn't in the
table below mixes everything, so what is found is never too much. Knows shapes and graph nodes, nothing of
products.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
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
from .alignment_rules import ELEMENTWISE, FREE, RULES, Alignment, Rule, Shape, all_free, meeting
from .moves import Value, kind_of_node
from .walk import evaluate

__all__ = [
    "LOSSES",
    "Alignment",
    "Separation",
    "aligned_axes",
    "is_linear",
    "jointly_aligned",
    "keeps_apart",
    "keeps_elements_apart",
    "separation",
    "shared_axes",
    "summed_axes",
]

_log = logging.getLogger("torchzygote")

_MOST_NODES = 20_000

# They move elements, each to a place or two.
_MOVES = """
    AsStrided Cat ConstantPadNd Flip Gather Index IndexSelect Permute ReshapeAlias Roll Scatter Select
    SelectBackward Slice SliceBackward Split SplitWithSizes Squeeze Stack T Transpose Unbind UnsafeView
    Unsqueeze View
""".split()  # noqa: SIM905
_APART = frozenset([*ELEMENTWISE, *_MOVES]) - {"Expand"}


@functools.cache
def keeps_apart(name: str) -> bool:
    """Whether the operation of this node works element by element, or moves elements."""
    return kind_of_node(name) in _APART or name == "torch::autograd::AccumulateGrad"


def keeps_elements_apart(roots: Sequence[Tensor]) -> bool:
    """Whether every recorded operation works element by element or moves elements; none sums or mixes."""
    return bool(roots) and all(keeps_apart(name) for root in roots for name in node_names(root))


# Rules are about the first output of a node; of these operations all outputs are alike.
_PARTS = frozenset({"Split", "SplitWithSizes", "Unbind"})


@functools.cache
def _rule(name: str, first: bool) -> Rule:
    """The rule for the first output of a node of this name, or for its others."""
    kind = kind_of_node(name)
    return RULES.get(kind, all_free) if first or kind in _PARTS else all_free


# Linear in all of their inputs together, with constant coefficients,
_LINEAR = frozenset(
    """
    Add Alias Clone Cumsum Expand MaskedFill Mean Neg Repeat Rsub ScatterAdd Sub Sum ToCopy Tril Triu Where
    """.split()  # noqa: SIM905
).union(_MOVES)
# or as long as no more of the inputs in these places vary.
_LINEAR_IN_FEW = {
    **dict.fromkeys(["Bmm", "Dot", "Mm", "Mul", "Mv"], ((0, 1), 1)),
    **dict.fromkeys(["Addmm", "Addmv", "Baddbmm"], ((1, 2), 1)),
    **dict.fromkeys(["Div", "NllLoss", "NllLoss2D"], ((1,), 0)),
}

# Sums or means of what they make of each element, where that is one number.
LOSSES = frozenset(
    """
    BinaryCrossEntropy BinaryCrossEntropyWithLogits HuberLoss MseLoss SmoothL1Loss SoftMarginLoss
    """.split()  # noqa: SIM905
)


def is_linear(kind: str, varying: Sequence[bool]) -> bool:
    """Whether an operation is linear in those of its inputs that vary, all together."""
    if kind not in _LINEAR_IN_FEW:
        return kind in _LINEAR
    places, most = _LINEAR_IN_FEW[kind]
    return sum(varying[place] for place in places if place < len(varying)) <= most


class _Walk:
    """Alignments of the recorded values with the axes of some inputs, each value looked at once.

    A value is an output of a node, as in ``node.next_functions``. ``chained``: inputs may come of each other,
    and what comes of them comes of all below.
    """

    def __init__(
        self, sources: Sequence[Tensor], axes: Sequence[Alignment], *, chained: bool = False
    ) -> None:
        # By their values, or ids where those of leaves: asking for a leaf's node takes an operation.
        given: dict[Any, tuple[Alignment, Shape]] = {}
        for x, a in zip(sources, axes, strict=True):
            key = id(x) if is_leaf(x) else source_of(x)
            if key in given:  # two views of the same value
                a = meeting([a, given[key][0]])
            given[key] = a, tuple(x.shape)
        self._known: dict[tuple[Any, int], tuple[Alignment, Shape] | None] = {}
        self._given = given
        self._is_unsure = False
        self._number = number_of(sources)
        if not chained:
            self._known.update(given)

    @property
    def values(self) -> Mapping[Value, tuple[Alignment, Shape] | None]:
        """All that was looked at, each value after what it comes of."""
        return self._known

    def of(self, root: Tensor) -> Alignment | None:
        """``None`` where ``root`` depends on none of the inputs, or nothing can be said."""
        if root.grad_fn is None:
            return None
        known, number, value = self._known, self._number, (root.grad_fn, root.output_nr)
        is_end = None if number is None else functools.partial(came_before, number=number)
        if not evaluate(value, known, self._of_output, _MOST_NODES, is_end):
            return None
        found = known[value]
        return None if found is None or self._is_unsure or len(found[0]) != root.dim() else found[0]

    def summands(self, y: Tensor) -> list[Alignment]:
        """Alignments of values from which ``y`` is a sum of terms, one for each element; after ``of(y)``.

        A term is any function of one element, or of the elements in the same place of several values.
        """
        found: list[Alignment] = []
        seen: set[tuple[Any, int]] = set()
        stack: list[tuple[Any, int]] = [(y.grad_fn, y.output_nr)]
        while stack:
            value = stack.pop()
            known = self._known.get(value)
            if known is None or value in seen:
                continue
            seen.add(value)
            kind, before = kind_of_node(node_name(value[0])), value[0].next_functions
            if value in self._given or not before:
                found.append(known[0])
                continue
            varying = [self._known.get(one) for one in before]
            if is_linear(kind, [one is not None for one in varying]):
                stack.extend(before)
            elif kind in LOSSES and not known[1]:
                elements = [one for one in varying if one is not None]
                shapes = {tuple(shape) for _, shape in elements}
                found.append(meeting([one for one, _ in elements]) if len(shapes) == 1 else ())
            else:
                found.append(known[0])
        return found

    def _given_at(self, node: Any, number: int, before: Any) -> tuple[Alignment, Shape] | None:
        given = self._given.get((node, number))
        leaf = None if before else self._given.get(id(node_attribute(node, "variable")))
        if given is None or leaf is None:
            return given or leaf
        return meeting([given[0], leaf[0]]), given[1]

    def _of_output(self, node: Any, number: int, before: Any) -> tuple[Alignment, Shape] | None:
        given = self._given_at(node, number, before)
        inputs = [self._known.get(value) for value in before]  # a constant input has no node
        if not any(inputs):
            return given
        name, out = node_name(node), node_shape(node, number)
        if out is None:  # a nested tensor: what comes of it would count as constant
            self._is_unsure = True
            return None
        if not out:
            return (), out
        try:
            found = _rule(name, number == 0)(node, inputs, out)
            if len(found) == len(out):
                return (found if given is None else meeting([found, given[0]])), out
            problem = f"{len(found)} axes instead of {len(out)}"
        except Exception as error:  # a form of the operation that its rule doesn't know
            problem = f"{type(error).__name__}: {error}"
        _log.debug("alignment: the rule for %s fails, taken as mixing everything: %s", name, problem)
        return (FREE,) * len(out), out


def aligned_axes(root: Tensor, x: Tensor) -> list[tuple[int, int]] | None:
    """Pairs ``(p, q)``: axis ``p`` of ``root`` runs along with axis ``q`` of ``x``.

    ``root[..., i, ...]`` (``i`` in place ``p``) depends only on the ``x[..., i, ...]`` (in place ``q``), for
    all pairs at once. ``None`` where ``root`` doesn't depend on ``x``, or nothing can be said.
    """
    if all(size <= 1 or size not in root.shape for size in x.shape):
        return []  # no axis could run along
    found = _Walk([x], [tuple(range(x.dim()))]).of(root)
    if found is None:
        return None
    return [
        (p, q)
        for p, q in enumerate(found)
        if isinstance(q, int) and q != FREE and x.shape[q] > 1 and root.shape[p] == x.shape[q]
    ]


def jointly_aligned(
    root: Tensor, values: Sequence[Tensor], axes: Sequence[Sequence[tuple[int, int]]]
) -> list[int]:
    """Axes of ``root`` that run along with all values at once: axis ``p`` with each one's ``q``.

    ``axes[i]``: the pairs ``(p, q)`` to be proved for value ``i``. Values may come of each other; one walk.
    """
    alignments = []
    for value, pairs in zip(values, axes, strict=True):
        named = {q: p for p, q in pairs}
        alignments.append(tuple(named.get(q, FREE) for q in range(value.dim())))
    found = _Walk(values, alignments, chained=True).of(root)
    return [] if found is None else [p for p, _ in axes[0] if found[p] == p]


def shared_axes(roots: Sequence[Tensor], inputs: Sequence[Tensor], common: int) -> list[int]:
    """Which of the first ``common`` axes, alike in all shapes, run from every input to every root unmixed."""
    walk = _Walk(inputs, [(*range(common), *[FREE] * (x.dim() - common)) for x in inputs])
    found = [walk.of(root) for root in roots]
    return [
        p for p in range(common) if inputs[0].shape[p] > 1 and all(a is not None and a[p] == p for a in found)
    ]


class Separation(NamedTuple):
    """How a scalar is a sum over samples.

    ``axes``: of the inputs, along which there is one term for each index. ``values``: alignment and shape of
    all values recorded, each after what it comes of; ``None`` for constants.
    """

    axes: list[int]
    values: Mapping[Value, tuple[Alignment, Shape] | None]


def separation(y: Tensor, inputs: Sequence[Tensor], common: int) -> Separation:
    """Along which of the first ``common`` axes, alike in all shapes, the scalar ``y`` is a plain sum.

    One term for each index: its Hessian is block diagonal along them. The gradient's graph tells that, too,
    but it has four times as many nodes, among them backwards that have no rule.
    """
    walk = _Walk(inputs, [(*range(common), *[FREE] * (x.dim() - common)) for x in inputs])
    if walk.of(y) is None:
        return Separation([], walk.values)
    found = [_axes_of(alignment) for alignment in walk.summands(y)]
    axes = [p for p in range(common) if inputs[0].shape[p] > 1 and found and all(p in axes for axes in found)]
    return Separation(axes, walk.values)


def summed_axes(y: Tensor, inputs: Sequence[Tensor], common: int) -> list[int]:
    """The axes of :func:`separation`."""
    return separation(y, inputs, common).axes


def _axes_of(alignment: Alignment) -> set[int]:
    """The axes of the input that each element has one index of."""
    axes: set[int] = set()
    for axis in alignment:
        axes.update([axis] if isinstance(axis, int) else [one for one, _ in axis])
    return axes
