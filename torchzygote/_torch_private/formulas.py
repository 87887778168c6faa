"""Linear algebra by formulas, where what forward mode gives is going to be differentiated itself.

PyTorch's forward derivatives of these operators use saved decompositions as constants: to differentiate them
gives wrong numbers, silently (2.13). Those of LU decompositions and of triangular systems, by which they are
written here, are right. A function mode sees them under all their names, and in one thread only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .wrappers import is_wrapped

__all__ = ["are_formulas_pushed", "pushed_by_formulas"]


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Permutation, lower and upper triangle; ``torch.linalg.lu`` has no batching rule."""
    lu, pivots, _ = torch.linalg.lu_factor_ex(matrix)
    found: tuple[Tensor, Tensor, Tensor] = torch.lu_unpack(lu, pivots)
    return found


def _solve(_: Any, matrix: Tensor, right: Tensor, *, left: bool = True, check_errors: bool = False) -> Tensor:
    if not left:
        return _solve(_, matrix.mT, right.mT).mT
    is_vector = right.dim() == 1 or right.shape == matrix.shape[:-1]
    permutation, lower, upper = _decomposed(matrix)
    y: Tensor = permutation.mT @ (right.unsqueeze(-1) if is_vector else right)
    y = torch.linalg.solve_triangular(lower, y, upper=False, unitriangular=True)
    y = torch.linalg.solve_triangular(upper, y, upper=True)
    return y.squeeze(-1) if is_vector else y


def _solve_ex(given: Any, matrix: Tensor, right: Tensor, **options: bool) -> Any:
    return type(given)((_solve(given, matrix, right, **options), given[1]))


def _tensorsolve(given: Tensor, tensor: Tensor, right: Tensor, dims: Any = None) -> Tensor:
    if dims is not None:
        tensor = tensor.movedim(tuple(dims), tuple(range(-len(dims), 0)))
    n = right.numel()
    return _solve(given, tensor.reshape(n, n), right.reshape(n)).reshape(given.shape)


def _det(_: Any, matrix: Tensor) -> Tensor:
    permutation, _, upper = _decomposed(matrix)
    found: Tensor = torch.linalg.det(permutation) * upper.diagonal(dim1=-2, dim2=-1).prod(-1)
    return found


def _sign_and_log(matrix: Tensor) -> tuple[Tensor, Tensor]:
    permutation, _, upper = _decomposed(matrix)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    if diagonal.is_complex():
        signs, logs = _complex_signs_and_logs(diagonal)
    else:
        signs, logs = diagonal.sgn(), diagonal.abs().log()
    return torch.linalg.det(permutation) * signs.prod(-1), logs.sum(-1)


def _complex_signs_and_logs(z: Tensor) -> tuple[Tensor, Tensor]:
    """``z.sgn()`` and ``z.abs().log()``: derivatives of complex ``sgn`` can't be differentiated (2.13)."""
    size = z.detach().abs()  # as a unit, so that squares neither overflow nor vanish; none of it matters
    is_zero = size == 0
    unit = z / size.masked_fill(is_zero, 1.0)
    square = unit.real.square() + unit.imag.square()
    logs = square.log() / 2 + size.masked_fill(is_zero, 1.0).log()
    return unit * square.masked_fill(is_zero, 1.0).rsqrt(), logs


def _slogdet(given: Any, matrix: Tensor) -> Any:
    return type(given)(_sign_and_log(matrix))


def _logdet(_: Any, matrix: Tensor) -> Tensor:
    sign, log = _sign_and_log(matrix)
    return sign.log() + log


def _householder_product(given: Tensor, vectors: Tensor, tau: Tensor) -> Tensor:
    rows, columns = vectors.shape[-2:]
    eye = torch.eye(rows, columns, dtype=vectors.dtype, device=vectors.device)
    vectors = vectors.tril(-1) + eye
    product = eye.expand(given.shape)
    for i in reversed(range(tau.shape[-1])):
        v = vectors[..., i : i + 1]
        product = product - tau[..., i, None, None] * v @ (v.mH @ product)
    return product


def _select_scatter(given: Tensor, x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    size = x.shape[dim]
    mask = torch.arange(size, device=x.device) == index % size
    mask = mask.view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    return torch.where(mask, src.to(x.dtype).unsqueeze(dim), x)


def _laid_out(y: Tensor, given: Tensor) -> Tensor:
    """``y`` in memory as the operator has it, for code that takes views."""
    if y.stride() == given.stride():
        return y
    order = sorted(range(y.dim()), key=given.stride, reverse=True)
    return y.permute(order).contiguous().permute(sorted(range(y.dim()), key=order.__getitem__))


# Each is given what the operator returned, then its arguments.
_FORMULAS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    **dict.fromkeys((torch.linalg.det, torch.det, Tensor.det), _det),
    **dict.fromkeys((torch.linalg.slogdet, torch.slogdet, Tensor.slogdet), _slogdet),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
    **dict.fromkeys((torch.linalg.householder_product, torch.orgqr, Tensor.orgqr), _householder_product),
    **dict.fromkeys((torch.select_scatter, Tensor.select_scatter), _select_scatter),
}
# What the operators call their first two parameters.
_FIRST, _SECOND = ("A", "input", "self"), ("B", "other", "tau", "input2", "src")


class _ByFormulas(TorchFunctionMode):
    """Takes the formulas; the operators run too, and refuse what they refuse."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        found = func(*args, **given)
        formula = _FORMULAS.get(func)
        if formula is None or not any(
            isinstance(x, Tensor) and is_wrapped(x) for x in (*args, *given.values())
        ):
            return found
        named = [given.pop(name) for names in (_FIRST, _SECOND) for name in names if name in given]
        y = formula(found, *args, *named, **given)
        if isinstance(y, Tensor):
            return _laid_out(y, found)
        return type(found)(map(_laid_out, y, found))


def pushed_by_formulas() -> contextlib.AbstractContextManager[Any]:
    """Around a function that is pushed forward, where the result is going to be differentiated."""
    return _ByFormulas()


def are_formulas_pushed() -> bool:
    """Whether :func:`pushed_by_formulas` is around."""
    stack: list[Any] = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return any(isinstance(mode, _ByFormulas) for mode in stack)
