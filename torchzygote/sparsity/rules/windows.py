"""Operators that combine a window of each spatial dimension: convolution, pooling, interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._trace import Const
from ._table import PRODUCT, Call, Context, Dep, rule, zero_ids

__all__: list[str] = []

aten: Any = torch.ops.aten


def _table(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Which input each tap of each output reads, shape (out, kernel); -1 where that is padding."""
    reads = torch.arange(out)[:, None] * stride - padding + torch.arange(kernel)[None, :] * dilation
    return torch.where((reads >= 0) & (reads < size), reads, -1)


def _transposed_table(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """The same for a transposed convolution: what an input is spread over, read backwards."""
    reads = torch.arange(out)[:, None] + padding - torch.arange(kernel)[None, :] * dilation
    inside = (reads >= 0) & (reads % stride == 0) & (reads < size * stride)
    return torch.where(inside, torch.div(reads, stride, rounding_mode="floor"), -1)


def _taps(ids: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """For ids of shape (..., *sizes) those that each output reads: (..., *outs, all taps)."""
    depth = len(tables)
    sizes = ids.shape[ids.dim() - depth :]
    where = torch.zeros((1,) * (2 * depth), dtype=torch.int64)
    outside = torch.zeros((1,) * (2 * depth), dtype=torch.bool)
    for d, table in enumerate(tables):
        shape = [1] * (2 * depth)
        shape[d], shape[depth + d] = table.shape
        spread = table.view(shape)
        where = where * sizes[d] + spread.clamp(min=0)
        outside = outside | (spread < 0)
    outs = [table.shape[0] for table in tables]
    where = where.reshape(*outs, -1)
    outside = outside.expand(where_shape(tables)).reshape(*outs, -1)
    flat = ids.reshape(*ids.shape[: ids.dim() - depth], -1)
    return flat[..., where].masked_fill(outside, 0)


def where_shape(tables: Sequence[Tensor]) -> list[int]:
    """Outputs of all dimensions, then taps of all dimensions."""
    return [table.shape[0] for table in tables] + [table.shape[1] for table in tables]


def _united(ctx: Context, taps: Tensor) -> Tensor:
    return ctx.unite_dims(taps, [-1])


def _each(value: Any, depth: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * depth if len(values) == 1 else values


@rule("convolution", "_convolution", "convolution_overrideable", curvature=PRODUCT)
def _convolution(ctx: Context, call: Call) -> Any:
    source, weight, bias = call["input"], call["weight"], call.first("bias")
    depth = len(call.shape) - 2
    stride, padding, dilation = (_each(call[n], depth) for n in ("stride", "padding", "dilation"))
    groups, transposed = call["groups"], call["transposed"]
    ids = ctx.ids(source)
    size = _shape(weight)
    make = _transposed_table if transposed else _table
    tables = [
        make(ids.shape[2 + d], call.shape[2 + d], size[2 + d], stride[d], padding[d], dilation[d])
        for d in range(depth)
    ]
    out_channels = call.shape[1]
    each = out_channels // groups
    grouped = ids.reshape(ids.shape[0], groups, -1, *ids.shape[2:])
    there = _nonzero_taps(weight, groups, transposed)
    if isinstance(source, Dep) and there is not None:
        united = _by_weight(ctx, _taps(grouped, tables), there)
    else:
        channels = ctx.unite_dims(grouped, [2])
        per_group = (
            _united(ctx, _taps(channels, tables))
            if isinstance(source, Dep)
            else zero_ids((ids.shape[0], groups, *call.shape[2:]))
        )
        united = per_group.unsqueeze(2).expand(*per_group.shape[:2], each, *per_group.shape[2:])
    united = united.reshape(call.shape)
    if isinstance(weight, Dep):
        filters = _filters(ctx, weight.ids, groups, transposed).view(1, out_channels, *[1] * depth)
        if isinstance(source, Dep):
            ctx.couple(ctx.unite_dims(united, [0, *range(2, united.dim())]), filters.view(-1))
        united = ctx.unite(united, filters)
    if isinstance(bias, Dep):
        united = ctx.unite(united, bias.ids.view(1, out_channels, *[1] * depth))
    return united.expand(call.shape)


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Dep) else value.tensor.shape


def _filters(ctx: Context, ids: Tensor, groups: int, transposed: bool) -> Tensor:
    """All weights of each output channel."""
    if not transposed:
        return ctx.unite_dims(ids, range(1, ids.dim()))
    grouped = ids.reshape(groups, -1, *ids.shape[1:])
    return ctx.unite_dims(grouped, [1, *range(3, grouped.dim())]).reshape(-1)


def _nonzero_taps(weight: Any, groups: int, transposed: bool) -> Tensor | None:
    """Shape (groups, out channels of a group, in channels of a group, taps), if there are fixed zeros."""
    if not isinstance(weight, Const) or not weight.fixed:
        return None
    there = weight.tensor.detach().cpu() != 0
    if bool(there.all()):
        return None
    if transposed:  # (in channels, out channels of a group, taps)
        return there.reshape(groups, -1, there.shape[1], math.prod(there.shape[2:])).transpose(1, 2)
    return there.reshape(groups, -1, there.shape[1], math.prod(there.shape[2:]))


def _by_weight(ctx: Context, taps: Tensor, there: Tensor) -> Tensor:
    """Unions over the taps that a filter reads: (batch, groups, out channels of a group, *outs)."""
    groups, each = there.shape[:2]
    rows = []
    for g in range(groups):
        found = []
        for o in range(each):
            channel, tap = there[g, o].nonzero(as_tuple=True)
            chosen = taps[:, g].movedim(1, -2)[..., channel, tap]
            found.append(_united(ctx, chosen) if channel.numel() else zero_ids(chosen.shape[:-1]))
        rows.append(torch.stack(found, 1))
    return torch.stack(rows, 1)


@rule("convolution_backward", curvature=PRODUCT)
def _convolution_backward(ctx: Context, call: Call) -> Any:
    """The gradient by the input is a convolution transposed; by the weights, everything."""
    grad, source, weight = call["grad_output"], call["input"], call["weight"]
    united = ctx.everything(call)
    if isinstance(source, Dep) or isinstance(weight, Dep) or call["transposed"]:
        ctx.couple(united)
        return [None if out is None else united.expand(s) for out, s in _outs(call)]
    depth = len(_shape(source)) - 2
    stride, padding, dilation = (_each(call[n], depth) for n in ("stride", "padding", "dilation"))
    shape, size = _shape(source), _shape(weight)
    ids = grad.ids
    tables = [
        _transposed_table(ids.shape[2 + d], shape[2 + d], size[2 + d], stride[d], padding[d], dilation[d])
        for d in range(depth)
    ]
    channels = ctx.unite_dims(ids.reshape(ids.shape[0], call["groups"], -1, *ids.shape[2:]), [2])
    per_group = _united(ctx, _taps(channels, tables))
    by_input = per_group.unsqueeze(2).expand(
        *per_group.shape[:2], shape[1] // call["groups"], *per_group.shape[2:]
    )
    found: list[Any] = [by_input.reshape(shape), united, ctx.unite_dims(ids, [0, *range(2, ids.dim())])]
    return [f if f is None or f.dim() else f.expand(s) for f, (_, s) in zip(found, _outs(call), strict=True)]


def _outs(call: Call) -> list[tuple[Any, Any]]:
    return list(zip(call.outs, call.out_shapes, strict=True))


def _pool_table(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    return _table(size, out, kernel, stride, padding, dilation)


@rule("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pool(ctx: Context, call: Call) -> Any:
    """Every element of the window, whichever is the largest: right at other inputs too."""
    ids = call["self"].ids
    depth = 3 if "3d" in call.name else 1 if "1d" in call.name else 2
    kernel, padding = _each(call["kernel_size"], depth), _each(call["padding"], depth)
    stride = _each(call["stride"], depth) if call["stride"] else kernel
    dilation = _each(call.args.get("dilation", 1), depth)
    offset = ids.dim() - depth
    tables = [
        _table(ids.shape[offset + d], call.shape[offset + d], kernel[d], stride[d], padding[d], dilation[d])
        for d in range(depth)
    ]
    united = _united(ctx, _taps(ids, tables))
    return [united, *([None] * (len(call.outs) - 1))]


@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_pool(ctx: Context, call: Call) -> Any:
    ids = call["self"].ids
    depth = 3 if "3d" in call.name else 2
    offset = ids.dim() - depth
    tables = []
    for d in range(depth):
        size, out = ids.shape[offset + d], call.shape[offset + d]
        begin = torch.arange(out) * size // out
        end = -((-(torch.arange(out) + 1) * size) // out)
        width = int((end - begin).max()) if out else 0
        reads = begin[:, None] + torch.arange(width)[None, :]
        tables.append(torch.where(reads < end[:, None], reads, -1))
    united = _united(ctx, _taps(ids, tables))
    return [united, *([None] * (len(call.outs) - 1))]


@rule("avg_pool2d_backward", "avg_pool3d_backward")
def _avg_pool_backward(ctx: Context, call: Call) -> Any:
    depth = 3 if "3d" in call.name else 2
    kernel, padding = _each(call["kernel_size"], depth), _each(call["padding"], depth)
    stride = _each(call["stride"], depth) if call["stride"] else kernel
    ids = call["grad_output"].ids
    offset = ids.dim() - depth
    tables = [
        _transposed_table(ids.shape[offset + d], call.shape[offset + d], kernel[d], stride[d], padding[d], 1)
        for d in range(depth)
    ]
    return _united(ctx, _taps(ids, tables))


@rule(
    "upsample_linear1d",
    "upsample_bilinear2d",
    "upsample_trilinear3d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def _interpolate(ctx: Context, call: Call) -> Any:
    """Each dimension apart: its weights are read off the same operator, applied to an identity."""
    ids = call["self"].ids
    depth = ids.dim() - 2
    tables = []
    for d in range(depth):
        size, out = ids.shape[2 + d], call.shape[2 + d]
        weights = _weights_along(call, d, depth, size, out)
        width = int((weights != 0).sum(1).max()) if out else 0
        order = torch.sort((weights != 0).to(torch.int8), dim=1, descending=True, stable=True)
        reads = order.indices[:, :width]
        tables.append(torch.where(order.values[:, :width] > 0, reads, -1))
    return _united(ctx, _taps(ids, tables))


def _weights_along(call: Call, d: int, depth: int, size: int, out: int) -> Tensor:
    """Shape (out, size): the weights of one dimension, the others having size 1."""
    identity = torch.eye(size, dtype=torch.float64).view(
        size, 1, *[size if k == d else 1 for k in range(depth)]
    )
    given = dict(call.args)
    del given["self"]
    given["output_size"] = [out if k == d else 1 for k in range(depth)]
    given.pop("scale_factors", None)
    weights: Tensor = getattr(aten, call.name)(identity, **given)
    return weights.reshape(size, out).t()


@rule("grid_sampler_2d", "grid_sampler_3d", curvature="curved")
def _grid_sampler(ctx: Context, call: Call) -> Any:
    """All of the picture's channel, and the point."""
    source, grid = call["input"], call["grid"]
    depth = len(call.shape) - 2
    picture = ctx.unite_dims(ctx.ids(source), range(2, 2 + depth), True)
    points = ctx.unite_dims(ctx.ids(grid), [-1]).unsqueeze(1)
    united = ctx.unite(picture, points) if isinstance(grid, Dep) else picture
    if isinstance(grid, Dep):
        ctx.couple(united.expand(call.shape))
    return united.expand(call.shape)
