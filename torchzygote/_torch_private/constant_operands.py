"""Operators of one pushed operand and constants, without tangents for the constants.

PyTorch gives a constant a tangent of zeros that has no memory. A sum, a product or a quotient with it finds
its shape by a decomposition in Python, which takes ten to a hundred times as long as the operator of small
tensors; a matrix product or a convolution fills it, and multiplies by zeros. What is linear in the operand
that is pushed is applied to its value and to its tangent instead, and numbers stay numbers: the same
derivatives, digit by digit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .forward import Pushes

__all__ = ["RULES", "Operator", "Rule"]

_make_dual: Callable[..., Tensor] = torch._VF._make_dual
_aten = torch.ops.aten

_NUMBERS = frozenset((int, float))

Operator = Callable[..., Any]
Rule = Callable[[Operator, Sequence[Any], Pushes], Any]


def _with(operands: Sequence[Any], place: int, x: Any) -> list[Any]:
    given = list(operands)
    given[place] = x
    return given


# -- rules: what an operator gives, NotImplemented where it is to be called as it is -------------------------


def _with_number(right: Operator, left: Operator | None = None) -> Rule:
    """A real number and a real tensor; ``left``: the overload for one on the left, if it may stand there."""

    def rule(_: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
        if len(args) != 2:
            return NotImplemented
        x, other = args
        if type(other) in _NUMBERS and type(x) is Tensor and x.dtype.is_floating_point:
            return right(x, other)
        if (
            left is not None
            and type(x) in _NUMBERS
            and type(other) is Tensor
            and other.dtype.is_floating_point
        ):
            return left(other, x)
        return NotImplemented

    return rule


def _bilinear(operator: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
    """Linear in each of two operands."""
    pushed = pushes.only_one(args) if len(args) == 2 and args[0] is not args[1] else None
    if pushed is None:
        return NotImplemented
    y, along = (operator(*_with(args, pushed.place, x)) for x in pushed[1:])
    return _make_dual(y, along, level=0)


def _with_bias(operator: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
    """Linear in each of the first two operands, to which the third is added, if there is one."""
    has_bias = len(args) > 2 and args[2] is not None
    pushed = pushes.only_one(args[: 2 + has_bias])
    if pushed is None or pushed.place == 2:
        return NotImplemented
    y = operator(*_with(args, pushed.place, pushed.value))
    args = _with(args, 2, None) if has_bias else args
    return _make_dual(y, operator(*_with(args, pushed.place, pushed.tangent)), level=0)


def _sum(operator: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
    """A sum or a difference."""
    pushed = pushes.only_one(args) if len(args) == 2 else None
    if pushed is None:
        return NotImplemented
    y = operator(*_with(args, pushed.place, pushed.value))
    along = pushed.tangent.to(y.dtype).expand(y.shape)
    is_negative = pushed.place == 1 and operator in _DIFFERENCES
    return _make_dual(y, -along if is_negative else along.clone(), level=0)


def _quotient(operator: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
    pushed = pushes.only_one(args) if len(args) == 2 else None
    if pushed is None:
        return NotImplemented
    y = operator(*_with(args, pushed.place, pushed.value))
    if pushed.place == 0:
        return _make_dual(y, operator(pushed.tangent, args[1]), level=0)
    return _make_dual(y, -(pushed.tangent * y) / pushed.value, level=0)


def _einsum(operator: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
    """Linear in each of any number of operands, which may be given as a list."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    pushed = pushes.only_one(operands) if isinstance(equation, str) and len(operands) > 1 else None
    if pushed is None:
        return NotImplemented
    y, along = (operator(equation, *_with(operands, pushed.place, x)) for x in pushed[1:])
    return _make_dual(y, along, level=0)


def _number_or(with_number: Rule, otherwise: Rule) -> Rule:
    def rule(operator: Operator, args: Sequence[Any], pushes: Pushes) -> Any:
        y = with_number(operator, args, pushes)
        return otherwise(operator, args, pushes) if y is NotImplemented else y

    return rule


def _reciprocal_times(x: Tensor, number: Any) -> Any:
    return _aten.mul.Scalar(x.reciprocal(), number)


_DIFFERENCES = frozenset((torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__))
_TABLE: tuple[tuple[Rule, Iterable[Any]], ...] = (
    (
        _number_or(_with_number(_aten.mul.Scalar, _aten.mul.Scalar), _bilinear),
        (torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__),
    ),
    (
        _number_or(_with_number(_aten.add.Scalar, _aten.add.Scalar), _sum),
        (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
    ),
    (_number_or(_with_number(_aten.sub.Scalar), _sum), _DIFFERENCES),
    (_with_number(_aten.rsub.Scalar), (torch.rsub, Tensor.__rsub__)),
    (
        _number_or(_with_number(_aten.div.Scalar), _quotient),
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
RULES: dict[Any, Rule] = {operator: rule for rule, operators in _TABLE for operator in operators}
