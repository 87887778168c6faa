"""What a function may return, for each kind of derivative; the rest is refused.

Knows values only, not how they are differentiated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arguments import kind_of, number_to_tensor, numpy_to_tensor, type_name
from ._buffer.refusal import NotATensor
from ._tensor_holders import Holder, each_tensor
from ._torch_private import in_functorch

__all__ = ["detached", "differentiated_part", "hint", "output_tensor", "real_scalar", "scalar_root"]


def differentiated_part(y: Any) -> Any:
    """The first field of a tuple (auxiliary output), or ``y`` itself."""
    return y[0] if isinstance(y, tuple) and len(y) > 0 and not isinstance(y, torch.Size) else y


def detached(y: Any) -> Any:
    """``y`` without graphs, structures leaf by leaf."""
    if isinstance(y, Tensor):
        # a batched tensor doesn't say whether what it wraps requires grad
        return y.detach() if y.requires_grad or in_functorch() else y
    if isinstance(y, Holder) or kind_of(y) == "structure":
        return each_tensor(detached, y)
    return y


def hint(caller: str, y: Any, array: bool = False) -> str:
    """What may be meant where ``f`` returned ``y``, as the end of a message."""
    if y is None:
        return "; does f return its result?"
    if isinstance(y, NotATensor):
        return ", which is no tensor; copy it first, as in return buf.copy()"
    if isinstance(y, (tuple, list)):
        if array:
            return "; make it one array, as by torch.stack"
        pick = "; pick an entry, as gradient(...)[0] where f differentiates itself"
        if caller == "gradient" and isinstance(y, tuple) and y:
            return f"{pick}, or use withgradient, which differentiates the first"
        return pick
    return "; pick an entry" if isinstance(y, dict) else ""


def _instead(caller: str, y: Any) -> str:
    """What to do about an array in place of a scalar."""
    if caller in ("gradient", "withgradient"):
        return f"perhaps you wanted jacobian{', or a scalar by sum() or squeeze()' if _numel(y) == 1 else ''}"
    return "make it a scalar, as by sum(), or take one element, as y[i]; perhaps you wanted jacobian"


def scalar_root(caller: str, y: Any, expected: str = "f to return") -> Tensor | None:
    """The tensor to pull back from, ``None`` for a constant; anything but a real scalar is refused."""
    if isinstance(y, (Tensor, np.ndarray)) and y.ndim > 0:
        raise ValueError(
            f"{caller}: expected {expected} a real scalar, got an array, {type_name(y)}; "
            f"{_instead(caller, y)}"
        )
    if isinstance(y, Tensor):
        if y.dtype.is_complex:
            raise ValueError(
                f"{caller}: expected {expected} a real scalar, got a complex one of dtype {y.dtype}; "
                "return its real part, imaginary part or absolute value"
            )
        return y if y.dtype.is_floating_point else None
    if isinstance(y, np.ndarray):
        y = y[()]  # what it holds
    if isinstance(y, (complex, np.complexfloating)):
        raise ValueError(f"{caller}: expected {expected} a real scalar, got the complex number {y!r}")
    if isinstance(y, (bool, int, float, np.bool_, np.number)) and not isinstance(y, np.timedelta64):
        return None
    raise TypeError(f"{caller}: expected {expected} a real scalar, got {type_name(y)}{hint(caller, y)}")


def _numel(y: Tensor | np.ndarray[Any, Any]) -> int:
    return y.numel() if isinstance(y, Tensor) else y.size


def real_scalar(caller: str, y: Any) -> Tensor | None:
    """:func:`scalar_root`, where anything else is a ``ValueError``, as for Hessians."""
    try:
        return scalar_root(caller, y)
    except TypeError as error:
        raise ValueError(str(error)) from None


def output_tensor(caller: str, y: Any) -> Tensor:
    """``y`` as a tensor; what is no array or number, or complex, is refused."""
    kind = kind_of(y)
    if kind == "number":
        y = number_to_tensor(y)
    elif kind != "array":
        raise ValueError(
            f"{caller}: expected f to return an array or a number, got {type_name(y)}"
            f"{hint(caller, y, array=True)}"
        )
    elif isinstance(y, np.ndarray):
        y = numpy_to_tensor(y)
    tensor: Tensor = y
    if tensor.is_nested:
        raise ValueError(
            f"{caller}: expected f to return an array or a number, got a nested tensor; return its values() "
            "or torch.nested.to_padded_tensor(y, 0)"
        )
    if tensor.dtype.is_complex:
        raise ValueError(
            f"{caller}: expected f to return real values, got {type_name(tensor)}; "
            "differentiate its real and imaginary parts"
        )
    return tensor
