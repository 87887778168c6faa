"""Interpolation: each output reads the pixels around its position in the source.

Kernels work out these positions in their own ways: in float64 or float32, with or without a fused
multiply-add. What any of them may read is listed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .._sets import OverBudget
from .._trace import Const
from ._table import CURVED, Call, Context, rule
from .windows import reversed_table, table_of, taps, unite_taps

__all__: list[str] = []

aten: Any = torch.ops.aten

_SMOOTH = ("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d")
_ANTIALIASED = ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")
_NEAREST = tuple(f"{name}{d}d" for d in (1, 2, 3) for name in ("upsample_nearest", "_upsample_nearest_exact"))


@rule(*_SMOOTH, *_ANTIALIASED, *_NEAREST)
def _interpolate(ctx: Context, call: Call) -> Any:
    ids = call["self"].ids
    tables = [_table(call, d, ids.shape[2 + d], call.shape[2 + d]) for d in range(ids.dim() - 2)]
    return unite_taps(ctx, taps(ids, tables))


@rule(*(f"{name}_backward" for name in (*_SMOOTH, *_ANTIALIASED, *_NEAREST)))
def _interpolate_backward(ctx: Context, call: Call) -> Any:
    ids = call["grad_output"].ids
    sizes = call.shape[2:]
    tables = [_table(call, d, size, ids.shape[2 + d]) for d, size in enumerate(sizes)]
    return unite_taps(
        ctx, taps(ids, [reversed_table(t, size) for t, size in zip(tables, sizes, strict=True)])
    )


def _table(call: Call, d: int, size: int, out: int) -> Tensor:
    """Which pixels each output reads along one dimension, shape (out, taps); -1 where there are fewer."""
    name = call.name.removesuffix("_backward")
    scales = [value for argument, value in call.args.items() if argument.startswith("scales")]
    corners = bool(call.args.get("align_corners", False))
    if name in _ANTIALIASED:
        return _antialiased_table(name, size, out, corners, scales[d])
    nearest = name in _NEAREST
    if nearest:
        first, last = _nearest_positions(size, out, scales[d], "exact" in name)
        lowest, highest = first.floor(), last.floor()
    else:
        first, last = _smooth_positions(size, out, corners, scales[d])
        lowest, highest = first.floor(), last.ceil()
    if "cubic" in name:  # two on each side, unless it is on a pixel
        lowest, highest = lowest - (lowest < highest).double(), highest + (lowest < highest).double()
    # What is outside of the picture is read at its border.
    lowest, highest = lowest.clamp(0, size - 1).long(), highest.clamp(0, size - 1).long()
    width = int((highest - lowest).max()) + 1 if out else 0
    reads = lowest[:, None] + torch.arange(width, device="cpu")
    return torch.where(reads <= highest[:, None], reads, -1)


def _ratio(size: int, out: int, scale: float | None) -> float:
    return 1 / scale if scale else size / out


def _nearest_positions(size: int, out: int, scale: float | None, exact: bool) -> tuple[Tensor, Tensor]:
    """Where outputs lie in the source: the least and the greatest product that a kernel works out."""
    ratio = _ratio(size, out, scale)
    places = torch.arange(out, dtype=torch.float64, device="cpu") + 0.5 * exact
    rounded = torch.tensor(ratio, dtype=torch.float32, device="cpu")
    wide = places * rounded.double()
    found = [places * ratio, wide, wide.float().double(), (places.float() * rounded).double()]
    if out in (size, 2 * size):  # some take no notice of the scale then
        found.append(places * (size / out))
    positions = torch.stack(found)
    return positions.amin(0), positions.amax(0)


def _smooth_positions(size: int, out: int, corners: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """The same, with room for any rounding of what isn't exact; tiny weights may be negative, too."""
    half = 0.0 if corners else 0.5
    ratio = (size - 1) / max(1, out - 1) if corners else _ratio(size, out, scale)
    places = torch.arange(out, dtype=torch.float64, device="cpu") + half
    rounded = torch.tensor(ratio, dtype=torch.float32, device="cpu")
    wide = places * ratio
    inexact = (rounded.double() != ratio) | ((places.float() * rounded).double() != wide)
    room = inexact * wide * 2.0**-21
    return wide - half - room, wide - half + room


def _antialiased_table(name: str, size: int, out: int, corners: bool, scale: float | None) -> Tensor:
    """Read off the operator, whose kernel is wrong where the last dimension is 1."""
    there = torch.zeros(out, size, dtype=torch.bool, device="cpu")
    for dtype in (torch.float64, torch.float32):
        identity = torch.eye(size, dtype=dtype, device="cpu").view(size, 1, 1, size)
        weights: Tensor = getattr(aten, name)(identity, [1, out], corners, None, scale)
        there |= weights.view(size, out).t() != 0
    return table_of(there)


@rule("grid_sampler_2d", "grid_sampler_3d", curvature=CURVED)
def _grid_sampler(ctx: Context, call: Call) -> Any:
    """The pixels around the points of a constant grid, or all of the picture's channel, and the point."""
    ids, grid = ctx.ids(call["input"]), call["grid"]
    depth = len(call.shape) - 2
    if isinstance(grid, Const):
        reads = _read_at(ids, grid, call)
        if reads is not None and ids.shape[1] * reads.numel() <= ctx.sets.budget:
            with contextlib.suppress(OverBudget):  # all of a channel is one set: it takes less
                return _gathered(ctx, ids, reads).view(call.shape)
    picture = ctx.unite_dims(ids, range(2, 2 + depth), True)
    if isinstance(grid, Const):
        return picture.expand(call.shape)
    united = ctx.unite(picture, ctx.unite_dims(grid.ids, [-1]).unsqueeze(1)).expand(call.shape)
    ctx.couple(united)
    return united


def _gathered(ctx: Context, ids: Tensor, reads: Tensor) -> Tensor:
    flat = ids.flatten(2)[:, :, None].expand(-1, -1, reads.shape[1], -1)
    where = reads[:, None].expand(-1, ids.shape[1], -1, -1)
    return unite_taps(ctx, flat.gather(3, where.clamp(min=0)).masked_fill(where < 0, 0))


def _read_at(ids: Tensor, grid: Const, call: Call) -> Tensor | None:
    """Which pixels each point may read, shape (pictures, points, taps); ``None`` where that isn't known."""
    mode, padding, corners = call["interpolation_mode"], call["padding_mode"], call["align_corners"]
    precision = {torch.float64: 2.0**-42, torch.float32: 2.0**-18}.get(grid.tensor.dtype)
    # Reflected positions jump where the kernel's quotient is rounded.
    if not grid.fixed or precision is None or padding == 2 or 0 in call.shape or 0 in ids.shape:
        return None
    points = grid.tensor.detach().to("cpu", torch.float64).flatten(1, -2)
    if not bool((points.abs() < 1000).all()):
        return None
    where = torch.zeros((), dtype=torch.int64, device="cpu")
    for d, size in enumerate(ids.shape[2:]):
        places = points[..., -1 - d]  # a point's first coordinate is along the last dimension
        places = (places + 1) / 2 * (size - 1) if corners else ((places + 1) * size - 1) / 2
        reads = _read_along(places, size, mode, padding == 1, precision).unsqueeze(-2)
        where = where.unsqueeze(-1)
        inside = (where >= 0) & (reads >= 0)
        where = torch.where(inside, where * size + reads, -1).flatten(-2)
    return where


def _read_along(places: Tensor, size: int, mode: int, border: bool, precision: float) -> Tensor:
    """Pixels along one dimension, shape (..., taps), with room for any rounding; -1 where none is."""
    room = (places.abs() + size) * precision
    if border and mode != 2:
        places = places.clamp(0, size - 1)
    lowest, highest = places - room, places + room
    if mode == 1:  # the nearest one
        first, last = (lowest - 0.5).ceil(), (highest + 0.5).floor()
    else:  # one, or two for a cubic, on each side
        around = 1 if mode == 2 else 0
        first, last = lowest.floor() - around, highest.floor() + 1 + around
    steps = torch.arange(int((last - first).max()) + 1, device="cpu")
    reads = first.long().unsqueeze(-1) + steps
    beyond = reads > last.unsqueeze(-1)
    if border:
        reads = reads.clamp(0, size - 1)
    return torch.where(beyond | (reads < 0) | (reads >= size), -1, reads)
