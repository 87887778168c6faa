"""Values on their way into and out of a Buffer: dtype rules, shapes that fit, snapshots.

Knows nothing of where a value is kept.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .._arguments import numpy_to_tensor, type_name
from .._filling import filled_in
from .._torch_private import (
    batched_everywhere,
    in_plain_eager,
    innermost_level,
    is_view,
    no_torch_function,
    object_holders,
)
from .refusal import NotATensor

__all__ = [
    "TEMPORARY",
    "DoesNotBroadcast",
    "as_value",
    "fit",
    "is_plain",
    "is_unshared_result",
    "like_no_row",
    "recorded",
    "snapshot",
    "value_read",
]


class DoesNotBroadcast(ValueError, RuntimeError):
    """A ``ValueError``, as for every shape that doesn't fit; a ``RuntimeError``, as assignment raises."""


def like_no_row(_: object) -> bool:
    """Whether a value is like a row that was written, before any was."""
    return False


class _ReferenceCounter:
    """Counts the references to a value that ``probe[0] = value`` gets."""

    count = 0

    def __setitem__(self, index: int, value: object) -> None:
        self.count = sys.getrefcount(value)


def _references_to_a_temporary() -> int:
    """How many references ``__setitem__`` sees to a value that nobody else holds.

    -1 where the interpreter doesn't tell it from a value that a variable holds too.
    """
    probe = _ReferenceCounter()
    probe[0] = object()
    temporary = probe.count
    held = object()
    probe[0] = held
    return temporary if probe.count > temporary else -1


TEMPORARY = _references_to_a_temporary()


def _rank(dtype: torch.dtype) -> int:
    return 2 if dtype.is_complex else int(dtype.is_floating_point)


def _is_lazy(value: Tensor) -> bool:
    return not torch.compiler.is_compiling() and is_lazy(value)  # which Dynamo can't ask


def _not_dense(value: Tensor) -> TypeError:
    if _is_lazy(value):
        found, way = "an uninitialized parameter", "run its lazy module once first"
    elif value.is_nested:
        found, way = "a nested tensor", "use torch.nested.to_padded_tensor, or write its parts one by one"
    elif value.is_quantized:
        found, way = f"a quantized one of dtype {value.dtype}", "use dequantize()"
    else:
        found, way = f"layout {value.layout}", "use to_dense()"
    return TypeError(f"value: expected a dense tensor, got {found}; {way}")


def as_value(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``value`` as a tensor of the Buffer's dtype and device, converted as assignment converts.

    Raises ``TypeError`` where a conversion would lose the fraction or the imaginary part.
    """
    if isinstance(value, Tensor):
        if value.dtype is not dtype:
            _check_kind(value, value.dtype, dtype)
        if value.layout is not torch.strided or value.is_nested or value.is_quantized or _is_lazy(value):
            raise _not_dense(value)
        if value.dtype is dtype and value.device == device:
            return value
        if value.is_meta and device.type != "meta":
            raise TypeError(
                "value: expected a tensor with values, got one on the meta device, which has none; make it "
                f"on {device}"
            )
        return value.to(dtype=dtype, device=device)
    if isinstance(value, (bool, int, float, complex)):
        kind = torch.complex64 if isinstance(value, complex) else torch.float32
        _check_kind(value, kind if isinstance(value, (float, complex)) else torch.int64, dtype)
        return _number(value, dtype, device)
    if isinstance(value, np.generic):
        return as_value(value.item(), dtype, device)
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biu":
            return _numbers(value.tolist(), dtype, device)
        return as_value(numpy_to_tensor(value).clone(), dtype, device)
    raise not_a_value(value)


def _number(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    number = _numbers(value, dtype, torch.device("cpu"))
    # What is too large is infinite here, and refused where it is filled in elsewhere.
    return number if device.type == "cpu" else filled_in(number, device)


def _numbers(value: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Python numbers, or lists of them."""
    try:
        return torch.tensor(value, dtype=dtype, device=device)
    except (ValueError, RuntimeError) as error:
        if "verflow" not in str(error):  # "Overflow when unpacking", "value cannot be converted"
            raise
        found = f"{value}" if isinstance(value, int) and value.bit_length() <= 64 else "a larger number"
        raise ValueError(f"value: expected what a Buffer of dtype {dtype} can hold, got {found}") from None


def not_a_value(value: Any) -> TypeError:
    """The error that says that ``value`` is no tensor, array or number."""
    advice = ", which is no tensor; copy it first" if isinstance(value, NotATensor) else ""
    return TypeError(f"value: expected a tensor, an array or a number, got {type_name(value)}{advice}")


def _check_kind(value: Any, given: torch.dtype, dtype: torch.dtype) -> None:
    if _rank(given) <= _rank(dtype):
        return
    what = "complex" if given.is_complex else "floating"
    advice = "take .real first" if dtype.is_floating_point else "convert it, or make a Buffer of its dtype"
    raise TypeError(
        f"value: expected what a Buffer of dtype {dtype} can hold, got the {what} value {type_name(value)}; "
        f"{advice}"
    )


def fit(value: Tensor, target: Sequence[int], whole: Sequence[int]) -> Tensor:
    """``value`` without the leading axes of size 1 that ``target`` lacks; its shape must broadcast."""
    shape = tuple(value.shape)
    extra = len(shape) - len(target)
    if extra > 0:
        if shape[:extra] == (1,) * extra:
            value = value.reshape(shape[extra:])
            shape = shape[extra:]
        else:
            _refuse_shape(shape, target, whole)
    if shape != tuple(target):
        for given, wanted in zip(shape[::-1], tuple(target)[::-1], strict=False):
            if given != wanted and given != 1:
                _refuse_shape(shape, target, whole)
    return value


def _refuse_shape(shape: Sequence[int], target: Sequence[int], whole: Sequence[int]) -> None:
    raise DoesNotBroadcast(
        f"value: expected a shape that broadcasts to {tuple(target)}, that of the part of a Buffer of shape "
        f"{tuple(whole)} that is written, got {tuple(shape)}"
    )


def is_plain(value: Tensor) -> bool:
    """Whether nothing follows ``value``: it may be written into plain memory."""
    return in_plain_eager() and not (value.requires_grad and torch.is_grad_enabled())


_recording = torch.is_grad_enabled


def is_unshared_result(value: Tensor) -> bool:
    """Whether a ``value`` that no variable holds is the result of an operation, with memory of its own.

    A leaf may share memory with a NumPy array, a view with its base, and ``p.grad`` belongs to ``p``. Inside
    ``torch.func`` a wrapper doesn't show what it shares, and without recording a graph must not be kept.
    """
    return (
        not value.is_leaf
        and not is_view(value)
        and object_holders(value) == 1
        and innermost_level() is None
        and _recording()
    )


def snapshot(value: Tensor, given: object) -> Tensor:
    """A copy, as assignment makes one: what is done to ``given`` in place later doesn't matter.

    ``value`` is ``given`` or was made from it; a conversion has copied already, a reshape hasn't.
    """
    if isinstance(given, Tensor) and value.dtype == given.dtype and value.device == given.device:
        return value.clone()
    return value


def recorded() -> AbstractContextManager[Any]:
    """Around what is kept for later reads: with its derivative, whether or not this read has one."""
    return torch.inference_mode(False)  # which enables gradients, too


class ReadValue(Tensor):
    """What is read under ``vmap`` where it is the same for all examples.

    ``buf[i] += v`` with a batched ``v`` writes in place into what was read, which ``vmap`` refuses; here
    all such operators are out of place. Everything computed from it is a plain tensor.
    """

    __torch_function__ = no_torch_function


def _out_of_place(operation: Callable[[Any, Any], Any]) -> Callable[[Tensor, Any], Tensor]:
    def in_place(self: Tensor, other: Any) -> Tensor:
        result: Tensor = operation(self, other)
        return result

    return in_place


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
):
    setattr(ReadValue, f"__i{_name}__", _out_of_place(getattr(operator, f"__{_name}__")))


def value_read(value: Tensor) -> Tensor:
    """``value``, fresh, such that ``+=`` works on it whatever is added."""
    if innermost_level() is None or type(value) is not Tensor or batched_everywhere(value):
        return value
    return value.as_subclass(ReadValue)
