"""Which axes of a result run along with which axes of an input, read off the recorded autograd graph.

A batch axis that every operation carries along unmixed makes a Jacobian block diagonal. Walking the recorded
graph proves it in microseconds, where tracing the function takes milliseconds; an operation that isn't in the
table below mixes everything, so what is found is never too much. Knows shapes and graph nodes, nothing of
products.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ._torch_private import node_attribute, node_names, node_shape, source_of

__all__ = ["Alignment", "aligned_axes", "keeps_elements_apart"]

# For each axis of a value the axis of the input that it runs along with; FREE: may depend on any index there.
Alignment = tuple[int, ...]
FREE = -1

_Shape = Sequence[int]
# node, (alignment, shape) of each input that depends (None for the others), shape of the output -> alignment
_Rule = Callable[[Any, "list[tuple[Alignment, _Shape] | None]", _Shape], Alignment]

_log = logging.getLogger("torchzygote")

_MOST_NODES = 2000
_NAME = re.compile(r"(.+)Backward\d+$")  # a custom function's node has no number

_ELEMENTWISE = """
    Abs Acos Add Addcdiv Addcmul Alias Asin Atan Atan2 Clamp ClampMax ClampMin Clone Cos Cosh Div Elu
    EluBackward Erf Erfc Exp Exp2 Expand Expm1 Gelu GeluBackward Hardtanh HardtanhBackward LeakyRelu
    LeakyReluBackward Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid LogSigmoidBackward Logaddexp
    MaskedFill Maximum Minimum Mul NativeDropout Neg Pow Reciprocal Relu Rsqrt Rsub Sigmoid
    SigmoidBackward Sign Silu SiluBackward Sin Sinc Sinh Softplus SoftplusBackward Sqrt Sub Tan Tanh
    TanhBackward Threshold ThresholdBackward ToCopy Where Xlogy
""".split()  # noqa: SIM905 (a list of names would take sixty lines)


def _meet(alignments: list[Alignment]) -> Alignment:
    """What holds for a value that depends on all of these."""
    first, *others = alignments
    if all(other == first for other in others):
        return first
    return tuple(a if all(o[i] == a for o in others) else FREE for i, a in enumerate(first))


def _broadcast(alignment: Alignment, shape: _Shape, out: _Shape) -> Alignment:
    """Axes are matched from the right; an axis that is repeated runs along with nothing."""
    if shape == out:
        return alignment
    missing = len(out) - len(shape)
    kept = (a if n == m else FREE for a, n, m in zip(alignment, shape, out[missing:], strict=True))
    return (FREE,) * missing + tuple(kept)


def _elementwise(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    return _meet([_broadcast(*given, out) for given in inputs if given is not None])


def _axis(dim: int, rank: int) -> int:
    """A saved ``dim``, which PyTorch keeps as an unsigned number."""
    dim = int(dim)
    dim = dim - (1 << 64) if dim >= 1 << 63 else dim
    return dim % rank if rank else 0


def _axes(node: Any, name: str, rank: int) -> set[int]:
    dims = node_attribute(node, name)
    if dims is None or (isinstance(dims, (tuple, list)) and not dims):
        return set(range(rank))
    return {_axis(dim, rank) for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}


def _only(inputs: list[tuple[Alignment, _Shape] | None]) -> tuple[Alignment, _Shape]:
    (given,) = (given for given in inputs if given is not None)
    return given


def _all_free(node: Any, inputs: Any, out: _Shape) -> Alignment:
    return (FREE,) * len(out)


def _reduce(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    alignment, shape = _only(inputs)
    gone = _axes(node, "_saved_dim", len(shape))
    if len(out) == len(shape):
        return tuple(FREE if i in gone else a for i, a in enumerate(alignment))
    return tuple(a for i, a in enumerate(alignment) if i not in gone)


def _mixes_dim(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    """Softmax, cumulative sums, concatenation: one axis is mixed, the others stay."""
    mixed = _axes(node, "_saved_dim", len(out))
    given = [alignment for alignment, _ in filter(None, inputs)]
    if any(len(alignment) != len(out) for alignment in given):
        return (FREE,) * len(out)  # cat skips empty vectors, whatever the rank of the others
    met = _meet(given)
    return tuple(FREE if i in mixed else a for i, a in enumerate(met))


def _keeps_whole_axes(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    """A slice, or what pads one with zeros: an axis that it shortens or lengthens is shifted."""
    alignment, shape = _only(inputs)
    return tuple(a if n == m else FREE for a, n, m in zip(alignment, shape, out, strict=True))


def _drops_axis(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    alignment, shape = _only(inputs)
    gone = _axes(node, "_saved_dim", len(shape))
    return tuple(a for i, a in enumerate(alignment) if i not in gone)


def _inserts_axis(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    at = _axis(node_attribute(node, "_saved_dim"), len(out))
    given = [alignment for alignment, _ in filter(None, inputs)]
    return _meet([alignment[:at] + (FREE,) + alignment[at:] for alignment in given])


def _squeezes(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    alignment, shape = _only(inputs)
    if len(out) == len(shape):  # ``dim=()`` too, which means no axis here, and all of them elsewhere
        return alignment
    asked = _axes(node, "_saved_dim", len(shape))
    return tuple(a for i, a in enumerate(alignment) if not (i in asked and shape[i] == 1))


def _transposes(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    alignment, _ = _only(inputs)
    if not out:  # a number has no axes, though ``transpose(0, 0)`` takes one
        return alignment
    swapped = list(alignment)
    a, b = (_axis(node_attribute(node, name), len(out)) for name in ("_saved_dim0", "_saved_dim1"))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)


def _permutes(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    alignment, _ = _only(inputs)
    return tuple(alignment[_axis(dim, len(out))] for dim in node_attribute(node, "_saved_dims"))


def _views(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    """Leading axes of equal sizes stay, and so do trailing ones; what is between is folded anew."""
    alignment, shape = _only(inputs)
    kept = [FREE] * len(out)
    front = 0
    while front < min(len(out), len(shape)) and out[front] == shape[front]:
        kept[front] = alignment[front]
        front += 1
    back = 0
    while back < min(len(out), len(shape)) - front and out[-1 - back] == shape[-1 - back]:
        kept[-1 - back] = alignment[-1 - back]
        back += 1
    return tuple(kept)


def _product(left: int, right: int) -> _Rule:
    """A matrix product: which inputs are its factors; one more input is added elementwise."""

    def rule(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
        parts: list[Alignment] = []
        for position, given in enumerate(inputs):
            if given is None:
                continue
            alignment, shape = given
            if position == left:
                parts.append(alignment[: len(shape) - 1] + (FREE,) * (len(out) - len(shape) + 1))
            elif position == right:
                batch = alignment[: len(shape) - 2] if len(shape) > 2 else ()
                column = alignment[-1:] if len(shape) > 1 else ()
                parts.append(batch + (FREE,) * (len(out) - len(batch) - len(column)) + column)
            else:
                parts.append(_broadcast(alignment, shape, out))
        return _meet(parts)

    return rule


def _normalizes(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    """Layer norm mixes the last axes; its weights broadcast along them."""
    mixed = len(node_attribute(node, "_saved_normalized_shape"))
    met = _meet([_broadcast(*given, out) for given in inputs if given is not None])
    return met[: len(out) - mixed] + (FREE,) * mixed


def _convolves(node: Any, inputs: list[tuple[Alignment, _Shape] | None], out: _Shape) -> Alignment:
    """The batch axis of the input stays; what the weights depend on reaches everything."""
    image, *weights = inputs
    if image is None or any(weights) or len(image[1]) != len(out):
        return (FREE,) * len(out)
    return image[0][:1] + (FREE,) * (len(out) - 1)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(
        ["Sum", "Mean", "Amax", "Amin", "Logsumexp", "Prod", "Norm", "LinalgVectorNorm"], _reduce
    ),
    **dict.fromkeys(
        ["Softmax", "LogSoftmax", "SoftmaxBackwardData", "LogSoftmaxBackwardData", "Cumsum", "Cat"],
        _mixes_dim,
    ),
    **dict.fromkeys(["Slice", "SliceBackward", "Split", "SplitWithSizes"], _keeps_whole_axes),
    **dict.fromkeys(["Select", "Unbind"], _drops_axis),
    **dict.fromkeys(["Unsqueeze", "Stack", "SelectBackward"], _inserts_axis),
    "Squeeze": _squeezes,
    "Transpose": _transposes,
    "Permute": _permutes,
    **dict.fromkeys(["View", "UnsafeView", "ReshapeAlias"], _views),
    "T": lambda node, inputs, out: _only(inputs)[0][::-1],
    "Mm": _product(0, 1),
    "Bmm": _product(0, 1),
    "Mv": _product(0, 1),
    "Addmm": _product(1, 2),
    "Convolution": _convolves,
    "NativeLayerNorm": _normalizes,
}


# They move elements, each to a place or two.
_MOVES = """
    AsStrided Cat ConstantPadNd Flip Gather Index IndexSelect Permute ReshapeAlias Roll Scatter Select
    SelectBackward Slice SliceBackward Split SplitWithSizes Squeeze Stack T Transpose Unbind UnsafeView
    Unsqueeze View
""".split()  # noqa: SIM905
_APART = frozenset([*_ELEMENTWISE, *_MOVES]) - {"Expand"}


@functools.cache
def _keeps_apart(name: str) -> bool:
    found = _NAME.match(name)
    return found[1] in _APART if found else name == "torch::autograd::AccumulateGrad"


def keeps_elements_apart(roots: Sequence[Tensor]) -> bool:
    """Whether every recorded operation works element by element or moves elements; none sums or mixes."""
    return bool(roots) and all(_keeps_apart(name) for root in roots for name in node_names(root))


# Rules are about the first output of a node; of these operations all outputs are alike.
_PARTS = frozenset({"Split", "SplitWithSizes", "Unbind"})


@functools.cache
def _rule(name: str, first: bool) -> _Rule:
    """The rule for the first output of a node of this name, or for its others."""
    found = _NAME.match(name)
    if found is None or not (first or found[1] in _PARTS):
        return _all_free
    return _RULES.get(found[1], _all_free)


class _Walk:
    """Alignments of the recorded values with the axes of some inputs, each value looked at once.

    A value is an output of a node, as in ``node.next_functions``.
    """

    def __init__(self, sources: Sequence[Tensor], axes: Sequence[Alignment]) -> None:
        self._known: dict[tuple[Any, int], tuple[Alignment, _Shape] | None] = {
            source_of(x): (a, tuple(x.shape)) for x, a in zip(sources, axes, strict=True)
        }

    def of(self, root: Tensor) -> Alignment | None:
        """``None`` where ``root`` depends on none of the inputs, or nothing can be said."""
        if root.grad_fn is None:
            return None
        known, value = self._known, (root.grad_fn, root.output_nr)
        # Reading what a node comes from builds a tuple of new objects, so that it is done once.
        stack: list[tuple[tuple[Any, int], Any]] = [(value, None)]
        while stack:
            current, before = stack.pop()
            if current in known:
                continue
            if before is None:
                before = current[0].next_functions
                missing = [(v, None) for v in before if v[0] is not None and v not in known]
                if missing:
                    stack.append((current, before))
                    stack.extend(missing)
                    continue
            known[current] = self._of_output(*current, before)
            if len(known) > _MOST_NODES:
                return None
        found = known[value]
        return None if found is None or len(found[0]) != root.dim() else found[0]

    def _of_output(self, node: Any, number: int, before: Any) -> tuple[Alignment, _Shape] | None:
        inputs = [self._known.get(value) for value in before]  # a constant input has no node
        if not any(inputs):
            return None
        name, out = node.name(), node_shape(node, number)
        if out is None:
            return None
        try:
            found = _rule(name, number == 0)(node, inputs, out)
            if len(found) == len(out):
                return found, out
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
    found = _Walk([x], [tuple(range(x.dim()))]).of(root)
    if found is None:
        return None
    return [
        (p, q) for p, q in enumerate(found) if q != FREE and x.shape[q] > 1 and root.shape[p] == x.shape[q]
    ]


def shared_axes(roots: Sequence[Tensor], inputs: Sequence[Tensor], common: int) -> list[int]:
    """Which of the first ``common`` axes, alike in all shapes, run from every input to every root unmixed."""
    walk = _Walk(inputs, [(*range(common), *[FREE] * (x.dim() - common)) for x in inputs])
    found = [walk.of(root) for root in roots]
    return [
        p for p in range(common) if inputs[0].shape[p] > 1 and all(a is not None and a[p] == p for a in found)
    ]
