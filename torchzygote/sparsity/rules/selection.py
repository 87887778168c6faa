"""Operators that pick elements by their values: the structure is that of this input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._trace import Probe
from ._table import Call, Context, rule, zero_ids

__all__ = ["PROBES"]


@rule("sort", "topk", "kthvalue", "mode", "median", "nanmedian", "max", "min", "cummax", "cummin")
def _pick(ctx: Context, call: Call) -> Any:
    """The values along a dimension, by the positions that the operator itself returns."""
    ctx.local = True
    ids = call["self"].ids
    if len(call.outs) == 1:  # over all elements
        return _extreme(ctx, call)
    index = call.outs[1].tensor.cpu()
    if ids.dim() == 0:
        return [ids, None]
    dim = call["dim"] % ids.dim()
    kept = index.dim() == ids.dim()
    where = index if kept else index.unsqueeze(dim)
    taken = ids.gather(dim, where)
    return [taken if kept else taken.squeeze(dim), None]


@rule("amax", "amin", "aminmax")
def _extreme(ctx: Context, call: Call) -> Any:
    """All elements that attain the extreme: PyTorch shares the gradient among them."""
    ctx.local = True
    dims = call.first("dim")
    dims = [dims] if isinstance(dims, int) else dims or None
    found = [
        ctx.unite_dims(torch.where(mask, call["self"].ids, zero_ids()), dims, bool(call.first("keepdim")))
        for mask in call.extra
    ]
    return found if len(found) > 1 else found[0]


def _attained(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor]:
    """Where an input equals each result; asked while the values are there."""
    x: Tensor = args[0].detach()
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    masks = []
    for result in out if isinstance(out, (list, tuple)) else (out,):
        extreme = result.detach()
        if extreme.dtype != x.dtype:
            continue
        if extreme.dim() not in (0, x.dim()):
            for d in sorted(d % x.dim() for d in ([dims] if isinstance(dims, int) else dims or ())):
                extreme = extreme.unsqueeze(d)
        masks.append(((x == extreme) | x.isnan()).cpu())
    return masks


def _whole_only(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Tensor] | None:
    return None if isinstance(out, (list, tuple)) else _attained(args, kwargs, out)


# What the recorder asks for, while values are there.
PROBES: dict[str, Probe] = {
    "amax": _attained,
    "amin": _attained,
    "aminmax": _attained,
    "max": _whole_only,
    "min": _whole_only,
    "median": _whole_only,
    "nanmedian": _whole_only,
}


@rule(
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward",
    "adaptive_max_pool2d_backward",
    "adaptive_max_pool3d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
)
def _max_pool_backward(ctx: Context, call: Call) -> Any:
    """To the places that were the largest; unpooling does the same."""
    ctx.by_values(call["indices"])
    index = call["indices"].tensor.cpu()
    depth = 3 if "3d" in call.name else 2
    planes = call.shape[: len(call.shape) - depth]
    size = torch.Size(call.shape[len(call.shape) - depth :]).numel()
    count = torch.Size(planes).numel()
    where = index.reshape(count, -1) + torch.arange(count, device="cpu")[:, None] * size
    base = zero_ids((count * size,))
    source = ctx.ids(call.first("grad_output", "self"))
    return ctx.sets.accumulate(base, where, source.reshape(-1)).view(call.shape)


@rule("value_selecting_reduction_backward")
def _value_selecting_backward(ctx: Context, call: Call) -> Any:
    ctx.by_values(call["indices"])
    index, grad, dim = call["indices"].tensor.cpu(), ctx.ids(call["grad"]), call["dim"]
    if not call["keepdim"] and len(call["sizes"]) > 0:
        index, grad = index.unsqueeze(dim), grad.unsqueeze(dim)
    return zero_ids(call["sizes"]).clone().scatter(dim, index, grad)
