"""What the running ``torch.func`` transforms have wrapped around a tensor."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C_functorch

__all__ = [
    "batched_everywhere",
    "batched_like",
    "concrete",
    "innermost_layer",
    "is_recorded",
    "is_wrapped",
    "layer_below",
    "layers",
    "maybe_batch_axis",
    "plain_layer",
    "plain_value",
    "put_rows_back",
    "take_rows_off",
    "unwrapped_if_ended",
    "without_rows",
]


def is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` is a wrapper of a ``torch.func`` transform (batched, grad-tracking or functional)."""
    return bool(_C_functorch.is_functorch_wrapped_tensor(x))


def layers(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What each open ``torch.func`` level sees of ``x``, innermost first; level 0 is plain PyTorch.

    Each level records a graph of its own; nothing public shows but the innermost.
    """
    x = _C_functorch.unwrap_if_dead(x)
    while _C_functorch.is_functorch_wrapped_tensor(x):
        yield _C_functorch.maybe_get_level(x), x
        x = _C_functorch.unwrap_if_dead(_C_functorch.get_unwrapped(x))
    yield 0, x


def is_recorded(x: Tensor) -> bool:
    """Whether a graph of reverse mode leads to ``x``, at any level."""
    return any(layer.requires_grad for _, layer in layers(x))


def unwrapped_if_ended(x: Tensor) -> Tensor:
    """``x`` without the wrappers of levels that have ended: PyTorch takes off one, and fails at a second."""
    while (inner := _C_functorch.unwrap_if_dead(x)) is not x:
        x = inner
    return x


def innermost_layer(x: Tensor) -> Tensor:
    """``x`` as the innermost level that is still open sees it."""
    return next(layers(x))[1]


def plain_layer(x: Tensor) -> Tensor:
    """``x`` as plain PyTorch sees it, outside of all ``torch.func`` levels."""
    return [layer for _, layer in layers(x)][-1]


def layer_below(x: Tensor) -> Tensor:
    """What the level below the one that made the wrapper ``x`` sees of it."""
    return _C_functorch.get_unwrapped(x)


def maybe_batch_axis(x: Tensor) -> int | None:
    """The axis of what ``x`` wraps that holds the examples; ``None`` if ``x`` is no batched tensor."""
    return _C_functorch.maybe_get_bdim(x) if _C_functorch.is_batchedtensor(x) else None


def plain_value(x: Tensor) -> Tensor:
    """The values of ``x`` without graphs and wrappers, to be shown; batch axes first, outermost first."""
    x = _C_functorch.unwrap_if_dead(x)
    while _C_functorch.is_functorch_wrapped_tensor(x):
        inner = _C_functorch.get_unwrapped(x)
        if _C_functorch.is_batchedtensor(x):
            inner = inner.movedim(_C_functorch.maybe_get_bdim(x), 0)
        x = _C_functorch.unwrap_if_dead(inner)
    return x.detach()


def take_rows_off(
    tensors: Sequence[Tensor | None], depth: int
) -> tuple[list[Tensor | None], list[tuple[Any, int, int]]]:
    """Leave the ``vmap`` levels opened since there were ``depth``; their axes come first, outermost first.

    Nothing public shows a batched tensor whole. :func:`put_rows_back` enters the levels again.
    """
    found = list(tensors)
    taken: list[tuple[Any, int, int]] = []
    while True:
        top = _C_functorch.peek_interpreter_stack()
        if top is None or top.level() <= depth or top.key() != _C_functorch.TransformType.Vmap:
            return found, taken
        level, size = top.level(), _C_functorch.CVmapInterpreterPtr(top).batchSize()
        found = [None if x is None else _C_functorch._remove_batch_dim(x, level, size, 0) for x in found]
        taken.append((_C_functorch.pop_dynamic_layer_stack(), level, size))


def put_rows_back(tensors: Sequence[Tensor | None], taken: list[tuple[Any, int, int]]) -> list[Tensor | None]:
    """Enter the levels that :func:`take_rows_off` left; the first axis of each tensor becomes theirs."""
    found = list(tensors)
    for layer, level, _ in reversed(taken):
        _C_functorch.push_dynamic_layer_stack(layer)
        found = [None if x is None else _C_functorch._add_batch_dim(x, 0, level) for x in found]
    return found


@contextlib.contextmanager
def without_rows(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Outside of the innermost ``vmap`` levels in which none of ``tensors`` has a batch axis.

    What is computed from them is the same for all rows there, but a level of ``vmap`` refuses random numbers.
    """
    batched = {n for x in tensors for n, layer in layers(x) if _C_functorch.is_batchedtensor(layer)}
    taken = []
    try:
        while (top := _C_functorch.peek_interpreter_stack()) is not None:
            if top.key() != _C_functorch.TransformType.Vmap or top.level() in batched:
                break
            taken.append(_C_functorch.pop_dynamic_layer_stack())
        yield
    finally:
        for layer in reversed(taken):
            _C_functorch.push_dynamic_layer_stack(layer)


def batched_everywhere(x: Tensor) -> bool:
    """Whether ``x`` has a batch axis in each running ``vmap``; writing in place into it is then allowed."""
    stack = _C_functorch.get_interpreter_stack() or []
    levels = {level.level() for level in stack if level.key() == _C_functorch.TransformType.Vmap}
    return not levels or levels <= {n for n, layer in layers(x) if _C_functorch.is_batchedtensor(layer)}


def batched_like(x: Tensor, other: Tensor) -> Tensor:
    """``x`` with a batch axis in each level of ``vmap`` in which ``other``, of the same shape, has one.

    Derivatives write in place where the function did; that needs batch axes where the function had them.
    """
    if not is_wrapped(other):
        return x
    missing = {level for level, layer in layers(other) if _C_functorch.is_batchedtensor(layer)}
    missing -= {level for level, layer in layers(x) if _C_functorch.is_batchedtensor(layer)}
    return torch.zeros_like(other) + x if missing else x


def concrete(x: Tensor) -> Tensor | None:
    """The plain tensor of indices in ``x``, the same for all examples; ``None`` where there is none.

    Indices carry no derivative, so that the wrappers of differentiating transforms can be taken off.
    """
    if torch._C._len_torch_dispatch_stack() != 0:
        return None  # a tracer records what is done with x
    for level, layer in layers(x):
        if level and not _C_functorch.is_gradtrackingtensor(layer):
            return None
        x = layer
    return x if type(x) in (Tensor, torch.nn.Parameter) else None
