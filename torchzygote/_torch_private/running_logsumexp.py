"""``torch.logcumsumexp``, by formulas that can be differentiated again and in forward mode.

PyTorch's backward takes logarithms of the cotangent's parts, so that its own derivative is NaN where a
cotangent is zero; the pass after that takes what is NaN for zero, silently. Its forward derivative of numbers
that are some tens apart is wrong, without a word (2.13). Both are running sums here, each element of which is
multiplied on the way by factors of at most 1. Complex numbers are left to PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .exchanges import Exchange
from .nodes import signed
from .wrappers import is_wrapped

__all__ = ["TRACED_RUNNING", "pulled_by_formula", "written_logcumsumexp"]


def _running(terms: Tensor, factors: Tensor) -> Tensor:
    """``s[i] = terms[i] + factors[i] * s[i - 1]`` along the last axis, by doubling; ``factors[0]`` is 0."""
    step, size = 1, terms.shape[-1]
    while step < size:
        ahead, behind = terms[..., step:], terms[..., :-step]
        terms = torch.cat([terms[..., :step], ahead + factors[..., step:] * behind], -1)
        factors = torch.cat(
            [torch.zeros_like(factors[..., :step]), factors[..., step:] * factors[..., :-step]], -1
        )
        step *= 2
    return terms


def _steps(y: Tensor) -> Tensor:
    """``exp(y[i - 1] - y[i])`` along the last axis, where ``y`` doesn't fall; 0 for the first."""
    nothing = y == -torch.inf
    y = torch.where(nothing, 0.0, y)  # a difference of infinities would be NaN
    grown = torch.where(nothing[..., :-1], 0.0, (y[..., :-1] - y[..., 1:]).exp())
    return torch.cat([torch.zeros_like(y[..., :1]), grown], -1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def pulled_by_formula(node: Any, cotangent: Tensor) -> Tensor | None:
    """What the ``node`` of a ``logcumsumexp`` gives for a cotangent; ``None`` leaves it to PyTorch."""
    x, y, dim = node._saved_self, node._saved_result, signed(node._saved_dim)
    if x.is_complex() or x.dim() == 0 or x.shape[dim] == 0:
        return None
    x, y, above = (_wide(t).movedim(dim, -1) for t in (x, y, cotangent))
    # exp(y[i] - y[i + 1]) from the end on
    factors = torch.cat([_steps(y)[..., 1:], torch.zeros_like(y[..., :1])], -1)
    total = _running(above.flip(-1), factors.flip(-1)).flip(-1)
    below = (x - torch.where(y == -torch.inf, 0.0, y)).exp() * total
    return below.movedim(-1, dim).to(cotangent.dtype)


def written_logcumsumexp(operator: Any, args: Any, kwargs: Any) -> Any:
    """``logcumsumexp`` of what is pushed forward, or ``NotImplemented``, where the operator may stay.

    The operator runs too, and refuses what it refuses. The largest so far are constants: what is multiplied
    by their exponentials is divided by them.
    """
    given = dict(kwargs or {})
    x = args[0] if args else given.get("input", given.get("self"))
    dim: Any = args[1] if len(args) > 1 else given.get("dim")
    if (
        type(x) is not Tensor
        or not x.is_floating_point()
        or not is_wrapped(x)
        or given.get("out") is not None
    ):
        return NotImplemented
    value = operator(*args, **given)
    return value if x.dim() == 0 or x.numel() == 0 else _by_formula(x, dim)


def _by_formula(x: Tensor, dim: int) -> Tensor:
    moved = _wide(x).movedim(dim, -1)
    largest = moved.detach().cummax(-1).values
    nothing = largest == -torch.inf
    terms = (moved - torch.where(nothing, 0.0, largest)).exp()
    total = _running(terms, _steps(largest))
    logs = largest + torch.where(nothing, 1.0, total).log()
    return logs.movedim(-1, dim).to(x.dtype)


_logcumsumexp: Any = torch.logcumsumexp


def _traced_logcumsumexp(input: Tensor, dim: int, *, out: Tensor | None = None) -> Tensor:
    if out is not None or not input.is_floating_point() or input.dim() == 0 or input.numel() == 0:
        return _logcumsumexp(input, dim, out=out)  # type: ignore[no-any-return]
    return _by_formula(input, dim)


# While a function is traced, which follows no function mode; the method of a tensor can't be exchanged.
TRACED_RUNNING = (Exchange(torch, "logcumsumexp", _logcumsumexp, _traced_logcumsumexp),)
