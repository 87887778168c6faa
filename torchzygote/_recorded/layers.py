"""What weights do in layers other than affine maps, sample by sample: scales, norms, convolutions, lookups.

Rows by the output of such an operation are pulled back to the weights here, for each sample by itself; what
autograd pulls back is the sum over samples. Knows single operations and shapes; it must not know what becomes
of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch_private import axis_of, node_attribute, node_name, node_shape, node_type, saved_by, signed
from .moves import Value, Way, kind_of_node
from .windows import rows_by_windows

__all__ = ["Layer", "Lookup", "layer", "lost_digits"]

# Rows by z, of shape (rows, *z's), and axes of z: for each index along these the rows by the piece,
# (blocks, rows, *the piece's). The last says whether they are going to be differentiated.
Pull = Callable[[Tensor, Sequence[int], bool], Tensor]


class Layer(NamedTuple):
    """A piece of an input in one place of an operation that gives ``z``.

    ``own``: axes of ``z`` that run along with axes of the piece, and can't tell samples apart.
    """

    z: Value
    own: frozenset[int]
    pulled: Pull
    way: Way


class Lookup(NamedTuple):
    """A layer that does nothing but take rows of a table: where samples aren't told apart, a move."""

    layer: Layer
    onward: Way


class _LayerOperand(NamedTuple):
    """Where a piece of an input goes in."""

    node: Any
    position: int
    shape: tuple[int, ...]
    out: tuple[int, ...]
    dtype: torch.dtype  # the piece's

    def saved(self, name: str, keep: bool) -> Tensor:
        """A tensor that the operation has saved."""
        found: Tensor = saved_by(self.node, name)
        return found if keep else found.detach()

    def operand(self, name: str, keep: bool) -> Tensor | float | None:
        """Such a tensor, or a number; ``None`` where there is none."""
        found = node_attribute(self.node, name)
        if isinstance(found, Tensor):
            return found if keep else found.detach()
        return float(found) if isinstance(found, (int, float)) else None


def layer(node: Any, position: int, way: Way, dtype: torch.dtype) -> Layer | Lookup | None:
    """What a piece of this dtype does in this place; ``None`` where no rule knows it."""
    kind, out = kind_of_node(node_name(node)), node_shape(node, 0)
    rule = _RULES.get(kind)
    if rule is None or out is None or 0 in (math.prod(out), math.prod(way.shape)):
        return None
    if dtype.is_complex or not _takes(kind, dtype, node_type(node, 0)[0]):
        return None
    try:
        found = rule(_LayerOperand(node, position, way.shape, out, dtype))
    except RuntimeError:  # what it saved was changed or freed
        return None
    if found is None:
        return None
    own, pulled = found
    entered = Layer((node, 0), frozenset(own), pulled, way)
    if kind in _LOOKUPS:
        index, padding = _LOOKUPS[kind](node)
        return Lookup(entered, _taken(node, way, index, padding))
    return entered


def _takes(kind: str, dtype: torch.dtype, out: torch.dtype) -> bool:
    """Whether it works in one dtype; norms have weights in float32 beside values in half precision."""
    if out == dtype:
        return True
    return kind in _NORMS and dtype == torch.float32 and out in (torch.float16, torch.bfloat16)


def _by_sample(given: Tensor, axes: Sequence[int], own: Sequence[int], shape: Sequence[int]) -> Tensor:
    """From (rows, *z's) to (blocks, rows, *shape): summed over all axes of z but these and its own."""
    rank = given.dim() - 1
    gone = [1 + axis for axis in range(rank) if axis not in axes and axis not in own]
    sizes = [given.shape[1 + axis] for axis in axes]
    if gone:
        given = given.sum(gone)
    left = {axis: 1 + i for i, axis in enumerate(a for a in range(rank) if a in axes or a in own)}
    given = given.permute(*[left[axis] for axis in axes], 0, *[left[axis] for axis in own])
    return given.reshape(math.prod(sizes), given.shape[len(axes)], *shape)


# ---------------------------------------------------------------------------------------------------------
# Element by element: a local derivative, and a sum over what the piece was repeated along.

_Rule = Callable[[_LayerOperand], "tuple[Sequence[int], Pull] | None"]
_Factor = Callable[[_LayerOperand, bool], "Tensor | float | None"]


def _broadcast(factor: _Factor) -> _Rule:
    """The piece is repeated as PyTorch broadcasts; ``factor``: the derivative of z by it, if it is known."""

    def rule(place: _LayerOperand) -> tuple[Sequence[int], Pull] | None:
        missing = len(place.out) - len(place.shape)
        own = [missing + axis for axis, size in enumerate(place.shape) if size > 1]
        if factor(place, False) is None:
            return None
        return own, _scaled(place, own, factor)

    return rule


def _repeated(place: _LayerOperand) -> tuple[Sequence[int], Pull] | None:
    missing = len(place.out) - len(place.shape)
    times = node_attribute(place.node, "_saved_repeats")
    if any(n != 1 for n, size in zip(times[missing:], place.shape, strict=True) if size > 1):
        return None
    return _broadcast(_one)(place)


def _scaled(place: _LayerOperand, own: Sequence[int], factor: _Factor) -> Pull:
    def pulled(given: Tensor, axes: Sequence[int], keep: bool) -> Tensor:
        given, by = given.to(place.dtype), factor(place, keep)
        if by is not None and not (isinstance(by, float) and by == 1.0):
            given = given * by
        return _by_sample(given, axes, own, place.shape)

    return pulled


def _one(place: _LayerOperand, keep: bool) -> float:
    return 1.0


def _added(place: _LayerOperand, keep: bool) -> float | None:
    scale = 1 if place.position == 0 else node_attribute(place.node, "_saved_alpha")
    return float(scale) if isinstance(scale, (int, float)) else None


def _subtracted(place: _LayerOperand, keep: bool) -> float | None:
    scale = _added(place, keep)
    return scale if scale is None or place.position == 0 else -scale


def _multiplied(place: _LayerOperand, keep: bool) -> Tensor | float | None:
    return place.operand("_saved_other" if place.position == 0 else "_saved_self", keep)


def _divided(place: _LayerOperand, keep: bool) -> Tensor | float | None:
    below = place.operand("_saved_other", keep)
    if below is None or node_attribute(place.node, "_saved_rounding_mode") is not None:
        return None
    return 1 / below if place.position == 0 else -place.saved("_saved_self", keep) / (below * below)


def _slope(place: _LayerOperand, keep: bool) -> Tensor | None:
    if place.position != 1:
        return None
    x = place.saved("_saved_self", keep)
    return x.clamp(max=0)


# ---------------------------------------------------------------------------------------------------------
# Norms: the weight scales what the norm gives without it.


def _norm_of_layers(place: _LayerOperand) -> tuple[Sequence[int], Pull] | None:
    last = range(len(place.out) - len(place.shape), len(place.out))
    return _norm(place, list(last), _layer_normalized)


def _norm_of_channels(standardized: Callable[[_LayerOperand, bool], Tensor]) -> _Rule:
    return lambda place: _norm(place, [1], standardized)


def _norm_of_batches(place: _LayerOperand) -> tuple[Sequence[int], Pull] | None:
    training = node_attribute(place.node, "_saved_training")
    return _norm(place, [1], _by_given_statistics) if training is False else None


def _norm(
    place: _LayerOperand, own: Sequence[int], standardized: Callable[[_LayerOperand, bool], Tensor]
) -> tuple[Sequence[int], Pull] | None:
    if place.position == 0:
        return None
    if place.position == 1:
        place.saved("_saved_input", False)  # raises where it has been changed
        return own, _scaled(place, own, standardized)
    return own, _scaled(place, own, _one)


def _statistics(node: Any) -> tuple[Tensor, Tensor]:
    """Mean and one over the deviation, as a norm has saved them."""
    return saved_by(node, "_saved_result1").detach(), saved_by(node, "_saved_result2").detach()


def _layer_normalized(place: _LayerOperand, keep: bool) -> Tensor:
    x = place.saved("_saved_input", keep)
    mean, scale = _statistics(place.node)
    if keep:  # how they depend on x isn't recorded
        dims = tuple(range(x.dim() - len(place.shape), x.dim()))
        spread, of_x = torch.var_mean(x.to(mean.dtype), dims, correction=0, keepdim=True)
        mean, scale = of_x, (spread + (scale**-2 - spread.detach())).rsqrt()
    found: Tensor = ((x - mean) * scale).to(place.dtype)
    return found


def _group_normalized(place: _LayerOperand, keep: bool) -> Tensor:
    x = place.saved("_saved_input", keep)
    mean, scale = (one.unsqueeze(-1) for one in _statistics(place.node))
    grouped = x.reshape(*mean.shape[:2], -1)
    if keep:
        spread, mean = torch.var_mean(grouped.to(mean.dtype), 2, correction=0, keepdim=True)
        scale = (spread + (scale**-2 - spread.detach())).rsqrt()
    found: Tensor = ((grouped - mean) * scale).to(place.dtype).view(x.shape)
    return found


def _by_given_statistics(place: _LayerOperand, keep: bool) -> Tensor:
    x = place.saved("_saved_input", keep)
    mean, spread = (
        place.saved(name, keep).view(-1, *[1] * (x.dim() - 2))
        for name in ("_saved_running_mean", "_saved_running_var")
    )
    scale = (spread + node_attribute(place.node, "_saved_eps")).rsqrt()
    found: Tensor = ((x - mean) * scale).to(place.dtype)
    return found


def lost_digits(one: Layer) -> float:
    """How many times larger than one the numbers are that a norm subtracts; 0 but for its weights."""
    node, kind = one.z[0], kind_of_node(node_name(one.z[0]))
    if kind not in ("NativeLayerNorm", "NativeGroupNorm") or node.next_functions[1] != one.way.value:
        return 0.0
    mean, scale = _statistics(node)
    return float((mean.abs() * scale).amax())


# ---------------------------------------------------------------------------------------------------------
# Convolutions: a matrix product of the windows for each sample.


def _convolution(place: _LayerOperand) -> tuple[Sequence[int], Pull] | None:
    if place.position == 0:
        return None
    others = range(1, len(place.out))  # windows overlap, so that places are no samples
    if place.position == 2:
        return others, _scaled(place, [1], _one)
    place.saved("_saved_input", False)  # raises where it has been changed
    return others, lambda given, axes, keep: rows_by_windows(
        place.node, place.saved("_saved_input", keep), given, place.shape
    )


# ---------------------------------------------------------------------------------------------------------
# Lookups: rows of a table go to where they were taken from.


def _embedding(node: Any) -> tuple[Tensor, int | None]:
    padding = signed(node_attribute(node, "_saved_padding_idx"))
    return saved_by(node, "_saved_indices").detach(), padding if padding >= 0 else None


def _indexed(node: Any) -> tuple[Tensor, int | None]:
    return saved_by(node, "_saved_indices")[0].detach(), None


def _selected(node: Any) -> tuple[Tensor, int | None]:
    return saved_by(node, "_saved_index").detach().reshape(-1), None


_LOOKUPS: dict[str, Callable[[Any], tuple[Tensor, int | None]]] = {
    "Embedding": _embedding,
    "Index": _indexed,
    "IndexSelect": _selected,
}


def _lookup(place: _LayerOperand) -> tuple[Sequence[int], Pull] | None:
    node, kind = place.node, kind_of_node(node_name(place.node))
    if node_attribute(node, "_saved_sparse") or node_attribute(node, "_saved_scale_grad_by_freq"):
        return None
    if kind == "IndexSelect" and axis_of(node_attribute(node, "_saved_dim"), len(place.shape)) != 0:
        return None
    if kind == "Index":
        indices = saved_by(node, "_saved_indices")
        if len(indices) != 1 or indices[0].dtype != torch.int64:
            return None
    index, padding = _LOOKUPS[kind](node)
    if (*index.shape, *place.shape[1:]) != place.out:
        return None
    own = range(index.dim(), len(place.out))
    return own, lambda given, axes, keep: _put_back(place, index, padding, given, axes)


def _put_back(
    place: _LayerOperand, index: Tensor, padding: int | None, given: Tensor, axes: Sequence[int]
) -> Tensor:
    """Rows by a table, from rows by what was taken out of it."""
    free = [axis for axis in range(index.dim()) if axis not in axes]
    rest = range(1 + index.dim(), given.dim())
    rows = given.shape[0]
    given = given.permute(*[1 + a for a in axes], 0, *[1 + a for a in free], *rest)
    blocks = math.prod(given.shape[: len(axes)])
    index = index.permute(*axes, *free).reshape(blocks, 1, -1).expand(-1, rows, -1)
    given = given.reshape(blocks, rows, index.shape[2], *place.shape[1:])
    return _scattered(given.flatten(0, 1), index.reshape(blocks * rows, -1), padding, place.shape[0]).view(
        blocks, rows, *place.shape
    )


def _scattered(given: Tensor, index: Tensor, padding: int | None, size: int) -> Tensor:
    """``given[i, k]`` is added to row ``index[i, k]`` of the ``i``-th of zero tables with ``size`` rows."""
    tables, length = index.shape
    places = index % size + size * torch.arange(tables, device=index.device).unsqueeze(1)
    found = given.new_zeros(tables * size, *given.shape[2:])
    found = found.index_add_(0, places.reshape(-1), given.reshape(tables * length, *given.shape[2:]))
    found = found.view(tables, size, *given.shape[2:])
    if padding is not None:
        found[:, padding] = 0
    return found


def _taken(node: Any, way: Way, index: Tensor, padding: int | None) -> Way:
    """What is looked up as a piece of its own."""
    shape = way.shape

    def back(given: Tensor) -> Tensor:
        lead = given.shape[: given.dim() - index.dim() - len(shape) + 1]
        given = given.reshape(math.prod(lead), index.numel(), *shape[1:])
        every = index.reshape(1, -1).expand(len(given), -1)
        return _scattered(given, every, padding, shape[0]).view(*lead, *shape)

    return way.on((node, 0), (*index.shape, *shape[1:]), lambda given: given[index], back)


_NORMS = ("NativeLayerNorm", "NativeGroupNorm", "NativeBatchNorm")
_RULES: dict[str, _Rule] = {
    "Add": _broadcast(_added),
    "Sub": _broadcast(_subtracted),
    "Mul": _broadcast(_multiplied),
    "Div": _broadcast(_divided),
    "Expand": _broadcast(_one),
    "Repeat": _repeated,
    "PreluKernel": _broadcast(_slope),
    "NativeLayerNorm": _norm_of_layers,
    "NativeGroupNorm": _norm_of_channels(_group_normalized),
    "NativeBatchNorm": _norm_of_batches,
    "Convolution": _convolution,
    **dict.fromkeys(_LOOKUPS, _lookup),
}
