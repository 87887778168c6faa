"""Operators that forward mode gives wrong numbers for, without a word.

Those made in Python with ``torch.library``: zeros. PyTorch calls them below autograd, which takes the
tangents off, and asks nobody for a forward derivative. Custom functions with a ``jvp`` of their own, where
one forward mode is inside another: zeros, as PyTorch calls that ``jvp`` with forward mode off. And those that
solve by an LU decomposition, where one ``vmap`` batches the matrix and another one, inside of it, the
tangents: noise (2.13).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C_functorch
from torch._C._functorch import TransformType
from torch._functorch.autograd_function import custom_function_call
from torch.overrides import TorchFunctionMode

from .forward import has_tangent, tangent
from .levels import in_functorch, transform_stack
from .wrappers import is_wrapped, layers

__all__ = [
    "OVERLOADS",
    "called_watched",
    "library_operators",
    "nested_batches_watched",
    "nested_tangents_watched",
]

# Whose "operators" have no derivative to lose, or refuse by themselves.
_OWN = {"prims", "rngprims", "export", "debug_mode_ops", "torchzygote"}


@functools.lru_cache(maxsize=1)
def _operators(count: int) -> frozenset[str]:
    """``ns::name`` of those with an autograd formula; ``count``: how many registrations there are."""
    registered = [key.split("/") for key in tuple(torch.library._impls)]  # other threads add to it
    return frozenset(
        f"{parts[0]}::{parts[1].split('.')[0]}"
        for parts in registered
        if len(parts) == 3 and parts[2] == "Autograd" and parts[0] not in _OWN
    )


OVERLOADS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


def library_operators() -> frozenset[str]:
    """Operators with an autograd formula that were made in Python; none, mostly."""
    return _operators(len(torch.library._impls))


def called_watched(
    names: frozenset[str], func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``func``, one of ``OVERLOADS``; raises where it is one of these and is given what is pushed."""
    name = str(func._qualified_op_name if hasattr(func, "_qualified_op_name") else func._name)  # type: ignore[attr-defined]
    name = name.split(".")[0]
    if name not in names:
        return func(*args, **kwargs)
    if any(_is_pushed(x) for x in (*args, *kwargs.values())):
        raise _lacks_forward(name)
    return _called(name, func, args, kwargs)


def _called(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In a reverse mode inside of forward mode the operator refuses by itself.

    PyTorch makes an ``autograd.Function`` of it, and names that, which nobody has written.
    """
    try:
        return func(*args, **kwargs)
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
    raise _lacks_forward(name)


def _lacks_forward(name: str) -> RuntimeError:
    return RuntimeError(
        f"the operator {name} has no forward derivative: PyTorch gives zeros for operators made with "
        "torch.library; use reverse mode, or make it a torch.autograd.Function with a jvp"
    )


_BY_LU: dict[Callable[..., Any], str] = {
    function: f"torch.{name}"
    for name, functions in {
        "linalg.solve": (torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve),
        "linalg.det": (torch.linalg.det, torch.det, Tensor.det),
        "linalg.slogdet": (torch.linalg.slogdet, torch.slogdet, Tensor.slogdet),
        "logdet": (torch.logdet, Tensor.logdet),
        "linalg.lu_solve": (torch.linalg.lu_solve, torch.lu_solve, Tensor.lu_solve),
    }.items()
    for function in functions
}
# Their backward does: with a gradient taken inside, that is pushed forward.
_BACKWARD_BY_LU: dict[Callable[..., Any], str] = {
    torch.linalg.eig: "the gradient of torch.linalg.eig",
    torch.linalg.eigvals: "the gradient of torch.linalg.eigvals",
}


class _WatchNested(TorchFunctionMode):
    """Raises where one of these is given what a transform batches or differentiates."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        name = _BY_LU.get(func) or _BACKWARD_BY_LU.get(func)
        if name is not None and any(
            isinstance(x, Tensor) and is_wrapped(x) for x in (*args, *given.values())
        ):
            stack = transform_stack()
            if func in _BY_LU or "grad" in stack[stack.index("jvp") :]:
                raise RuntimeError(
                    f"PyTorch's forward derivative of {name} is wrong where vmap is nested in vmap; "
                    "use reverse mode"
                )
        return func(*args, **given)


def nested_batches_watched() -> contextlib.AbstractContextManager[Any]:
    """Around a function that is pushed forward; costs nothing but inside two ``vmap``."""
    nested = in_functorch() and transform_stack().count("vmap") > 1
    return _WatchNested() if nested else contextlib.nullcontext()


class _WatchTwice(TorchFunctionMode):
    """Raises where a custom function with a ``jvp`` of its own is pushed forward by two levels."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is custom_function_call and not _composes(args[0]):
            count = _levels_pushing([x for x in args[1:] if isinstance(x, Tensor)])
            if count > 1:
                raise RuntimeError(
                    f"{args[0].__name__} can't be pushed forward twice: PyTorch runs the jvp of a custom "
                    "autograd.Function with forward mode off, and gives zeros for the second derivative; use "
                    "reverse mode around or inside of it"
                )
        return func(*args, **(kwargs or {}))


def _composes(function: Any) -> bool:
    """Whether this is a custom function of this package."""
    return any(getattr(function, name, False) for name in ("torchzygote_composes", "derivative_of_forward"))


def _levels_pushing(tensors: list[Tensor]) -> int:
    """How many levels push one of these forward, or one of their tangents."""
    count = 0
    taken = []
    try:
        # Each level answers for its own tangents alone, while it is the innermost.
        while (top := _C_functorch.peek_interpreter_stack()) is not None:
            level = top.level()
            pushes = top.key() == TransformType.Jvp  # inside vmap, tangents can't be asked for
            mine = [x for x in tensors if pushes and _C_functorch.maybe_get_level(x) == level]
            tangents = [along for x in mine if (along := tangent(x)) is not None]
            count += bool(tangents)
            tensors = [
                _C_functorch.get_unwrapped(x) if _C_functorch.maybe_get_level(x) == level else x
                for x in (*tensors, *tangents)
            ]
            taken.append(_C_functorch.pop_dynamic_layer_stack())
    finally:
        for layer in reversed(taken):
            _C_functorch.push_dynamic_layer_stack(layer)
    return count


def nested_tangents_watched() -> contextlib.AbstractContextManager[Any]:
    """Around a function that is pushed forward; costs nothing but inside another forward mode."""
    nested = in_functorch() and "jvp" in transform_stack()
    return _WatchTwice() if nested else contextlib.nullcontext()


def _is_pushed(x: Any) -> bool:
    if isinstance(x, (list, tuple)):
        return any(_is_pushed(part) for part in x)
    return isinstance(x, Tensor) and any(has_tangent(layer) for _, layer in layers(x))
