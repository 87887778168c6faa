"""Refusing to be taken for a tensor: operators, torch functions, NumPy, DLPack, tensor methods.

Knows nothing of what a Buffer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from .._torch_private import in_tensor_constructor

__all__ = ["NotATensor", "NotTensorError", "refused_elements"]


class NotTensorError(TypeError, AttributeError):
    """A ``TypeError``; also an ``AttributeError``, so that ``hasattr`` says no."""


def _refuse(what: str, error: type[Exception] = TypeError) -> NoReturn:
    raise error(
        f"{what}: expected a tensor, got a Buffer, which is not one; copy it first, with copy.copy(buf) or "
        "buf.copy()"
    )


def refused_elements() -> Iterator[Any] | None:
    """For ``torch.tensor([buf, buf])``, which would take the elements without their derivatives.

    The first element raises: what ``iter`` raises is replaced by words of PyTorch's.
    """
    return map(_refuse, ("a conversion to a tensor",)) if in_tensor_constructor() else None


_BINARY = (
    *("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "divmod", "pow"),
    *("and", "or", "xor", "lshift", "rshift"),
)
_COMPARING = ("lt", "le", "gt", "ge", "ne")
_UNARY = ("neg", "pos", "abs", "invert", "float", "int", "complex", "round")


def _refusing(name: str) -> Callable[..., NoReturn]:
    def operator(self: object, *args: object) -> NoReturn:
        _refuse(name)

    operator.__name__ = name
    return operator


class NotATensor:
    """What every tensor operation on it refuses with "copy it first"."""

    __slots__ = ()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        _refuse(getattr(func, "__name__", repr(func)))

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("numpy.asarray")

    def __array_ufunc__(self, ufunc: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"numpy.{ufunc.__name__}")

    def __array_function__(self, func: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(f"numpy.{func.__name__}")

    # torch.tensor and torch.as_tensor would take the elements one by one, without their derivatives.
    def __dlpack__(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("a conversion to a tensor")

    def __dlpack_device__(self) -> NoReturn:
        _refuse("a conversion to a tensor")

    def __getattr__(self, name: str) -> Any:
        own = getattr(type(self), name, None)
        if isinstance(
            own, property
        ):  # it raised an AttributeError, which ends here: once more, for its words
            return own.__get__(self)
        if not name.startswith("_") and hasattr(torch.Tensor, name):
            _refuse(name, NotTensorError)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        _refuse("__eq__")

    __hash__ = object.__hash__


for _name in _BINARY:
    for _form in (f"__{_name}__", f"__r{_name}__", f"__i{_name}__"):
        setattr(NotATensor, _form, _refusing(_form))
for _name in (*_COMPARING, *_UNARY):
    setattr(NotATensor, f"__{_name}__", _refusing(f"__{_name}__"))
