"""Operators that combine a window of each spatial dimension: convolution, pooling."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._trace import Const
from ._table import PRODUCT, Call, Context, Dep, rule, shape_of, zero_ids

__all__ = ["reversed_table", "table_of", "taps", "unite_taps"]


def _table(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """Which input each tap of each output reads, shape (out, kernel); -1 where that is padding."""
    reads = (
        torch.arange(out, device="cpu")[:, None] * stride
        - padding
        + torch.arange(kernel, device="cpu")[None, :] * dilation
    )
    return torch.where((reads >= 0) & (reads < size), reads, -1)


def _transposed_table(size: int, out: int, kernel: int, stride: int, padding: int, dilation: int) -> Tensor:
    """The same for a transposed convolution: what an input is spread over, read backwards."""
    reads = (
        torch.arange(out, device="cpu")[:, None]
        + padding
        - torch.arange(kernel, device="cpu")[None, :] * dilation
    )
    inside = (reads >= 0) & (reads % stride == 0) & (reads < size * stride)
    return torch.where(inside, torch.div(reads, stride, rounding_mode="floor"), -1)


def taps(ids: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """For ids of shape (..., *sizes) those that each output reads: (..., *outs, all taps)."""
    depth = len(tables)
    sizes = ids.shape[ids.dim() - depth :]
    where = torch.zeros((1,) * (2 * depth), dtype=torch.int64, device="cpu")
    outside = torch.zeros((1,) * (2 * depth), dtype=torch.bool, device="cpu")
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


def unite_taps(ctx: Context, taps: Tensor) -> Tensor:
    """The union over the last dimension."""
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
    size = shape_of(weight)
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
        united = _by_weight(ctx, taps(grouped, tables), there)
    else:
        channels = ctx.unite_dims(grouped, [2])
        per_group = (
            unite_taps(ctx, taps(channels, tables))
            if isinstance(source, Dep)
            else zero_ids((ids.shape[0], groups, *call.shape[2:]))
        )
        united = per_group.unsqueeze(2).expand(*per_group.shape[:2], each, *per_group.shape[2:])
    united = united.reshape(call.shape)
    if isinstance(weight, Dep):
        by_channel = _filters(weight.ids, groups, transposed)
        if isinstance(source, Dep):
            all_of_each = ctx.unite_dims(by_channel, range(1, by_channel.dim()))
            ctx.couple(ctx.unite_dims(united, [0, *range(2, united.dim())]), all_of_each)
        united = ctx.unite(united, _read_of(ctx, by_channel, tables))
    if isinstance(bias, Dep):
        united = ctx.unite(united, bias.ids.view(1, out_channels, *[1] * depth))
    return united.expand(call.shape)


def _filters(ids: Tensor, groups: int, transposed: bool) -> Tensor:
    """The weights of each output channel: (out channels, in channels of a group, *kernel)."""
    if not transposed:
        return ids
    each = ids.shape[0] // groups
    return ids.reshape(groups, each, *ids.shape[1:]).transpose(1, 2).reshape(-1, each, *ids.shape[2:])


# Weights times choices of them, beyond which an output counts as reading all weights of its channel.
_MANY = 1 << 24


def _read_of(ctx: Context, filters: Tensor, tables: Sequence[Tensor]) -> Tensor:
    """The weights that meet something in each output: (1, out channels, *outs).

    In padding, and between the elements that a transposed convolution spreads, some don't. Along each
    dimension there are few choices of them.
    """
    choices, which = zip(*(torch.unique(t >= 0, dim=0, return_inverse=True) for t in tables), strict=True)
    there = torch.ones((1, 1), dtype=torch.bool, device="cpu")
    for chosen in choices:  # of all dimensions so far, and of this one
        there = (there[:, None, :, None] & chosen[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    if len(there) == 1 or filters.numel() * len(there) > _MANY:
        united = ctx.unite_dims(filters, range(1, filters.dim()))
        return united.view(1, -1, *[1] * len(tables))
    taps = ctx.unite_dims(filters, [1]).reshape(filters.shape[0], 1, -1)
    found = ctx.unite_dims(torch.where(there, taps, 0), [-1]).view(-1, *(len(c) for c in choices))
    for d, index in enumerate(which):
        found = found.index_select(1 + d, index)
    return found.unsqueeze(0)


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
            found.append(unite_taps(ctx, chosen) if channel.numel() else zero_ids(chosen.shape[:-1]))
        rows.append(torch.stack(found, 1))
    return torch.stack(rows, 1)


@rule("convolution_backward", curvature=PRODUCT)
def _convolution_backward(ctx: Context, call: Call) -> Any:
    """By the input the adjoint convolution of the incoming gradient; by a weight what it multiplies."""
    grad, source, weight = call["grad_output"], call["input"], call["weight"]
    groups, mask = call["groups"], call["output_mask"]
    g, x = ctx.ids(grad), ctx.ids(source)
    if isinstance(grad, Dep) and isinstance(weight, Dep) and mask[0]:
        filters = _filters(weight.ids, groups, call["transposed"])
        of_each = ctx.unite_dims(filters, range(1, filters.dim()))
        ctx.couple(ctx.unite_dims(g, [0, *range(2, g.dim())]), of_each)
    if isinstance(grad, Dep) and isinstance(source, Dep) and mask[1]:
        of_groups = [ids.reshape(ids.shape[0], groups, -1) for ids in (g, x)]
        ctx.couple(*(ctx.unite_dims(ids, [2]) for ids in of_groups))
    if not ctx.wanted:
        return [None if shape is None else zero_ids(shape) for shape in call.out_shapes]
    return [
        _adjoint(ctx, call, g) if mask[0] else None,
        _by_weights(ctx, call, g, x) if mask[1] else None,
        ctx.unite_dims(g, [0, *range(2, g.dim())]) if mask[2] else None,
    ]


def _adjoint(ctx: Context, call: Call, grad: Tensor) -> Tensor:
    weight, transposed = call["weight"], call["transposed"]
    shape, size, groups = shape_of(call["input"]), shape_of(weight), call["groups"]
    depth = len(shape) - 2
    stride, padding, dilation = (_each(call[n], depth) for n in ("stride", "padding", "dilation"))
    make = _table if transposed else _transposed_table
    tables = [
        make(grad.shape[2 + d], shape[2 + d], size[2 + d], stride[d], padding[d], dilation[d])
        for d in range(depth)
    ]
    channels = ctx.unite_dims(grad.reshape(grad.shape[0], groups, -1, *grad.shape[2:]), [2])
    per_group = unite_taps(ctx, taps(channels, tables)).unsqueeze(2)
    spread = per_group.expand(*per_group.shape[:2], shape[1] // groups, *per_group.shape[3:])
    united = spread.reshape(shape)
    if isinstance(weight, Dep):
        united = ctx.unite(united, _read_of(ctx, _filters(weight.ids, groups, not transposed), tables))
    return united


def _by_weights(ctx: Context, call: Call, grad: Tensor, source: Tensor) -> Tensor:
    """For each weight the elements of both that it is multiplied with, whatever the sample."""
    size, groups = shape_of(call["weight"]), call["groups"]
    depth = len(size) - 2
    stride, padding, dilation = (_each(call[n], depth) for n in ("stride", "padding", "dilation"))
    reading, read = (source, grad) if call["transposed"] else (grad, source)
    tables = [
        _table(read.shape[2 + d], reading.shape[2 + d], size[2 + d], stride[d], padding[d], dilation[d])
        for d in range(depth)
    ]
    found = []
    for taps in itertools.product(*(range(n) for n in size[2:])):
        a, b = reading, read
        for d, (table, tap) in enumerate(zip(tables, taps, strict=True)):
            column = table[:, tap]
            a = a.index_select(2 + d, (column >= 0).nonzero().flatten())
            b = b.index_select(2 + d, column[column >= 0])
        a, b = (ctx.unite_dims(ids, [0, *range(2, ids.dim())]) for ids in (a, b))
        met = ctx.unite(a.view(groups, -1, 1), b.view(groups, 1, -1))
        found.append(met.expand(groups, size[0] // groups, size[1]).reshape(size[:2]))
    return torch.stack(found, -1).view(size)


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
    return [unite_taps(ctx, taps(ids, tables)), *([None] * (len(call.outs) - 1))]


def _fractional_table(size: int, out: int, kernel: int, eps: float) -> Tensor:
    """Windows begin at multiples of a fraction, give or take what a random number and rounding add."""
    step = (size - kernel) / max(out - 1, 1)
    begin = torch.arange(out, dtype=torch.float64, device="cpu") * step
    begin[-1:] = size - kernel
    room = 8 * eps * size
    low = (begin - room).floor().clamp(min=0).long()
    high = (begin + room).ceil().clamp(max=size - kernel).long()
    width = int((high - low).max()) + kernel if out else 0
    reads = low[:, None] + torch.arange(width, device="cpu")[None, :]
    return torch.where(reads < high[:, None] + kernel, reads, -1)


@rule("fractional_max_pool2d", "fractional_max_pool3d")
def _fractional_pool(ctx: Context, call: Call) -> Any:
    """Every element of the windows, wherever the random numbers put them."""
    ids = call["self"].ids
    depth = 3 if "3d" in call.name else 2
    sizes, outs = ids.shape[ids.dim() - depth :], call.shape[len(call.shape) - depth :]
    kernel, eps = _each(call["kernel_size"], depth), torch.finfo(call["self"].dtype).eps
    tables = [_fractional_table(*lengths, eps) for lengths in zip(sizes, outs, kernel, strict=True)]
    return [unite_taps(ctx, taps(ids, tables)), None]


def _adaptive_tables(sizes: Sequence[int], outs: Sequence[int]) -> list[Tensor]:
    tables = []
    for size, out in zip(sizes, outs, strict=True):
        begin = torch.arange(out, device="cpu") * size // out
        end = -((-(torch.arange(out, device="cpu") + 1) * size) // out)
        width = int((end - begin).max()) if out else 0
        reads = begin[:, None] + torch.arange(width, device="cpu")[None, :]
        tables.append(torch.where(reads < end[:, None], reads, -1))
    return tables


@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def _adaptive_pool(ctx: Context, call: Call) -> Any:
    ids = call["self"].ids
    depth = 3 if "3d" in call.name else 2
    tables = _adaptive_tables(ids.shape[ids.dim() - depth :], call.shape[len(call.shape) - depth :])
    return [unite_taps(ctx, taps(ids, tables)), *([None] * (len(call.outs) - 1))]


@rule("_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
def _adaptive_pool_backward(ctx: Context, call: Call) -> Any:
    ids = call["grad_output"].ids
    depth = 3 if "3d" in call.name else 2
    sizes, outs = call.shape[len(call.shape) - depth :], ids.shape[ids.dim() - depth :]
    tables = [reversed_table(t, n) for t, n in zip(_adaptive_tables(sizes, outs), sizes, strict=True)]
    return unite_taps(ctx, taps(ids, tables))


def reversed_table(table: Tensor, size: int) -> Tensor:
    """For each input the outputs that read it."""
    there = torch.zeros(table.shape[0], size + 1, dtype=torch.bool, device="cpu")
    there[torch.arange(table.shape[0], device="cpu")[:, None], table] = True  # -1 marks the last column
    return table_of(there[:, :size].t())


def table_of(there: Tensor) -> Tensor:
    """Which columns are marked in each row; -1 where there are fewer than elsewhere."""
    width = int(there.sum(1).max()) if there.shape[0] else 0
    order = torch.sort(there.to(torch.int8), dim=1, descending=True, stable=True)
    return torch.where(order.values[:, :width] > 0, order.indices[:, :width], -1)


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
    return unite_taps(ctx, taps(ids, tables))


@rule("affine_grid_generator")
def _affine_grid(ctx: Context, call: Call) -> Any:
    """A coordinate of each point by the row of its matrix."""
    rows = ctx.unite_dims(call["theta"].ids, [-1])
    return rows.view(rows.shape[0], *[1] * (len(call.shape) - 2), rows.shape[1]).expand(call.shape)
