"""Solutions, inverses and factorizations of matrices: dense within each matrix of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._sets import broadcast_shapes
from .._trace import Const
from ._table import CURVED, Call, Context, Dep, rule, shape_of, zero_ids

__all__: list[str] = []


@rule(
    "linalg_inv_ex",
    "linalg_cholesky_ex",
    "cholesky",
    "cholesky_inverse",
    "cholesky_solve",
    "_cholesky_solve_helper",
    "_linalg_solve_ex",
    "linalg_solve_triangular",
    "triangular_solve",
    "_linalg_det",
    "_linalg_slogdet",
    "_linalg_eigh",
    "linalg_eig",
    "_linalg_eigvals",
    "linalg_eigvals",
    "_linalg_svd",
    "linalg_qr",
    "linalg_lu",
    "linalg_lu_factor_ex",
    "linalg_lu_solve",
    "linalg_ldl_factor_ex",
    "linalg_ldl_solve",
    "linalg_matrix_exp",
    "linalg_householder_product",
    "linalg_pinv",
    "linalg_lstsq",
    "_linalg_check_errors",
    curvature=CURVED,
)
def _factorization(ctx: Context, call: Call) -> Any:
    """Every result of a matrix depends on all of that matrix, twice."""
    solved = _solved(ctx, call)
    if solved is not None:
        return solved
    batches = _batches(call)
    if batches is None:
        united = ctx.everything(call)
        ctx.couple(united)
        return call.spread(united)
    united = ctx.unite(*(_by_batch(ctx, call[name], batch) for name, batch in batches.items()))
    ctx.couple(united)
    whole = broadcast_shapes(*batches.values())
    alike = len(set(batches.values())) == 1
    results: list[Tensor | None] = []
    for position, shape in enumerate(call.out_shapes):
        if shape is None:
            results.append(None)
        elif position > 0 and not alike:
            results.append(ctx.unite_dims(united, None).expand(shape))
        else:
            results.append(_filled(ctx, united, whole, shape))
    return results


def _by_batch(ctx: Context, value: Any, batch: tuple[int, ...]) -> Tensor:
    """One set for each matrix of a batch."""
    ids = ctx.ids(value)
    return ctx.unite_dims(ids, range(len(batch), ids.dim()))


def _filled(ctx: Context, united: Tensor, batch: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """The set of each matrix for all elements of a result that begins with the batch's dimensions."""
    depth = len(batch)
    if shape[:depth] != tuple(batch):  # as an empty result
        return ctx.unite_dims(united, None).expand(shape)
    return united.expand(tuple(batch)).reshape((*batch, *(1,) * (len(shape) - depth))).expand(shape)


# By operator: the argument that a solution depends on linearly.
_RIGHT_SIDES = {
    "_linalg_solve_ex": "B",
    "linalg_lu_solve": "B",
    "linalg_solve_triangular": "B",
    "cholesky_solve": "self",
    "_cholesky_solve_helper": "self",
    "triangular_solve": "self",
    "linalg_lstsq": "b",
}


# Their operands' batches broadcast with each other.
_BROADCASTING = {*_RIGHT_SIDES, "linalg_ldl_solve"}


def _solved(ctx: Context, call: Call) -> list[Tensor | None] | None:
    """Solutions: all of each matrix and one right side, which is coupled with the matrix alone."""
    name, batches = _RIGHT_SIDES.get(call.name), _batches(call)
    if name is None or batches is None:
        return None
    ids = ctx.ids(call[name])
    vector = ids.dim() == 1 or _inner(call, name) == 1
    across = -1 if vector or call.first("left") is False else -2
    right = ctx.unite_dims(ids, [across], True)
    matrix = zero_ids()
    for key, value in call.args.items():
        if key != name and isinstance(value, Dep):
            matrix = ctx.unite(matrix, _by_batch(ctx, _that_is_read(call, value), batches[key]))
    spread = matrix.reshape(*matrix.shape, *(1,) * (1 if vector else 2))
    ctx.couple(spread)
    ctx.couple(spread, right)
    solution = ctx.unite(spread, right)
    results = [
        None if shape is None else _filled(ctx, matrix, matrix.shape, shape) for shape in call.out_shapes
    ]
    results[0] = solution.expand(call.shape)
    residuals = call.out_shapes[1] if call.name == "linalg_lstsq" else None
    if residuals is not None and 0 not in residuals:  # squares, of each right side
        ctx.couple(right)
        sums = solution.squeeze(across)
        results[1] = (sums if sums.shape == residuals else ctx.unite_dims(sums, None)).expand(residuals)
    return results


def _that_is_read(call: Call, matrix: Dep) -> Dep:
    """Of a triangular matrix its triangle, in which PyTorch's derivatives are, too."""
    if call.name != "linalg_solve_triangular":
        return matrix
    outside = int(call["unitriangular"])
    return Dep(matrix.ids.triu(outside) if call["upper"] else matrix.ids.tril(-outside), matrix.dtype)


@rule("lu_unpack")
def _lu_unpack(ctx: Context, call: Call) -> Any:
    """Both triangles; the diagonal is the second one's."""
    none = [zero_ids(shape) for shape in call.out_shapes if shape is not None]
    if not call["unpack_data"]:
        return none
    ids = call["LU_data"].ids
    size = min(ids.shape[-2:])
    return [none[0], ids.tril(-1)[..., :size], ids.triu()[..., :size, :]]


def _batches(call: Call) -> dict[str, tuple[int, ...]] | None:
    """The batch dimensions of each operand; ``None`` where they can't be told."""
    batches = {}
    for name, value in call.args.items():
        if isinstance(value, (Dep, Const)):
            shape = tuple(shape_of(value))
            depth = len(shape) - _inner(call, name)
            if depth < 0:
                return None
            batches[name] = shape[:depth]
    if len(set(batches.values())) > 1 and call.name not in _BROADCASTING:
        return None
    return batches


# Operands that are no matrices: how many dimensions of theirs are not the batch's.
_INNER = {"pivots": 1, "tau": 1, "info": 0, "atol": 0, "rtol": 0, "rcond": 0}


def _inner(call: Call, name: str) -> int:
    """Whether a right side is a vector, or one for each matrix, is told by shapes, as PyTorch has it."""
    if (call.name, name) in (("_linalg_solve_ex", "B"), ("linalg_lstsq", "b")):
        own = tuple(shape_of(call[name]))
        matrix = tuple(shape_of(call["A" if name == "B" else "self"]))
        if name == "b":
            return 1 if len(own) == len(matrix) - 1 else 2
        return 1 if len(own) == 1 or own == matrix[:-1] else 2
    return _INNER.get(name, 2)
