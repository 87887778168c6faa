"""Operators that move elements around: the same operator, applied to the ids.

Views are not here: they need no rule, since ids lie in memory as the tensors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._sets import ID
from .._trace import Const
from ._table import CURVED, LINEAR, PRODUCT, RULES, Call, Context, Dep, Rule, rule, zero_ids

__all__: list[str] = []

aten: Any = torch.ops.aten

# By name: the arguments that say where elements go; the others are elements, or fill values (empty sets).
_MOVES = {
    "cat": "dim",
    "stack": "dim",
    "flip": "dims",
    "roll": "shifts dims",
    "rot90": "k dims",
    "repeat": "repeats",
    "tril": "diagonal",
    "triu": "diagonal",
    "diag_embed": "offset dim1 dim2",
    "diagonal_copy": "offset dim1 dim2",
    "expand_copy": "size implicit",
    "view_copy": "size",
    "permute_copy": "dims",
    "slice_copy": "dim start end step",
    "select_copy": "dim index",
    "unfold_copy": "dimension size step",
    "block_diag": "",
    "constant_pad_nd": "pad",
    "pixel_shuffle": "upscale_factor",
    "pixel_unshuffle": "downscale_factor",
    "channel_shuffle": "groups",
    "reflection_pad1d": "padding",
    "reflection_pad2d": "padding",
    "reflection_pad3d": "padding",
    "replication_pad1d": "padding",
    "replication_pad2d": "padding",
    "replication_pad3d": "padding",
    "im2col": "kernel_size dilation padding stride",
    "index": "indices",
    "_unsafe_index": "indices",
    "index_select": "dim index",
    "gather": "dim index sparse_grad",
    "take": "index",
    "masked_select": "mask",
    "slice_scatter": "dim start end step",
    "select_scatter": "dim index",
    "diagonal_scatter": "offset dim1 dim2",
    "slice_backward": "input_sizes dim start end step",
    "select_backward": "input_sizes dim index",
    "diagonal_backward": "input_sizes offset dim1 dim2",
    "embedding": "indices padding_idx scale_grad_by_freq sparse",
    "masked_scatter": "mask",
    "split_with_sizes_copy": "split_sizes dim",
    "unsafe_split": "split_size dim",
    "unbind_copy": "dim",
    "narrow_copy": "dim start length",
}


def _as_ids(ctx: Context, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_ids(ctx, part) for part in value]
    return ctx.ids(value) if isinstance(value, (Dep, Const)) else value


def _as_given(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_given(part) for part in value]
    return value.tensor.cpu() if isinstance(value, Const) else value


def _tensors(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, (Const, Dep)) else []


def moved(operator: Callable[..., Any], ids: dict[str, Any], given: dict[str, Any]) -> Any:
    """An operator on ids; as float64 where there is no kernel for integers (ids are far below 2**53)."""
    try:
        return operator(**ids, **given)
    except (RuntimeError, NotImplementedError):
        wide = {name: _wide(x) for name, x in ids.items()}
        return _narrow(operator(**wide, **given))


def _wide(x: Any) -> Any:
    if isinstance(x, list):
        return [_wide(part) for part in x]
    return x.double() if isinstance(x, Tensor) else x


def _narrow(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return [_narrow(part) for part in x]
    return x.to(ID)


def _move(ctx: Context, call: Call) -> Any:
    geometry = _MOVES[call.name].split()
    elements = {n: _as_ids(ctx, v) for n, v in call.args.items() if n not in geometry and _tensors(v)}
    given = {n: _as_given(v) for n, v in call.args.items() if n in geometry and v is not None}
    ctx.by_values(*_tensors([v for n, v in call.args.items() if n in geometry]))
    operator = getattr(aten, call.name)
    return moved(operator, elements, given)


for _name in _MOVES:
    RULES[_name] = Rule(_move, LINEAR)


@rule("_reshape_copy")
def _reshape(ctx: Context, call: Call) -> Any:
    return ctx.ids(call["self"]).reshape(call.shape)


def positions(shape: Any) -> Tensor:
    """The place of each element of a tensor, counted row by row."""
    return torch.arange(math.prod(shape), device="cpu").view(tuple(shape))


def _overwrite(ctx: Context, base: Tensor, where: Tensor, source: Tensor) -> Tensor:
    """``base`` with ``source`` written at ``where``; of sources for one place any may win."""
    flat = base.reshape(-1).clone()
    source = source.expand(where.shape).reshape(-1)
    where = where.reshape(-1).long()
    if torch.bincount(where, minlength=1).max() <= 1:
        flat[where] = source
        return flat.view(base.shape)
    flat[where] = 0
    return ctx.sets.accumulate(flat.view(base.shape), where, source)


def _added(ctx: Context, base: Tensor, where: Tensor, source: Tensor) -> Tensor:
    return ctx.sets.accumulate(base, where, source.expand(where.shape))


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def _index_put(ctx: Context, call: Call) -> Any:
    ctx.by_values(*_tensors(call["indices"]))
    base = ctx.ids(call["self"])
    where = aten.index(positions(base.shape), _as_given(call["indices"]))
    put = _added if call["accumulate"] else _overwrite
    return put(ctx, base, where, ctx.ids(call["values"]))


@rule("put")
def _put(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["index"])
    base = ctx.ids(call["self"])
    index = call["index"].tensor.cpu()
    where = torch.where(index < 0, index + base.numel(), index)
    put = _added if call["accumulate"] else _overwrite
    return put(ctx, base, where, ctx.ids(call["source"]))


@rule("scatter")
def _scatter(ctx: Context, call: Call) -> Any:
    if call.first("reduce") is not None:
        raise NotImplementedError("scatter with reduce")
    ctx.by_values(call["index"])
    base, source, where = _scattered(ctx, call)
    return _overwrite(ctx, base, where, source)


@rule("scatter_add")
def _scatter_add(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["index"])
    base, source, where = _scattered(ctx, call)
    return _added(ctx, base, where, source)


def _scattered(ctx: Context, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    base, index = ctx.ids(call["self"]), call["index"].tensor.cpu()
    source = ctx.ids(call.first("src", "value"))
    if source.dim() == index.dim():
        source = source[tuple(slice(n) for n in index.shape)]
    return base, source, torch.gather(_grown(base.shape, index, call["dim"]), call["dim"], index)


def _grown(shape: Any, index: Tensor, dim: int) -> Tensor:
    """Positions in a tensor of this shape, cut to the index outside ``dim``."""
    ndim = max(len(shape), 1)
    cut = tuple(slice(None) if d == dim % ndim else slice(n) for d, n in enumerate(index.shape))
    return positions(shape)[cut] if len(shape) else positions(shape)


@rule("index_add", "index_copy")
def _index_add(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["index"])
    base, source = ctx.ids(call["self"]), ctx.ids(call["source"])
    where = positions(base.shape).index_select(call["dim"], call["index"].tensor.cpu())
    put = _added if call.name == "index_add" else _overwrite
    return put(ctx, base, where, source.expand(where.shape))


@rule("index_fill")
def _index_fill(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["index"])
    base = ctx.ids(call["self"])
    where = positions(base.shape).index_select(call["dim"], call["index"].tensor.cpu())
    return _overwrite(ctx, base, where, ctx.ids(call["value"]))


@rule("scatter_reduce", "index_reduce", curvature="curved")
def _scatter_reduce(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["index"])
    if call.name == "scatter_reduce":
        base, source, where = _scattered(ctx, call)
    else:
        base, source = ctx.ids(call["self"]), ctx.ids(call["source"])
        where = positions(base.shape).index_select(call["dim"], call["index"].tensor.cpu())
    united = _added(ctx, base, where, source)
    if call["reduce"] == "prod":
        ctx.couple(united)
    return united


def _adjoint(name: str, geometry: str) -> None:
    """A backward formula that adds each element to where the forward operator took it from."""

    def handler(ctx: Context, call: Call) -> Any:
        given = {n: _as_given(call[n]) for n in geometry.split() if call.args.get(n) is not None}
        shape = call["self"].shape if isinstance(call.args.get("self"), Dep) else call.shape
        if isinstance(call.args.get("self"), Const):
            shape = call["self"].tensor.shape
        where = moved(getattr(aten, name.removesuffix("_backward")), {"self": positions(shape).to(ID)}, given)
        return _added(ctx, zero_ids(shape), where, ctx.ids(call["grad_output"]))

    RULES[name] = Rule(handler, LINEAR)


for _name in ("reflection_pad1d", "reflection_pad2d", "reflection_pad3d"):
    _adjoint(f"{_name}_backward", "padding")
for _name in ("replication_pad1d", "replication_pad2d", "replication_pad3d"):
    _adjoint(f"{_name}_backward", "padding")


@rule("col2im")
def _col2im(ctx: Context, call: Call) -> Any:
    names = ("kernel_size", "dilation", "padding", "stride")
    # Padding is marked by 0, so positions count from 1; the first element of the sum collects it.
    where = moved(
        aten.im2col, {"self": (positions(call.shape) + 1).to(ID)}, {name: call[name] for name in names}
    )
    longer = zero_ids((math.prod(call.shape) + 1,))
    return _added(ctx, longer, where, ctx.ids(call["self"]))[1:].view(call.shape)


@rule("unfold_backward")
def _unfold_backward(ctx: Context, call: Call) -> Any:
    where = positions(call["input_sizes"]).unfold(call["dim"], call["size"], call["step"])
    return _added(ctx, zero_ids(call["input_sizes"]), where, ctx.ids(call["grad_in"]))


@rule("embedding_dense_backward")
def _embedding_dense_backward(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["indices"])
    where = positions(call.shape)[call["indices"].tensor.cpu()]
    return _added(ctx, zero_ids(call.shape), where, ctx.ids(call["grad_output"]))


@rule("_embedding_bag", "_embedding_bag_forward_only", curvature=PRODUCT)
def _embedding_bag(ctx: Context, call: Call) -> Any:
    """The rows of each bag, all of them where the largest is taken, too. PyTorch derives it once."""
    ctx.by_values(call["indices"], call["offsets"])
    index, offsets = call["indices"].tensor.cpu().long(), call["offsets"].tensor.cpu().long()
    # The last bag goes on to the end, whatever the last offset says.
    bag = torch.searchsorted(offsets, torch.arange(index.numel(), device="cpu"), right=True) - 1
    where = positions(call.shape)[bag.clamp(max=call.shape[0] - 1)]
    rows, weights = ctx.ids(call["weight"])[index], call["per_sample_weights"]
    if isinstance(weights, Dep):
        factors = weights.ids.unsqueeze(1).expand(rows.shape)
        ctx.couple(rows, factors)
        rows = ctx.unite(rows, factors)
    counts = index != call["padding_idx"]
    out = _added(ctx, zero_ids(call.shape), where[counts], rows[counts])
    return [out, *([None] * (len(call.outs) - 1))]


@rule("segment_reduce", curvature=CURVED)
def _segment_reduce(ctx: Context, call: Call) -> Any:
    """All of each segment of the first axis, whatever is made of it. PyTorch derives it once."""
    lengths, offsets = call["lengths"], call["offsets"]
    given = lengths if offsets is None else offsets
    ctx.by_values(given)
    known = given.tensor.cpu().long()
    bounds = known if lengths is None else torch.cat([known.new_zeros(1), known.cumsum(0)])
    if known.dim() != 1 or bool((bounds.diff() < 0).any()) or (lengths is not None and offsets is not None):
        raise NotImplementedError("segments of further axes, or that overlap")
    rows = ctx.ids(call["data"])
    segment = torch.searchsorted(bounds, torch.arange(rows.shape[0], device="cpu"), right=True) - 1
    inside = (segment >= 0) & (segment < call.shape[0])
    out = _added(ctx, zero_ids(call.shape), positions(call.shape)[segment[inside]], rows[inside])
    if call["reduce"] == "prod":
        ctx.couple(out)
    return out


@rule("masked_scatter_backward")
def _masked_scatter_backward(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["mask"])
    grad = ctx.ids(call["grad_output"])
    taken = grad[call["mask"].tensor.cpu().expand(grad.shape)]
    found = torch.zeros(math.prod(call.shape), dtype=ID, device="cpu")
    found[: taken.numel()] = taken
    return found.view(call.shape)
