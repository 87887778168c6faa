"""Every private PyTorch API that torchzygote uses, each with the reason why nothing public does.

The rest of the package imports from here, so that a new PyTorch release has one file to be checked against.
This module knows nothing of gradients, arguments or results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C_functorch
from torch._functorch import eager_transforms as _eager_transforms

__all__ = [
    "create_grad_input",
    "grad_level",
    "in_functorch",
    "in_functorch_derivative",
    "innermost_transform",
    "is_wrapped",
    "leave_grad_level",
    "transform_stack",
]

_TRANSFORM_NAMES = {
    _C_functorch.TransformType.Grad: "grad",
    _C_functorch.TransformType.Jvp: "jvp",
    _C_functorch.TransformType.Vmap: "vmap",
    _C_functorch.TransformType.Functionalize: "functionalize",
}


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform (``vmap`` included) is running in this thread.

    PyTorch has no public question for this; the answer decides between the autograd tape and ``torch.func``.
    """
    return _C_functorch.peek_interpreter_stack() is not None


def transform_stack() -> list[str]:
    """Names of the running ``torch.func`` transforms, outermost first."""
    stack = _C_functorch.get_interpreter_stack()
    return [] if stack is None else [_TRANSFORM_NAMES.get(level.key(), "other") for level in stack]


def innermost_transform() -> str | None:
    """Name of the innermost running ``torch.func`` transform, or ``None``."""
    level = _C_functorch.peek_interpreter_stack()
    return None if level is None else _TRANSFORM_NAMES.get(level.key(), "other")


def in_functorch_derivative() -> bool:
    """Whether one of the running ``torch.func`` transforms differentiates (``vmap`` alone does not)."""
    return in_functorch() and any(name in ("grad", "jvp") for name in transform_stack())


def is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` is a wrapper of a ``torch.func`` transform (batched, grad-tracking or functional)."""
    return bool(_C_functorch.is_functorch_wrapped_tensor(x))


@contextlib.contextmanager
def grad_level() -> Iterator[int]:
    """A new ``torch.func`` reverse-mode level.

    ``torch.func.vjp`` is this, but it turns "does not depend on" into zeros; the contract wants ``None``.
    """
    with _eager_transforms.grad_increment_nesting() as level:
        yield level


def create_grad_input(x: Tensor, level: int) -> Tensor:
    """``x`` wrapped for ``level``, requiring grad there."""
    wrapped: Any = _eager_transforms._create_differentiable(x, level)
    return wrapped  # type: ignore[no-any-return]


def leave_grad_level(x: Tensor, level: int) -> Tensor:
    """``x`` as the levels outside ``level`` see it."""
    unwrapped: Any = _eager_transforms._undo_create_differentiable(x, level)
    return unwrapped  # type: ignore[no-any-return]
