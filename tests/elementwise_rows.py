"""Elementwise operators as rows of the table in test_sparsity_rules.py, and what other rows are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Row(NamedTuple):
    """A function of one tensor; exact: the pattern lists nothing else, to first (1) and second order (2)."""

    name: str
    f: Callable[[Tensor], Tensor]
    shape: tuple[int, ...]
    exact: str = "12"
    low: float = 0.3
    high: float = 0.9
    orders: int = 2


A = torch.linspace(-1, 1, 24, dtype=torch.float64)
POWERS = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5], [1.0, 0.0, 0.0, 3.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([True, False, True, True, False, False])


def halves(f: Callable[..., Any]) -> Callable[[Tensor], Any]:
    """A function of two operands as one of their concatenation."""
    return lambda x: f(x[: x.shape[0] // 2], x[x.shape[0] // 2 :])


def thirds(f: Callable[..., Any]) -> Callable[[Tensor], Any]:
    return lambda x: f(*x.chunk(3))


SMOOTH = """
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sin cos tan asin acos atan sinh cosh tanh
    asinh atanh sigmoid erf erfc erfinv lgamma digamma sinc logit i0
"""
CURVED = "gelu silu mish elu celu selu softplus logsigmoid hardswish tanhshrink softsign"
UNARY = {name: getattr(torch, name) for name in SMOOTH.split()}
ACTIVATIONS = {name: getattr(F, name) for name in CURVED.split()}
LINEAR_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": torch.neg,
    "abs": torch.abs,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "softshrink": lambda x: F.softshrink(x, 0.1),
    "hardshrink": lambda x: F.hardshrink(x, 0.1),
    "threshold": lambda x: F.threshold(x, 0.1, 2.0),
    "clamp": lambda x: x.clamp(0.1, 5),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "frac": torch.frac,
    "nan_to_num": torch.nan_to_num,
    "deg2rad": torch.deg2rad,
    "to float32": lambda x: x.float().double(),
    "clone": torch.clone,
    "remainder by a number": lambda x: x % 0.7,
    "fmod by a number": lambda x: torch.fmod(x, 0.7),
    "copysign": lambda x: torch.copysign(x, A[:4]),
    "nextafter": lambda x: torch.nextafter(x, x.flip(0)),
    "frexp": lambda x: torch.frexp(x)[0],
    "ldexp by integers": lambda x: torch.ldexp(x, torch.tensor([1, 2, 0, 3])),
    "fill": lambda x: torch.zeros(4, dtype=x.dtype).fill_(x[1]),
}
FLAT = {
    "sign": torch.sign,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "round": torch.round,
    "trunc": torch.trunc,
    "zeros_like": torch.zeros_like,
    "ones_like": torch.ones_like,
    "new_zeros": lambda x: x.new_zeros(4),
    "comparison": lambda x: (x > 0.5).to(x.dtype),
    "argmax": lambda x: x.argmax().to(x.dtype),
    "pow 0": lambda x: x**0,
    "sgn": torch.sgn,
}

ELEMENTWISE = [
    *(Row(name, f, (4,)) for name, f in UNARY.items()),
    Row("acosh", torch.acosh, (4,), low=1.2, high=2.0),
    *(Row(name, f, (4,), low=-0.9, high=-0.2) for name, f in ACTIVATIONS.items()),
    *(Row(name, f, (4,)) for name, f in LINEAR_UNARY.items()),
    *(Row(name, f, (4,)) for name, f in FLAT.items()),
    Row("hardsigmoid", F.hardsigmoid, (4,), orders=1),
    Row("polygamma", lambda x: torch.polygamma(1, x), (4,)),
    Row("polygamma in place", lambda x: x.clone().polygamma_(1), (4,)),
    Row("erfcx", torch.special.erfcx, (4,), exact="1"),
    Row("entr", torch.special.entr, (4,)),
    Row("ndtr", torch.special.ndtr, (4,)),
    Row("pow 2", lambda x: x**2, (4,)),
    Row("pow 1", lambda x: x**1, (4,)),
    Row("pow 2.5", lambda x: x**2.5, (4,)),
    Row("number to a power", lambda x: 2**x, (4,)),
    Row("pow", halves(torch.pow), (4,)),
    Row("pow by constants", lambda x: x**POWERS, (2, 5)),
    Row("pow by constants, repeated", lambda x: x.float_power(POWERS), (5,)),
    Row("pow by constants in place", lambda x: (x * 2).pow_(POWERS), (2, 5)),
    Row("products of powers", lambda x: (x**POWERS).prod(1), (5,)),
    Row("add", halves(torch.add), (4,)),
    Row("sub", halves(torch.sub), (4,)),
    Row("rsub", lambda x: 1 - x, (4,)),
    Row("mul", halves(torch.mul), (4,)),
    Row("mul by itself", lambda x: x * x, (4,)),
    Row("mul by a number", lambda x: 3 * x, (4,)),
    Row("mul by a constant with zeros", lambda x: x * torch.tensor([0.0, 1, 0, 2]), (4,)),
    Row("div", halves(torch.div), (4,)),
    Row("div of a number", lambda x: 1 / x, (4,)),
    Row("div by a number", lambda x: x / 3, (4,)),
    Row("atan2", halves(torch.atan2), (4,)),
    Row("hypot", halves(torch.hypot), (4,)),
    Row("ldexp", halves(torch.ldexp), (4,)),
    Row("glu", lambda x: F.glu(x, 1), (2, 4)),
    Row("glu of both halves", lambda x: F.glu(x, 0) ** 2, (4, 2)),
    Row("logaddexp", halves(torch.logaddexp), (4,)),
    Row("logaddexp2", halves(torch.logaddexp2), (4,)),
    Row("xlogy", halves(torch.xlogy), (4,)),
    Row("xlog1py", halves(torch.special.xlog1py), (4,)),
    Row("maximum", halves(torch.maximum), (4,), exact=""),
    Row("minimum", halves(torch.minimum), (4,), exact=""),
    Row("fmax", halves(torch.fmax), (4,), exact=""),
    Row("lerp by a number", halves(lambda a, b: torch.lerp(a, b, 0.3)), (4,)),
    Row("lerp", thirds(torch.lerp), (6,)),
    Row("addcmul", thirds(torch.addcmul), (6,)),
    Row("addcdiv", thirds(torch.addcdiv), (6,)),
    Row("prelu", lambda x: F.prelu(-x[1:], x[:1]), (5,)),
    Row("broadcasting", lambda x: x[:2, None] * x[None, 2:], (5,)),
    Row("where, the condition constant", lambda x: torch.where(MASK, x, x.flip(0) ** 2), (6,), exact="1"),
    Row("where, the condition computed", lambda x: torch.where(x > 0.6, x, x.flip(0) ** 2), (6,), exact=""),
    Row("masked_fill", lambda x: x.masked_fill(MASK, 1.0) ** 2, (6,)),
    Row("masked_fill by a tensor", lambda x: (x * 1).masked_fill(MASK, x[0]), (6,)),
]
