"""Products of matrices, with constant or dependent operands."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._warning import making_sparse
from .._sets import OverBudget, broadcast_shapes
from .._trace import Const, Ref
from ._table import CURVED, LINEAR, PRODUCT, Call, Context, Dep, rule, zero_ids

__all__: list[str] = []


def _nonzero(ctx: Context, value: Any) -> Tensor | None:
    """Where a constant matrix, or a batch of them, isn't zero, if it has zeros that every call has."""
    if not isinstance(value, Const):
        return None
    matrix = value.tensor.detach()
    if matrix.layout != torch.strided:
        # Other values will be stored in the same places, or else the structure is local.
        ctx.by_values(value)
        fixed = value.fixed and not value.tensor.requires_grad
        matrix = matrix.to_sparse().cpu().coalesce()
        with making_sparse(torch.sparse_coo):
            return torch.sparse_coo_tensor(
                matrix.indices(),
                matrix.values() != 0 if fixed else torch.ones_like(matrix.values(), dtype=torch.bool),
                matrix.shape,
                device="cpu",
                is_coalesced=True,
                check_invariants=False,
            )
    if not value.fixed:
        return None
    if matrix.dim() == 3 and matrix.shape[0] > 0 and (matrix.shape[0] == 1 or matrix.stride(0) == 0):
        matrix = matrix[0]  # one for the whole batch, as `einsum` and `matmul` expand it
    there = matrix.cpu() != 0
    return None if bool(there.all()) else there


def _by_columns(ctx: Context, ids: Tensor, there: Tensor) -> Tensor:
    """``out[..., j]``: the union of ``ids[..., k]`` over the ``k`` with ``there[..., k, j]``.

    A batch of matrices is taken for one with blocks along its diagonal.
    """
    turned = there.transpose(-1, -2)
    at = turned.coalesce().indices() if turned.is_sparse else turned.nonzero().t()  # sorted by column
    depth, width = there.shape[-2:]
    batch = there.shape[0] if there.dim() == 3 else 1
    columns, inner = at[-2], at[-1]
    if there.dim() == 3:
        columns, inner = at[0] * width + columns, at[0] * depth + inner
        ids = ids.expand(batch, -1, -1).transpose(0, 1)
    pointers = torch.zeros(batch * width + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(torch.bincount(columns, minlength=batch * width), 0, out=pointers[1:])
    outer = ids.shape[:-1]
    rows = ids.reshape(-1, batch * depth)
    count, total = rows.shape[0], columns.numel()
    ptr = (torch.arange(count, device="cpu")[:, None] * total + pointers[None, :-1]).reshape(-1)
    ptr = torch.cat([ptr, torch.tensor([count * total], device="cpu")])
    found = ctx.sets.unite_groups(ptr, rows[:, inner].reshape(-1)).view(*outer, width)
    return found.transpose(0, 1) if there.dim() == 3 else found


# Ids that are read at most for a large matrix of a batch that is more than an eighth full.
_MANY = 1 << 20


def _pays(ctx: Context, ids: Tensor, there: Tensor) -> bool:
    """Whether to look at zeros in products of a batch: rows that are united as a whole share one set."""
    total = there.coalesce().values().numel() if there.is_sparse else int(there.count_nonzero())
    reads = total * ids.shape[-2] * (ids.shape[0] if there.dim() == 2 else 1)
    return reads <= (_MANY if 8 * total > there.numel() else ctx.sets.budget)


def _by_zeros(ctx: Context, a: Any, b: Any) -> Tensor | None:
    """Sets of a product with a constant, if its zeros are known and to look at them is affordable."""
    there = _nonzero(ctx, b if isinstance(a, Dep) else a)
    if there is None:
        return None
    ids = a.ids if isinstance(a, Dep) else ctx.ids(b).mT
    if not isinstance(a, Dep):
        there = there.transpose(-1, -2)
    batched = ids.dim() == 3
    if batched and not _pays(ctx, ids, there):
        return None
    try:
        found = _by_columns(ctx, ids, there)
    except OverBudget:
        if not batched:
            raise
        return None
    return found if isinstance(a, Dep) else found.mT


def matmul(ctx: Context, a: Any, b: Any) -> Tensor:
    """Sets of the product of two matrices, or batches of them; couplings where both are dependent."""
    left, right = ctx.ids(a), ctx.ids(b)
    rows, columns = left.shape[-2], right.shape[-1]
    batch = broadcast_shapes(left.shape[:-2], right.shape[:-2])
    shape = (*batch, rows, columns)
    if isinstance(a, Dep) and isinstance(b, Dep):
        # Pairs of column k of the left with row k of the right, each united first: the same couplings.
        ctx.couple(ctx.unite_dims(left, [-2]), ctx.unite_dims(right, [-1]))
        if not ctx.wanted:
            return zero_ids(shape)
    else:
        found = _by_zeros(ctx, a, b)
        if found is not None:
            return found.expand(shape)
    over_rows = ctx.unite_dims(left, [-1], True)
    over_columns = ctx.unite_dims(right, [-2], True)
    return ctx.unite(over_rows, over_columns).expand(shape)


def _row(value: Any) -> Any:
    """A vector as a matrix of one column."""
    if isinstance(value, Dep):
        return Dep(value.ids.unsqueeze(-1), value.dtype)
    return Const(value.tensor.unsqueeze(-1), value.seen, value.fixed)


@rule("mm", "bmm", "_sparse_mm", curvature=PRODUCT)
def _mm(ctx: Context, call: Call) -> Any:
    return matmul(ctx, *call.tensors()[:2])


@rule("mv", curvature=PRODUCT)
def _mv(ctx: Context, call: Call) -> Any:
    return matmul(ctx, call["self"], _row(call["vec"])).squeeze(-1)


@rule("dot", "vdot", curvature=PRODUCT)
def _dot(ctx: Context, call: Call) -> Any:
    a, b = call.tensors()[:2]
    if isinstance(a, Dep) and isinstance(b, Dep):
        ctx.couple(a.ids, b.ids)
        if not ctx.wanted:
            return zero_ids()
    else:
        constant = b if isinstance(a, Dep) else a
        if isinstance(constant, Const) and constant.fixed:
            kept = torch.where(
                constant.tensor.detach().cpu() != 0, ctx.ids(a if isinstance(a, Dep) else b), 0
            )
            return ctx.unite_dims(kept, None)
    return ctx.unite_dims(ctx.unite(ctx.ids(a), ctx.ids(b)), None)


@rule("outer", "ger", curvature=PRODUCT)
def _outer(ctx: Context, call: Call) -> Any:
    a, b = call.tensors()[:2]
    left, right = ctx.ids(a).unsqueeze(1), ctx.ids(b).unsqueeze(0)
    if isinstance(a, Dep) and isinstance(b, Dep):
        ctx.couple(left, right)
    return ctx.unite(left, right)


@rule(
    "addmm",
    "baddbmm",
    "addmv",
    "addr",
    "addbmm",
    "_addmm_activation",
    "_sparse_addmm",
    "sparse_sampled_addmm",
    curvature=PRODUCT,
)
def _addmm(ctx: Context, call: Call) -> Any:
    offset, a, b = call.tensors()[:3]
    if call.name == "addmv":
        product = matmul(ctx, a, _row(b)).squeeze(-1)
    elif call.name == "addr":
        left, right = ctx.ids(a).unsqueeze(1), ctx.ids(b).unsqueeze(0)
        if isinstance(a, Dep) and isinstance(b, Dep):
            ctx.couple(left, right)
        product = ctx.unite(left, right)
    elif call.name == "addbmm":
        product = ctx.unite_dims(matmul(ctx, a, b), [0])
    elif call.name in ("addmm", "baddbmm", "_sparse_addmm"):
        product = matmul(ctx, a, b)
    else:
        raise NotImplementedError(call.name)
    return ctx.unite(product, ctx.ids(offset))


@rule("_trilinear", curvature=PRODUCT)
def _trilinear(ctx: Context, call: Call) -> Any:
    """Products of three, summed."""
    parts = []
    for name in ("1", "2", "3"):
        ids = ctx.ids(call["i" + name])
        for dim in call["expand" + name]:
            ids = ids.unsqueeze(dim)
        parts.append((call["i" + name], ids))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        if isinstance(parts[first][0], Dep) and isinstance(parts[second][0], Dep):
            ctx.couple(parts[first][1], parts[second][1])
    return ctx.unite_dims(ctx.unite(*(ids for _, ids in parts)), call["sumdim"])


@rule("linalg_cross", curvature=PRODUCT)
def _cross(ctx: Context, call: Call) -> Any:
    """Each component from the two others of both vectors."""
    a, b = (ctx.ids(value) for value in call.tensors()[:2])
    a, b = a.expand(call.shape), b.expand(call.shape)
    dim = call["dim"]
    first = [(a.roll(-1, dim), b.roll(-2, dim)), (a.roll(-2, dim), b.roll(-1, dim))]
    for left, right in first:
        ctx.couple(left, right)
    return ctx.unite(*first[0], *first[1])


@rule("_euclidean_dist", "_cdist_forward", curvature=CURVED)
def _cdist(ctx: Context, call: Call) -> Any:
    rows = ctx.unite_dims(ctx.ids(call["x1"]), [-1])
    columns = ctx.unite_dims(ctx.ids(call["x2"]), [-1])
    united = ctx.unite(rows.unsqueeze(-1), columns.unsqueeze(-2))
    ctx.couple(united)
    return united


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r", curvature=LINEAR)
def _fft(ctx: Context, call: Call) -> Any:
    """Dense along the transformed dimensions."""
    dims = call["dim"]
    united = ctx.unite_dims(call["self"].ids, dims if isinstance(dims, list) else [dims], True)
    return united.expand(call.shape)


@rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    curvature=CURVED,
)
def _attention(ctx: Context, call: Call) -> Any:
    """A query's result depends on it and on all keys and values of its head."""
    query = ctx.unite_dims(ctx.ids(call["query"]), [-1], True)
    key = ctx.unite_dims(ctx.ids(call["key"]), [-2, -1], True)
    value = ctx.unite_dims(ctx.ids(call["value"]), [-2, -1], True)
    mask = call.first("attn_mask", "attn_bias")
    parts = [query, key, value]
    if isinstance(mask, Dep):
        parts.append(ctx.everything(call))
    united = ctx.unite(*parts)
    ctx.couple(united)
    # The second result is the logarithm of each query's denominator; the others carry no derivative.
    lse = united.squeeze(-1) if isinstance(call.outs[1], Ref) else None
    return [united.expand(call.shape), lse, *([None] * (len(call.outs) - 2))]
