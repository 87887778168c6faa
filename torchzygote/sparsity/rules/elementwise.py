"""Operators that act element by element, with broadcasting: a table of which operands they couple.

A coupling is a pair of letters for two operands by their position in the schema, ``a`` the first: ``mul`` is
``"ab"``, since only the mixed second derivative is nonzero; ``exp`` is ``"aa"``; ``add`` has none.
"""

from __future__ import annotations

from typing import Any

import torch

from .._trace import Const
from ._table import RULES, Call, Context, Dep, Rule, rule, zero_ids

__all__ = ["active_couplings"]

_LINEAR = """
    neg positive relu relu6 clamp clamp_min clamp_max threshold hardtanh hardshrink softshrink leaky_relu
    hardsigmoid conj_physical _conj_physical resolve_conj resolve_neg _to_copy clone alias_copy detach_copy
    frac nan_to_num deg2rad rad2deg rrelu_with_noise native_dropout _fused_dropout
    add sub rsub maximum minimum fmax fmin fmod remainder copysign nextafter frexp complex copy fill
    threshold_backward hardtanh_backward leaky_relu_backward hardsigmoid_backward hardshrink_backward
    softshrink_backward rrelu_with_noise_backward native_dropout_backward _masked_scale
"""

_CURVED = """
    exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal square sin cos tan asin acos atan sinh cosh tanh
    asinh acosh atanh sigmoid erf erfc erfinv lgamma digamma mvlgamma sinc logit angle
    gelu silu mish elu celu selu softplus hardswish log_sigmoid_forward special_entr special_erfcx
    special_i0 special_i0e special_i1 special_i1e special_ndtri special_log_ndtr i0
    special_bessel_j0
    special_bessel_j1 special_bessel_y0 special_bessel_y1 special_modified_bessel_i0
    special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1
    special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_airy_ai
    special_spherical_bessel_j0
"""

# The derivative is zero wherever it exists.
_ZERO = """
    sign floor ceil round trunc floor_divide heaviside zeros_like ones_like empty_like full_like rand_like
    randn_like randint_like new_zeros new_ones new_empty new_full new_empty_strided bernoulli normal uniform
    exponential cauchy log_normal geometric poisson binomial zero
"""

# Operands by position. Backward formulas take the incoming gradient first, and are linear in it.
_COUPLINGS = {
    "div": "ab bb",
    "pow": "aa ab bb",
    "float_power": "aa ab bb",
    "atan2": "aa ab bb",
    "hypot": "aa ab bb",
    "ldexp": "ab bb",
    "logaddexp": "aa ab bb",
    "logaddexp2": "aa ab bb",
    "xlogy": "ab bb",
    "special_xlog1py": "ab bb",
    "special_zeta": "aa ab bb",
    "polar": "ab bb",
    "_prelu_kernel": "ab",
    "lerp": "ac bc",
    "addcmul": "bc",
    "addcdiv": "bc cc",
    "polygamma": "aa bb",  # the order is the second operand, in place the first
    "special_polygamma": "bb",
    "igamma": "aa ab bb",
    "igammac": "aa ab bb",
    "tanh_backward": "ab bb",
    "sigmoid_backward": "ab bb",
    "hardswish_backward": "ab",
    "gelu_backward": "ab bb",
    "silu_backward": "ab bb",
    "mish_backward": "ab bb",
    "elu_backward": "af ff",
    "softplus_backward": "ab bb",
    "log_sigmoid_backward": "ab bb",
    "logit_backward": "ab bb",
    "binary_cross_entropy_backward": "ab ac bb bc",
    "_prelu_kernel_backward": "ab ac",
}


# Only these operands carry a derivative; the others choose a branch or a sign.
_FLOWS = {
    "copysign": "a",
    "nextafter": "a",
    "threshold_backward": "a",
    "hardtanh_backward": "a",
    "leaky_relu_backward": "a",
    "hardsigmoid_backward": "a",
    "hardshrink_backward": "a",
    "softshrink_backward": "a",
    "rrelu_with_noise_backward": "a",
    "native_dropout_backward": "a",
    "_masked_scale": "a",
}


def _elementwise(ctx: Context, call: Call) -> Any:
    for first, second in active_couplings(call.name, list(call.args.values())):
        ctx.couple(first.ids, second.ids if second is not first else None)
    if not ctx.wanted:
        return None
    if call.args.get("rounding_mode") is not None or (call.name == "pow" and call["exponent"] == 0):
        return zero_ids(call.shape)
    values = list(call.args.values())
    if call.name in _FLOWS:
        values = [values[ord(letter) - ord("a")] for letter in _FLOWS[call.name]]
    ids = ctx.unite(zero_ids(call.shape), *[ctx.ids(value) for value in values if _is_tensor(value)])
    return [ids] * max(1, len(call.outs))


def _sgn(ctx: Context, call: Call) -> Any:
    """A complex number by its absolute value; the sign of a real one, which is flat."""
    return _elementwise(ctx, call) if call["self"].dtype.is_complex else zero_ids(call.shape)


@rule("mul", curvature="ab")
def _mul(ctx: Context, call: Call) -> Any:
    """The product rule; what is multiplied by a constant zero is gone."""
    a, b = call["self"], call["other"]
    if isinstance(a, Dep) and isinstance(b, Dep):
        ctx.couple(a.ids, None if a is b else b.ids)
        return ctx.unite(a.ids, b.ids) if ctx.wanted else None
    varying, constant = (a, b) if isinstance(a, Dep) else (b, a)
    if isinstance(constant, Const) and constant.fixed and constant.tensor.dim() > 0:
        zero = constant.tensor.detach().cpu() == 0
        if bool(zero.any()):
            return torch.where(zero, zero_ids(), ctx.ids(varying))
    return ctx.unite(ctx.ids(a), ctx.ids(b))


def _pow(ctx: Context, call: Call) -> Any:
    """Where the exponent is zero in every call the power is one; where it is one, nothing is curved."""
    base, exponent = call["self"], call["exponent"]
    if isinstance(base, Dep) and isinstance(exponent, Const) and exponent.fixed and exponent.tensor.dim() > 0:
        power = exponent.tensor.detach().cpu()
        if bool(((power == 0) | (power == 1)).any()):
            ids = torch.where(power == 0, zero_ids(), base.ids)
            ctx.couple(torch.where(power == 1, zero_ids(), ids))
            return ids
    return _elementwise(ctx, call)


@rule("glu", curvature="curved")
def _glu(ctx: Context, call: Call) -> Any:
    """The first half times a function of the second."""
    a, gate = call["self"].ids.chunk(2, call["dim"])
    ctx.couple(a, gate)
    ctx.couple(gate)
    return ctx.unite(a, gate)


@rule("glu_backward", curvature="curved")
def _glu_backward(ctx: Context, call: Call) -> Any:
    grad = ctx.ids(call["grad_output"])
    a, gate = ctx.ids(call["self"]).chunk(2, call["dim"])
    for first, second in ((grad, a), (grad, gate), (a, gate)):
        ctx.couple(first, second)
    ctx.couple(gate)
    by_a = ctx.unite(grad, gate)
    return torch.cat([by_a, ctx.unite(by_a, a)], call["dim"])


@rule("where")
def _where(ctx: Context, call: Call) -> Any:
    """Both branches, unless the condition is the same in every call."""
    condition = call["condition"]
    a, b = ctx.ids(call["self"]), ctx.ids(call["other"])
    if isinstance(condition, Const) and condition.fixed:
        return torch.where(condition.tensor.cpu(), a, b)
    return ctx.unite(zero_ids(call.shape), a, b)


@rule("masked_fill")
def _masked_fill(ctx: Context, call: Call) -> Any:
    mask, kept, value = call["mask"], ctx.ids(call["self"]), ctx.ids(call["value"])
    if isinstance(mask, Const) and mask.fixed:
        return torch.where(mask.tensor.cpu(), value, kept)
    return ctx.unite(zero_ids(call.shape), kept, value)


def _zero(ctx: Context, call: Call) -> Any:
    return zero_ids(call.shape)


def active_couplings(name: str, operands: list[Any]) -> list[tuple[Any, Any]]:
    """Which operands of an elementwise operator are coupled, constants left out."""
    if name in ("abs", "sgn") and operands[0].dtype.is_complex:
        return [(operands[0], operands[0])]
    if name == "pow" and isinstance(operands[1], (int, float)) and operands[1] in (0, 1):
        return []
    if name == "div" and operands[-1] in ("floor", "trunc"):
        return []
    pairs = "ab" if name == "mul" else _COUPLINGS.get(name, "aa" if name in _CURVED_NAMES else "")
    found = []
    for pair in pairs.split():
        positions = tuple(ord(letter) - ord("a") for letter in pair)
        if max(positions) < len(operands):
            a, b = (operands[p] for p in positions)
            if _is_dependent(a) and _is_dependent(b):
                found.append((a, b))
    return found


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Dep, Const))


def _is_dependent(value: Any) -> bool:
    return value is not None and not isinstance(value, (Const, int, float, complex, bool, str, list))


_CURVED_NAMES = frozenset(_CURVED.split())

for _name in _LINEAR.split():
    RULES[_name] = Rule(_elementwise, "")
for _name in _CURVED_NAMES:
    RULES[_name] = Rule(_elementwise, "aa")
for _name, _pairs in _COUPLINGS.items():
    RULES[_name] = Rule(_elementwise, _pairs)
for _name in _ZERO.split():
    RULES[_name] = Rule(_zero)
for _name in ("pow", "float_power"):
    RULES[_name] = Rule(_pow, _COUPLINGS[_name])
RULES["abs"] = Rule(_elementwise, "")
RULES["sgn"] = Rule(_sgn, "")
