"""How axes run through one recorded operation: the rules that ``alignment`` walks along the graph with.

A rule may say too little (FREE), never too much; what has no rule mixes everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .._torch_private import axis_of, node_attribute

__all__ = ["ELEMENTWISE", "FREE", "REDUCTIONS", "RULES", "Alignment", "Rule", "Shape", "all_free", "meeting"]

# For each axis of a value the axis of the input that it runs along with; FREE: may depend on any index there.
# An axis that several ones were folded into has these and their sizes, the slowest first.
Alignment = tuple["int | Folded", ...]
Folded = tuple[tuple[int, int], ...]
FREE = -1

Shape = Sequence[int]
# node, (alignment, shape) of each input that depends (None for the others), shape of the output -> alignment
Rule = Callable[[Any, "list[tuple[Alignment, Shape] | None]", Shape], Alignment]

ELEMENTWISE = """
    Abs Acos Add Addcdiv Addcmul Alias Asin Atan Atan2 BinaryCrossEntropy BinaryCrossEntropyBackward
    BinaryCrossEntropyWithLogits Celu Clamp ClampMax ClampMin Clone Cos Cosh Div Elu EluBackward Erf Erfc
    Erfinv Exp Exp2 Expand Expm1 Gelu GeluBackward Hardshrink HardshrinkBackward Hardsigmoid Hardswish
    HardswishBackward Hardtanh HardtanhBackward HuberLoss HuberLossBackward Hypot LeakyRelu
    LeakyReluBackward Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid LogSigmoidBackward Logaddexp Logaddexp2
    Logit MaskedFill Maximum Minimum Mish MseLoss MseLossBackward Mul NanToNum NativeDropout Neg Pow
    PreluKernel PreluKernelBackward Reciprocal Relu RreluWithNoise RreluWithNoiseBackward Rsqrt Rsub Sgn
    Sigmoid SigmoidBackward Sign Silu SiluBackward Sin Sinc Sinh SmoothL1Loss SmoothL1LossBackward
    SoftMarginLoss SoftMarginLossBackward Softplus SoftplusBackward Softshrink SoftshrinkBackward Sqrt Sub
    Tan Tanh TanhBackward Threshold ThresholdBackward ToCopy Tril Triu Where Xlogy
""".split()  # noqa: SIM905 (a list of names would take eighty lines)


def meeting(alignments: list[Alignment]) -> Alignment:
    """What holds for a value that depends on all of these."""
    first, *others = alignments
    if all(other == first for other in others):
        return first
    return tuple(a if all(o[i] == a for o in others) else FREE for i, a in enumerate(first))


def _broadcast(alignment: Alignment, shape: Shape, out: Shape) -> Alignment:
    """Axes are matched from the right; an axis that is repeated runs along with nothing."""
    if shape == out:
        return alignment
    missing = len(out) - len(shape)
    kept = (a if n == m else FREE for a, n, m in zip(alignment, shape, out[missing:], strict=True))
    return (FREE,) * missing + tuple(kept)


def _elementwise(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    return meeting([_broadcast(*given, out) for given in inputs if given is not None])


def _axes(node: Any, name: str, rank: int) -> set[int]:
    dims = node_attribute(node, name)
    if dims is None or (isinstance(dims, (tuple, list)) and not dims):
        return set(range(rank))
    return {axis_of(dim, rank) for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}


def _only(inputs: list[tuple[Alignment, Shape] | None]) -> tuple[Alignment, Shape]:
    (given,) = (given for given in inputs if given is not None)
    return given


def all_free(node: Any, inputs: Any, out: Shape) -> Alignment:
    return (FREE,) * len(out)


def _reduce(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    alignment, shape = _only(inputs)
    gone = _axes(node, "_saved_dim", len(shape))
    if len(out) == len(shape):
        return tuple(FREE if i in gone else a for i, a in enumerate(alignment))
    return tuple(a for i, a in enumerate(alignment) if i not in gone)


def _mixes_dim(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """Softmax, cumulative sums, concatenation: one axis is mixed, the others stay."""
    mixed = _axes(node, "_saved_dim", len(out))
    given = [alignment for alignment, _ in filter(None, inputs)]
    if any(len(alignment) != len(out) for alignment in given):
        return (FREE,) * len(out)  # cat skips empty vectors, whatever the rank of the others
    met = meeting(given)
    return tuple(FREE if i in mixed else a for i, a in enumerate(met))


def _keeps_whole_axes(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """A slice, or what pads one with zeros: an axis that it shortens or lengthens is shifted."""
    alignment, shape = _only(inputs)
    return tuple(a if n == m else FREE for a, n, m in zip(alignment, shape, out, strict=True))


def _mixes_dims(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """What moves elements along some axes, from sources of the same rank."""
    name = "_saved_dim" if node_attribute(node, "_saved_dim") is not None else "_saved_dims"
    mixed = _axes(node, name, len(out))
    given = [_broadcast(*one, out) for one in inputs if one is not None]
    return tuple(FREE if i in mixed else a for i, a in enumerate(meeting(given)))


def _indexes(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """One index array (or mask) has its axes in place of one axis; several aren't followed."""
    axis, rank = _index_of(node)
    kept = _only(inputs)[0]
    return kept[:axis] + (FREE,) * rank + kept[axis + 1 :] if rank else (FREE,) * len(out)


def _puts(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """The pullback of the same: values go to places along one axis of what is there."""
    (axis, rank), (there, values) = _index_of(node), inputs
    parts = [] if there is None else [there[0][:axis] + (FREE,) + there[0][axis + 1 :]]
    if values is not None:
        parts.append(values[0][:axis] + (FREE,) + values[0][axis + rank :])
    return meeting(parts) if rank else (FREE,) * len(out)


def _index_of(node: Any) -> tuple[int, int]:
    """The axis that the only index array is for, and how many axes that has; 0 where there are several."""
    arrays = [(i, a) for i, a in enumerate(node_attribute(node, "_saved_indices")) if a is not None]
    ((axis, array), *others) = arrays
    is_mask = array.dtype in (torch.bool, torch.uint8)
    return axis, 0 if others or (is_mask and array.dim() > 1) else array.dim()


def _drops_axis(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    alignment, shape = _only(inputs)
    gone = _axes(node, "_saved_dim", len(shape))
    return tuple(a for i, a in enumerate(alignment) if i not in gone)


def _takes_diagonal(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """Two axes become one, the last."""
    alignment, shape = _only(inputs)
    gone = {axis_of(node_attribute(node, name), len(shape)) for name in ("_saved_dim1", "_saved_dim2")}
    return (*(a for i, a in enumerate(alignment) if i not in gone), FREE)


def _inserts_axis(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    at = axis_of(node_attribute(node, "_saved_dim"), len(out))
    given = [alignment for alignment, _ in filter(None, inputs)]
    return meeting([alignment[:at] + (FREE,) + alignment[at:] for alignment in given])


def _squeezes(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    alignment, shape = _only(inputs)
    if len(out) == len(shape):  # ``dim=()`` too, which means no axis here, and all of them elsewhere
        return alignment
    asked = _axes(node, "_saved_dim", len(shape))
    return tuple(a for i, a in enumerate(alignment) if not (i in asked and shape[i] == 1))


def _transposes(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    alignment, _ = _only(inputs)
    if not out:  # a number has no axes, though ``transpose(0, 0)`` takes one
        return alignment
    swapped = list(alignment)
    a, b = (axis_of(node_attribute(node, name), len(out)) for name in ("_saved_dim0", "_saved_dim1"))
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)


def _permutes(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    alignment, _ = _only(inputs)
    return tuple(alignment[axis_of(dim, len(out))] for dim in node_attribute(node, "_saved_dims"))


def _views(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """Axes that are folded together keep their names, and have them back when they are unfolded."""
    alignment, shape = _only(inputs)
    found = _refolded(alignment, shape, out)
    return _outer_axes(alignment, shape, out) if found is None else found


def _refolded(alignment: Alignment, shape: Shape, out: Shape) -> Alignment | None:
    """``None`` where an axis of the input would be split, or there is nothing to fold."""
    if 0 in shape:
        return None
    atoms: list[tuple[int, int]] = []
    for axis, size in zip(alignment, shape, strict=True):
        if isinstance(axis, tuple):
            atoms.extend(axis)
        elif size > 1:
            atoms.append((axis, size))
    atoms.reverse()
    kept: list[int | Folded] = []
    for size in out:
        parts: list[tuple[int, int]] = []
        while size > 1:
            axis, length = atoms.pop()
            if axis == FREE and length % size == 0:
                atoms.append((FREE, length // size))
                length = size
            elif size % length != 0:
                return None
            size //= length
            if axis == FREE and parts and parts[-1][0] == FREE:
                length *= parts.pop()[1]
            parts.append((axis, length))
        while atoms and atoms[-1][1] == 1:
            atoms.pop()
        free = all(axis == FREE for axis, _ in parts)
        kept.append(FREE if free else parts[0][0] if len(parts) == 1 else tuple(parts))
    return tuple(kept)


def _outer_axes(alignment: Alignment, shape: Shape, out: Shape) -> Alignment:
    """Leading axes of equal sizes stay, and so do trailing ones; what is between is folded anew."""
    kept: list[int | Folded] = [FREE] * len(out)
    front = 0
    while front < min(len(out), len(shape)) and out[front] == shape[front]:
        kept[front] = alignment[front]
        front += 1
    back = 0
    while back < min(len(out), len(shape)) - front and out[-1 - back] == shape[-1 - back]:
        kept[-1 - back] = alignment[-1 - back]
        back += 1
    return tuple(kept)


def _product(left: int, right: int) -> Rule:
    """A matrix product: which inputs are its factors; one more input is added elementwise."""

    def rule(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
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
        return meeting(parts)

    return rule


def _normalizes(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """Layer norm mixes the last axes; its weights broadcast along them."""
    mixed = len(node_attribute(node, "_saved_normalized_shape"))
    met = meeting([_broadcast(*given, out) for given in inputs if given is not None])
    return met[: len(out) - mixed] + (FREE,) * mixed


def _normalizes_batches(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """With statistics of its own, a batch norm mixes all but the channels; with given ones, nothing."""
    training = node_attribute(node, "_saved_training")
    if training is None:
        training = node_attribute(node, "_saved_train")
    met = meeting(
        [
            given[0] if len(given[1]) == len(out) else (FREE, *given[0], *[FREE] * (len(out) - 2))
            for given in inputs
            if given is not None
        ]
    )
    return tuple(a if i == 1 or training is False else FREE for i, a in enumerate(met))


def _picks_classes(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """The backward of a negative log likelihood: what arrives is one number, or one for each sample."""
    arrived, scores = (*inputs, None)[:2]
    parts: list[Alignment] = []
    if arrived is not None:
        axes, shape = arrived
        parts.append(
            (*axes, *[FREE] * (len(out) - len(axes))) if len(shape) in (0, 1) else (FREE,) * len(out)
        )
    if scores is not None:
        parts.append(scores[0])
    met = meeting(parts)
    return met if len(out) == 1 else (met[0], FREE, *met[2:])


def _likelihood(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """A negative log likelihood for each sample: the axis of classes goes, the second one or the only one."""
    axes = _only(inputs)[0]
    return (axes[0], *axes[2:])[: len(out)]


def _attends(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """Fused attention: positions meet, the axes before them (batch, heads) stay."""
    queries, keys, values, *others = inputs
    lead = len(out) - 2
    given = [one for one in (queries, keys, values) if one is not None]
    if any(others) or any(tuple(shape[:lead]) != tuple(out[:lead]) for _, shape in given):
        return (FREE,) * len(out)  # a bias that depends; heads that share their keys
    return meeting([alignment[:lead] for alignment, _ in given]) + (FREE, FREE)


def _convolves(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """The batch axis of the input stays; what the weights depend on reaches everything."""
    image, *weights = inputs
    if image is None or any(weights) or len(image[1]) != len(out):
        return (FREE,) * len(out)
    return image[0][:1] + (FREE,) * (len(out) - 1)


def _normalizes_groups(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """Statistics are those of a sample; what the weights depend on reaches everything."""
    image, *weights = inputs
    if image is None or any(weights):
        return (FREE,) * len(out)
    return image[0][:1] + (FREE,) * (len(out) - 1)


def _repeats(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """Like an expanded axis, one that is repeated runs along with nothing."""
    return _broadcast(*_only(inputs), out)


def _pads(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
    """An axis that is padded is shifted, also where it is cut as much at its other end."""
    pad = node_attribute(node, "_saved_pad")
    padded = {len(out) - 1 - i // 2 for i, n in enumerate(pad) if n != 0}
    return tuple(FREE if i in padded else a for i, a in enumerate(_only(inputs)[0]))


def _mixes_space(rank: int) -> Rule:
    """Pooling, padding, resizing: the last axes are mixed."""

    def rule(node: Any, inputs: list[tuple[Alignment, Shape] | None], out: Shape) -> Alignment:
        return _only(inputs)[0][: len(out) - rank] + (FREE,) * rank

    return rule


REDUCTIONS = "Amax Amin LinalgVectorNorm Logsumexp Max Mean Min Norm Prod Std Sum Var".split()  # noqa: SIM905

_OF_LINES = ["ReflectionPad1D", "ReplicationPad1D", "UpsampleLinear1D", "UpsampleNearest1D"]
_OF_IMAGES = """
    AdaptiveAvgPool2D AdaptiveMaxPool2D AvgPool2D MaxPool2DWithIndices ReflectionPad2D ReplicationPad2D
    UpsampleBicubic2D UpsampleBilinear2D UpsampleNearest2D
""".split()  # noqa: SIM905
_OF_VOLUMES = """
    AdaptiveAvgPool3D AdaptiveMaxPool3D AvgPool3D MaxPool3DWithIndices ReflectionPad3D ReplicationPad3D
    UpsampleNearest3D UpsampleTrilinear3D
""".split()  # noqa: SIM905

RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(["Flip", "Gather", "IndexAdd", "Roll", "Scatter", "ScatterAdd"], _mixes_dims),
    "Index": _indexes,
    "IndexPutImpl": _puts,
    **dict.fromkeys(
        [
            "Softmax",
            "SafeSoftmax",
            "LogSoftmax",
            "SoftmaxBackwardData",
            "LogSoftmaxBackwardData",
            "Cumsum",
            "Cat",
            "Glu",
            "IndexSelect",
        ],
        _mixes_dim,
    ),
    **dict.fromkeys(["Slice", "SliceBackward", "Split", "SplitWithSizes"], _keeps_whole_axes),
    **dict.fromkeys(["Select", "Unbind"], _drops_axis),
    **dict.fromkeys(["Unsqueeze", "Stack", "SelectBackward"], _inserts_axis),
    "Diagonal": _takes_diagonal,
    "Squeeze": _squeezes,
    "Transpose": _transposes,
    "Permute": _permutes,
    **dict.fromkeys(["View", "UnsafeView", "ReshapeAlias"], _views),
    "T": lambda node, inputs, out: _only(inputs)[0][::-1],
    "Mm": _product(0, 1),
    "Bmm": _product(0, 1),
    "Mv": _product(0, 1),
    **dict.fromkeys(["Addmm", "Addmv", "Baddbmm"], _product(1, 2)),
    "Convolution": _convolves,
    **dict.fromkeys(["NativeLayerNorm", "NativeLayerNormBackward"], _normalizes),
    **dict.fromkeys(["NativeBatchNorm", "NativeBatchNormBackward"], _normalizes_batches),
    **dict.fromkeys([f"ScaledDotProduct{way}Attention" for way in ("Flash", "Efficient", "Cudnn")], _attends),
    "ScaledDotProductFlashAttentionForCpu": _attends,
    **dict.fromkeys(["NllLoss", "NllLoss2D"], _likelihood),
    "ConstantPadNd": _pads,
    "Repeat": _repeats,
    "NativeGroupNorm": _normalizes_groups,
    **dict.fromkeys(_OF_LINES, _mixes_space(1)),
    **dict.fromkeys(_OF_IMAGES, _mixes_space(2)),
    **dict.fromkeys(_OF_VOLUMES, _mixes_space(3)),
    "NllLossBackward": _picks_classes,
}
