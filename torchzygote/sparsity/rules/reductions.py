"""Operators that combine elements along dimensions: sums, norms, products, running sums, softmax, losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._trace import Const
from ._table import CURVED, RULES, Call, Context, Dep, Rule, rule, zero_ids

__all__: list[str] = []


def _dims(call: Call) -> Any:
    """The reduced dimensions; ``None`` for all."""
    dim = call.first("dim", "dims")
    if isinstance(dim, int):
        return [dim]
    return dim or None


def _reduced(ctx: Context, call: Call, ids: Tensor) -> Tensor:
    return ctx.unite_dims(ids, _dims(call), bool(call.first("keepdim")))


@rule("trace")
def _trace(ctx: Context, call: Call) -> Any:
    return ctx.unite_dims(call["self"].ids.diagonal(), None)


@rule("sum", "mean", "nansum")
def _linear(ctx: Context, call: Call) -> Any:
    return _reduced(ctx, call, call["self"].ids)


@rule("var", "std", "var_mean", "std_mean", "logsumexp", "norm", "linalg_vector_norm", curvature=CURVED)
def _curved(ctx: Context, call: Call) -> Any:
    united = _reduced(ctx, call, call["self"].ids)
    if call.first("ord", "p") not in (1, float("inf"), float("-inf")) or call["self"].dtype.is_complex:
        ctx.couple(united)
    return [united] * len(call.outs)


@rule("dist", curvature=CURVED)
def _dist(ctx: Context, call: Call) -> Any:
    united = ctx.unite_dims(ctx.unite(ctx.ids(call["self"]), ctx.ids(call["other"])), None)
    if call["p"] not in (1, float("inf"), float("-inf")) or call.outs[0].dtype.is_complex:
        ctx.couple(united)
    return united


@rule("renorm", curvature=CURVED)
def _renorm(ctx: Context, call: Call) -> Any:
    """Each slice by its norm, at least where that is too large."""
    ids = call["self"].ids
    rest = [d for d in range(ids.dim()) if d != call["dim"] % ids.dim()]
    united = ctx.unite_dims(ids, rest, True)
    ctx.couple(united)
    return united.expand(ids.shape)


@rule("prod", curvature=CURVED)
def _prod(ctx: Context, call: Call) -> Any:
    """A tree of products, so that no element is coupled with itself."""
    ids, dims = call["self"].ids, _dims(call)
    if dims is None:
        ids, dims = ids.reshape(-1), [0]
    keep = bool(call.first("keepdim"))
    if ids.dim() == 0:
        return ids
    dim = dims[0] % ids.dim()
    while ids.shape[dim] > 1:
        half = ids.shape[dim] // 2
        a, b, rest = ids.split([half, half, ids.shape[dim] - 2 * half], dim)
        ctx.couple(a, b)
        ids = _joined(ctx.unite(a, b), rest, dim)
    if ids.shape[dim] == 0:
        return zero_ids(call.shape)
    return ids if keep else ids.squeeze(dim)


def _joined(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return a if b.shape[dim] == 0 else torch.cat([a, b], dim)


def _scan(ctx: Context, ids: Tensor, dim: int) -> Tensor:
    """Running unions along a dimension, in rounds that double the reach."""
    if ids.dim() == 0:
        return ids
    reach, length = 1, ids.shape[dim]
    while reach < length:
        later = ctx.unite(ids.narrow(dim, reach, length - reach), ids.narrow(dim, 0, length - reach))
        ids = _joined(ids.narrow(dim, 0, reach), later, dim)
        reach *= 2
    return ids


@rule("cumsum")
def _cumsum(ctx: Context, call: Call) -> Any:
    return _scan(ctx, call["self"].ids, call["dim"])


@rule("cumprod", curvature=CURVED)
def _cumprod(ctx: Context, call: Call) -> Any:
    ids, dim = call["self"].ids, call["dim"]
    running = _scan(ctx, ids, dim)
    if ids.dim() > 0 and ids.shape[dim] > 1:
        length = ids.shape[dim]
        ctx.couple(running.narrow(dim, 0, length - 1), ids.narrow(dim, 1, length - 1))
    return running


@rule("logcumsumexp", "_logcumsumexp", curvature=CURVED)
def _logcumsumexp(ctx: Context, call: Call) -> Any:
    running = _scan(ctx, call["self"].ids, call["dim"])
    ctx.couple(running)
    return running


@rule("_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", curvature=CURVED)
def _softmax(ctx: Context, call: Call) -> Any:
    ids = call["self"].ids
    united = ctx.unite_dims(ids, [call["dim"]], True)
    ctx.couple(united)
    return united.expand(ids.shape)


@rule("_softmax_backward_data", "_log_softmax_backward_data", curvature=CURVED)
def _softmax_backward(ctx: Context, call: Call) -> Any:
    both = ctx.unite(ctx.ids(call["grad_output"]), ctx.ids(call["output"]))
    united = ctx.unite_dims(both, [call["dim"]], True)
    ctx.couple(united)
    return united.expand(both.shape)


def _scaled(ctx: Context, call: Call, normalized: Tensor, shape: Any) -> Tensor:
    """A normalized tensor times weight plus bias; ``shape`` makes these broadcast."""
    out = normalized
    weight, bias = call.first("weight"), call.first("bias")
    if isinstance(weight, Dep):
        scale = weight.ids.reshape(shape)
        ctx.couple(out, scale.expand(out.shape))
        out = ctx.unite(out, scale)
    if isinstance(bias, Dep):
        out = ctx.unite(out, bias.ids.reshape(shape))
    return out


@rule("native_layer_norm", "_fused_rms_norm", curvature=CURVED)
def _layer_norm(ctx: Context, call: Call) -> Any:
    ids = ctx.ids(call["input"])
    shape = call["normalized_shape"]
    united = ctx.unite_dims(ids, range(ids.dim() - len(shape), ids.dim()), True)
    ctx.couple(united)
    out = _scaled(ctx, call, united.expand(ids.shape), shape)
    return [out, *([united] * (len(call.outs) - 1))]


@rule("native_group_norm", curvature=CURVED)
def _group_norm(ctx: Context, call: Call) -> Any:
    ids = ctx.ids(call["input"])
    batch, channels, groups = call["N"], call["C"], call["group"]
    grouped = ids.reshape(batch, groups, -1)
    united = ctx.unite_dims(grouped, [2])
    ctx.couple(united)
    whole = united[:, :, None].expand(grouped.shape).reshape(ids.shape)
    out = _scaled(ctx, call, whole, [1, channels] + [1] * (ids.dim() - 2))
    return [out, united, united]


@rule(
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_with_update",
    "_batch_norm_no_update",
    "cudnn_batch_norm",
    curvature=CURVED,
)
def _batch_norm(ctx: Context, call: Call) -> Any:
    """Over the batch while training; with fixed statistics one element at a time."""
    ids = ctx.ids(call["input"])
    channels = [1, -1] + [1] * (ids.dim() - 2)
    training = call.args.get("training", call.name == "_batch_norm_with_update")
    if not training:
        for statistic in ("running_mean", "running_var"):
            if isinstance(call.args.get(statistic), Dep):
                raise NotImplementedError("batch norm by dependent statistics")
        return [_scaled(ctx, call, ids, channels), *([zero_ids()] * (len(call.outs) - 1))]
    united = ctx.unite_dims(ids, [d for d in range(ids.dim()) if d != 1], True)
    ctx.couple(united)
    out = _scaled(ctx, call, united.expand(ids.shape), channels)
    each = united.reshape(-1)
    return [out, *([each] * (len(call.outs) - 1))]


@rule("native_batch_norm_backward", "cudnn_batch_norm_backward", curvature=CURVED)
def _batch_norm_backward(ctx: Context, call: Call) -> Any:
    grad, source, scale = (
        ctx.ids(call.first("grad_out", "grad_output")),
        ctx.ids(call["input"]),
        call["weight"],
    )
    rest = [d for d in range(source.dim()) if d != 1]
    channels = [1, -1] + [1] * (source.dim() - 2)
    united = ctx.unite_dims(ctx.unite(grad, source), rest, True)
    if isinstance(scale, Dep):
        united = ctx.unite(united, scale.ids.reshape(channels))
    ctx.couple(united)
    by_weight = united.reshape(-1)
    if call.args.get("train", True):
        return [united.expand(source.shape), by_weight, by_weight]
    out = ctx.unite(grad, ctx.ids(scale).reshape(channels) if isinstance(scale, Dep) else zero_ids())
    return [out, by_weight, ctx.unite_dims(grad, rest)]


@rule("native_layer_norm_backward", curvature=CURVED)
def _layer_norm_backward(ctx: Context, call: Call) -> Any:
    ids = ctx.unite(ctx.ids(call["grad_out"]), ctx.ids(call["input"]))
    shape = call["normalized_shape"]
    if isinstance(call["weight"], Dep):
        ids = ctx.unite(ids, call["weight"].ids.reshape(shape))
    outer = range(ids.dim() - len(shape))
    united = ctx.unite_dims(ids, range(ids.dim() - len(shape), ids.dim()), True)
    ctx.couple(united)
    over_rows = ctx.unite_dims(united.expand(ids.shape), outer)
    return [united.expand(ids.shape), over_rows, ctx.unite_dims(ids, outer)]


_LOSSES = (
    "mse_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "soft_margin_loss",
)


def _loss(ctx: Context, call: Call) -> Any:
    parts = [ctx.ids(value) for value in call.tensors()]
    united = ctx.unite(*parts)
    ctx.couple(united)
    reduction = call.first("reduction")
    return united if reduction == 0 else ctx.unite_dims(united, None)


for _name in _LOSSES:
    RULES[_name] = Rule(_loss, CURVED)


@rule("mse_loss_backward", "huber_loss_backward", "smooth_l1_loss_backward", curvature=CURVED)
def _loss_backward(ctx: Context, call: Call) -> Any:
    a, b = ctx.ids(call["self"]), ctx.ids(call["target"])
    grad = ctx.ids(call["grad_output"])
    both = ctx.unite(a, b)
    ctx.couple(grad.expand(both.shape), both)
    return ctx.unite(both, grad)


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(ctx: Context, call: Call) -> Any:
    """Takes one class of each row; its weights are constant."""
    target = call["target"]
    if not isinstance(target, Const) or isinstance(call["weight"], Dep):
        raise NotImplementedError("nll_loss by dependent targets or weights")
    ctx.by_values(target)
    ids, index = call["self"].ids, target.tensor.cpu().long()
    dim = 0 if ids.dim() == 1 else 1
    ignored = index == call["ignore_index"]
    taken = ids.gather(dim, index.clamp(min=0).unsqueeze(dim)).squeeze(dim)
    taken = taken.masked_fill(ignored, 0)
    out = taken if call["reduction"] == 0 else ctx.unite_dims(taken, None)
    return [out, zero_ids()]


@rule("nll_loss_backward", "nll_loss2d_backward")
def _nll_loss_backward(ctx: Context, call: Call) -> Any:
    target = call["target"]
    if not isinstance(target, Const) or isinstance(call["weight"], Dep):
        raise NotImplementedError("nll_loss by dependent targets or weights")
    ctx.by_values(target)
    index = target.tensor.cpu().long()
    dim = 0 if len(call.shape) == 1 else 1
    grad = ctx.ids(call["grad_output"]).expand(index.shape).masked_fill(index == call["ignore_index"], 0)
    return zero_ids(call.shape).clone().scatter(dim, index.clamp(min=0).unsqueeze(dim), grad.unsqueeze(dim))
