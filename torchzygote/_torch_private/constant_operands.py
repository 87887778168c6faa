"""Operators of one pushed operand and constants, without tangents for the constants.

PyTorch gives a constant a tangent of zeros that has no memory. A sum, a product or a quotient with it finds
its shape by a decomposition in Python, which takes ten to a hundred times as long as the operator of small
tensors; a matrix product or a convolution fills it, and multiplies by zeros. What is linear in the operand
that is pushed is applied to its value and to its tangent instead, and numbers stay numbers: the same
derivatives, digit by digit. A function mode sees the operators under all their names, and in one thread only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch as _C_functorch
from torch.overrides import TorchFunctionMode

from .running_logsumexp import written_logcumsumexp

__all__ = ["constants_apart"]

_JVP = _C_functorch.TransformType.Jvp
_make_dual: Callable[..., Tensor] = torch._VF._make_dual
_unpack_dual: Callable[..., tuple[Tensor, Tensor | None]] = torch._VF._unpack_dual
_aten = torch.ops.aten

_PLAIN = frozenset((Tensor, nn.Parameter))
_NUMBERS = frozenset((int, float, complex))


class _Pushed(NamedTuple):
    """The one operand that has a tangent."""

    place: int
    value: Tensor
    tangent: Tensor


Operator = Callable[..., Any]
Rule = Callable[[Operator, Sequence[Any]], Any]


def _pushed_one(operands: Sequence[Any]) -> _Pushed | None:
    """The only one with a tangent of the innermost transform, where all are dense tensors.

    Not where a reverse mode runs inside, which records the operator as it is.
    """
    top = _C_functorch.peek_interpreter_stack()
    if top is None or not _PLAIN.issuperset(map(type, operands)):
        return None
    level = top.level()
    inside = [i for i, x in enumerate(operands) if _C_functorch.maybe_get_level(x) == level]
    if not inside or top.key() != _JVP or any(x.layout is not torch.strided for x in operands):
        return None
    found = None
    for place in inside:
        x = operands[place]
        value, tangent = _unpack_dual(x, level=0)
        if tangent is None:
            continue
        if found is not None or x.requires_grad:
            return None
        found = _Pushed(place, value, tangent)
    return found


def _with(operands: Sequence[Any], place: int, x: Any) -> list[Any]:
    given = list(operands)
    given[place] = x
    return given


# -- rules: what an operator gives, NotImplemented where it is to be called as it is -------------------------


def _with_number(right: Operator, left: Operator | None = None) -> Rule:
    """A number as operand; ``left``: the overload for one on the left, where the operator takes it there."""

    def rule(_: Operator, args: Sequence[Any]) -> Any:
        if len(args) != 2:
            return NotImplemented
        x, other = args
        if type(other) in _NUMBERS and type(x) is Tensor and _is_inexact(x):
            return right(x, other)
        if left is not None and type(x) in _NUMBERS and type(other) is Tensor and _is_inexact(other):
            return left(other, x)
        return NotImplemented

    return rule


def _is_inexact(x: Tensor) -> bool:
    return x.dtype.is_floating_point or x.dtype.is_complex


def _bilinear(operator: Operator, args: Sequence[Any]) -> Any:
    """Linear in each of two operands."""
    pushed = _pushed_one(args) if len(args) == 2 and args[0] is not args[1] else None
    if pushed is None:
        return NotImplemented
    y, along = (operator(*_with(args, pushed.place, x)) for x in pushed[1:])
    return _make_dual(y, along, level=0)


def _with_bias(operator: Operator, args: Sequence[Any]) -> Any:
    """Linear in each of the first two operands, to which the third is added, if there is one."""
    has_bias = len(args) > 2 and args[2] is not None
    pushed = _pushed_one(args[: 2 + has_bias])
    if pushed is None or pushed.place == 2:
        return NotImplemented
    y = operator(*_with(args, pushed.place, pushed.value))
    args = _with(args, 2, None) if has_bias else args
    return _make_dual(y, operator(*_with(args, pushed.place, pushed.tangent)), level=0)


def _sum(operator: Operator, args: Sequence[Any]) -> Any:
    """A sum or a difference."""
    pushed = _pushed_one(args) if len(args) == 2 else None
    if pushed is None:
        return NotImplemented
    y = operator(*_with(args, pushed.place, pushed.value))
    along = pushed.tangent.to(y.dtype).expand(y.shape)
    is_negative = pushed.place == 1 and operator in _DIFFERENCES
    return _make_dual(y, -along if is_negative else along.clone(), level=0)


def _quotient(operator: Operator, args: Sequence[Any]) -> Any:
    pushed = _pushed_one(args) if len(args) == 2 else None
    if pushed is None:
        return NotImplemented
    y = operator(*_with(args, pushed.place, pushed.value))
    if pushed.place == 0:
        return _make_dual(y, operator(pushed.tangent, args[1]), level=0)
    return _make_dual(y, -(pushed.tangent * y) / pushed.value, level=0)


def _einsum(operator: Operator, args: Sequence[Any]) -> Any:
    """Linear in each of any number of operands, which may be given as a list."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    pushed = _pushed_one(operands) if isinstance(equation, str) and len(operands) > 1 else None
    if pushed is None:
        return NotImplemented
    y, along = (operator(equation, *_with(operands, pushed.place, x)) for x in pushed[1:])
    return _make_dual(y, along, level=0)


def _first_of(*rules: Rule) -> Rule:
    def rule(operator: Operator, args: Sequence[Any]) -> Any:
        for one in rules:
            y = one(operator, args)
            if y is not NotImplemented:
                return y
        return NotImplemented

    return rule


def _reciprocal_times(x: Tensor, number: Any) -> Any:
    return _aten.mul.Scalar(x.reciprocal(), number)


_DIFFERENCES = frozenset((torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__))
_TABLE: tuple[tuple[Rule, Iterable[Any]], ...] = (
    (
        _first_of(_with_number(_aten.mul.Scalar, _aten.mul.Scalar), _bilinear),
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__),
    ),
    (
        _first_of(_with_number(_aten.add.Scalar, _aten.add.Scalar), _sum),
        (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
    ),
    (_first_of(_with_number(_aten.sub.Scalar), _sum), _DIFFERENCES),
    (_with_number(_aten.rsub.Scalar), (torch.rsub, Tensor.__rsub__)),
    (
        _first_of(_with_number(_aten.div.Scalar), _quotient),
        (torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide)
        + (Tensor.__div__, Tensor.__truediv__),
    ),
    (_with_number(_reciprocal_times), (Tensor.__rdiv__, Tensor.__rtruediv__)),
    (_with_number(_aten.mul_.Scalar), (Tensor.mul_, Tensor.multiply_, Tensor.__imul__)),
    (_with_number(_aten.add_.Scalar), (Tensor.add_, Tensor.__iadd__)),
    (_with_number(_aten.sub_.Scalar), (Tensor.sub_, Tensor.subtract_, Tensor.__isub__)),
    (_with_number(_aten.div_.Scalar), (Tensor.div_, Tensor.divide_, Tensor.__idiv__, Tensor.__itruediv__)),
    (
        _bilinear,
        (torch.matmul, torch.mm, torch.bmm, torch.mv, torch.dot, torch.outer, torch.ger, torch.inner)
        + (
            Tensor.matmul,
            Tensor.mm,
            Tensor.bmm,
            Tensor.mv,
            Tensor.dot,
            Tensor.outer,
            Tensor.ger,
            Tensor.inner,
        )
        + (Tensor.__matmul__, Tensor.__rmatmul__, torch.kron, Tensor.kron),
    ),
    (
        _with_bias,
        (nn.functional.linear, torch.conv1d, torch.conv2d, torch.conv3d)
        + (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    ),
    (_einsum, (torch.einsum,)),
)
_RUNNING = frozenset((torch.logcumsumexp, Tensor.logcumsumexp))
_RULES: dict[Any, Rule] = {operator: rule for rule, operators in _TABLE for operator in operators}


class _Apart(TorchFunctionMode):
    """Applies the rules, and writes out what is pushed wrong."""

    def __torch_function__(
        self, func: Operator, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not torch.compiler.is_compiling():  # a compiled function, which knows what is constant
            if func in _RUNNING:
                y = written_logcumsumexp(func, args, kwargs)
            else:
                rule = None if kwargs else _RULES.get(func)
                y = NotImplemented if rule is None else rule(func, args)
            if y is not NotImplemented:
                return y
        return func(*args, **(kwargs or {}))


def constants_apart() -> contextlib.AbstractContextManager[Any]:
    """Around a function that is pushed forward."""
    return _Apart()
