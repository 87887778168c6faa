"""Binary operators on many tensors: what multi-tensor call each one is.

Knows nothing of which tensors can go together.
"""

from __future__ import annotations

import cmath
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NEGATIVE", "OPERATORS", "REFLECTED", "Number", "Operator"]

Number = int | float | complex


class Operator(NamedTuple):
    """A binary operator: for one tensor, for many, for many in place."""

    symbol: str
    one: Callable[[Any, Any], Any]
    many: Callable[[list[Tensor], Any], Sequence[Tensor]]
    many_: Callable[[list[Tensor], Any], None] | None


def _subtract(xs: list[Tensor], right: Any) -> Sequence[Tensor]:
    if isinstance(right, Tensor):
        return torch._foreach_add(xs, right, alpha=-1)
    return torch._foreach_sub(xs, right)


def _subtract_(xs: list[Tensor], right: Any) -> None:
    if isinstance(right, Tensor):
        torch._foreach_add_(xs, right, alpha=-1)
    else:
        torch._foreach_sub_(xs, right)


def _multiply_(xs: list[Tensor], right: Any) -> None:
    if isinstance(right, (int, float)) and xs[0].dtype in _HALVES and xs[0].device.type == "cpu":
        # PyTorch rounds the number to this dtype first, here alone (2.13).
        right = torch.tensor(float(right), dtype=torch.float64, device="cpu").to(torch.float32)
    torch._foreach_mul_(xs, right)


def _power(xs: list[Tensor], right: Any) -> Sequence[Tensor]:
    return torch._foreach_pow(xs, [right] * len(xs) if isinstance(right, Tensor) else right)


def _power_(xs: list[Tensor], right: Any) -> None:
    torch._foreach_pow_(xs, [right] * len(xs) if isinstance(right, Tensor) else right)


# Where the multi-tensor calls below compute in what the ordinary operators compute in: not in integers, which
# a number may exceed.
_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_HALVES = (torch.float16, torch.bfloat16)
_LARGEST = torch.finfo(torch.float32).max


def _fits(x: Tensor, left: Any) -> bool:
    """Whether the multi-tensor calls below take this before values like ``x``."""
    if x.dtype in _HALVES:  # computed in float32 on a GPU, where a larger number is an error
        return isinstance(left, Tensor) or (
            not isinstance(left, complex) and (abs(left) <= _LARGEST or not cmath.isfinite(left))
        )
    return x.dtype in _WIDE


def _subtract_from(xs: list[Tensor], left: Any) -> Sequence[Tensor]:
    if not _fits(xs[0], left) or _spoils(xs[0], left):
        return [left - x for x in xs]
    return torch._foreach_add(torch._foreach_neg(xs), left)


def _spoils(x: Tensor, number: Any) -> bool:
    """Whether the multi-tensor sum of values like ``x`` and this makes NaN of the other part, too."""
    if isinstance(number, Tensor) or cmath.isfinite(number):
        return False
    return x.is_complex() or isinstance(number, complex)


def _divide_into(xs: list[Tensor], left: Any) -> Sequence[Tensor]:
    if not _fits(xs[0], left):
        return [left / x for x in xs]
    if not isinstance(left, Tensor):
        if xs[0].dtype in _HALVES:  # as the ordinary operator does, without the number in this dtype
            return torch._foreach_mul(torch._foreach_reciprocal(xs), left)
        left = _filled(left, xs[0])
    return torch._foreach_div([left] * len(xs), xs)


def _filled(number: Number, x: Tensor) -> Tensor:
    """A number as a 0-dim tensor beside ``x``, infinite where it is too large."""
    dtype = x.dtype
    if isinstance(number, complex):
        dtype = torch.promote_types(dtype, torch.complex32)
    else:
        number = float(number)
    try:
        return torch.full((), number, dtype=dtype, device=x.device)
    except RuntimeError:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.full((), number, dtype=wide, device=x.device).to(dtype)


def _raise_to(xs: list[Tensor], left: Any) -> Sequence[Tensor]:
    if not _fits(xs[0], left):
        return [left**x for x in xs]
    if isinstance(left, Tensor):
        return torch._foreach_pow([left] * len(xs), xs)
    if xs[0].dtype in _HALVES:  # the ordinary operator rounds the number
        left = torch.tensor(float(left), dtype=xs[0].dtype, device="cpu").item()
    return torch._foreach_pow(left, xs)


OPERATORS = {
    "+": Operator("+", operator.add, torch._foreach_add, torch._foreach_add_),
    "-": Operator("-", operator.sub, _subtract, _subtract_),
    "*": Operator("*", operator.mul, torch._foreach_mul, _multiply_),
    "/": Operator("/", operator.truediv, torch._foreach_div, torch._foreach_div_),
    "**": Operator("**", operator.pow, _power, _power_),
}
NEGATIVE = Operator("-", lambda x, _: -x, lambda xs, _: torch._foreach_neg(xs), None)
REFLECTED = {
    "+": Operator("+", lambda x, n: n + x, torch._foreach_add, None),
    "-": Operator("-", lambda x, n: n - x, _subtract_from, None),
    "*": Operator("*", lambda x, n: n * x, torch._foreach_mul, None),
    "/": Operator("/", lambda x, n: n / x, _divide_into, None),
    "**": Operator("**", lambda x, n: n**x, _raise_to, None),
}
