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
from .forward import Pushes
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
    before, after = y[..., :-1], y[..., 1:]
    finite = torch.where(y.isinf(), 0.0, y)  # a difference of infinities would be NaN
    grown = (finite[..., :-1] - finite[..., 1:]).exp()
    grown = torch.where(after == torch.inf, (before == torch.inf).to(y.dtype), grown)
    grown = torch.where(before == -torch.inf, 0.0, grown)
    return torch.cat([torch.zeros_like(y[..., :1]), grown], -1)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def pulled_by_formula(node: Any, cotangent: Tensor) -> Tensor | None:
    """What the ``node`` of a ``logcumsumexp`` gives for a cotangent; ``None`` leaves it to PyTorch."""
    try:
        x, y, dim = node._saved_self, node._saved_result, signed(node._saved_dim)
    except RuntimeError:  # a checkpoint shows what was saved once, and the node has seen it
        if bool((cotangent == 0).any()):
            raise RuntimeError(
                "f can't be differentiated twice: PyTorch's derivative of logcumsumexp's gradient is wrong "
                "where a cotangent is zero, and what a checkpoint saved is shown once only, so that nothing "
                "can stand in for it; leave logcumsumexp out of the checkpoint"
            ) from None
        return None
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

    The operator runs too, and refuses what it refuses.
    """
    given = dict(kwargs or {})
    x = args[0] if args else given.get("input", given.get("self"))
    dim: Any = args[1] if len(args) > 1 else given.get("dim")
    if type(x) is not Tensor or not x.is_floating_point() or not is_wrapped(x) or "out" in given:
        return NotImplemented
    value = operator(*args, **given)
    if x.dim() == 0 or x.numel() == 0:
        return value
    pushed = Pushes().only_one((x,))
    if pushed is None:
        return _by_formula(x, dim)
    below = pushed.value  # other levels may differentiate that
    y = _by_formula(below, dim) if is_wrapped(below) else operator(below, dim)
    return torch._VF._make_dual(y, _pushed_along(below, y, pushed.tangent, dim), level=0)


def _pushed_along(x: Tensor, y: Tensor, xdot: Tensor, dim: int) -> Tensor:
    x, y, along = (_wide(t).movedim(dim, -1) for t in (x, y, xdot))
    shares = (x - torch.where(y == -torch.inf, 0.0, y)).exp()
    return _running(shares * along, _steps(y)).movedim(-1, dim).to(xdot.dtype)


def _by_formula(x: Tensor, dim: int) -> Tensor:
    """The largest so far are constants: what is multiplied by their exponentials is divided by them."""
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
