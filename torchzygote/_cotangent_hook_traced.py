"""The identity whose backward pass calls a function, as ``torch.compile`` can follow it.

Dynamo forgets the backward of a custom autograd function inside ``torch.func`` transforms, silently (PyTorch
2.13). What it records faithfully are hooks of tensors, so here each level of ``torch.func`` gets a hook of
its own: what a level sees of a tensor is a tensor with a graph of that level. Imported only while tracing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._arguments import is_inexact
from ._cotangent_hook import fitted, leaves_of, refuse_holders
from ._dtypes import promoted
from ._torch_private import (
    layer_below,
    maybe_batch_axis,
    pytree,
    trace_time,
    traced_value_of,
    tracer_follows_lower_hooks,
    transform_stack,
)

__all__ = ["attach_traced"]

_noted = threading.local()
_call_while_tracing = trace_time()


def _note(context: Any) -> None:
    layer = traced_value_of(context, "layer")
    _noted.recorded = layer.requires_grad
    _noted.axis = maybe_batch_axis(layer)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _facts() -> tuple[bool, int | None]:
    return _noted.recorded, _noted.axis


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _levels() -> tuple[str, ...]:
    return tuple(reversed(transform_stack()))


_below = torch.compiler.allow_in_graph(layer_below)  # type: ignore[no-untyped-call]


def _for_each_example(fn: Callable[..., Any], axis: int) -> Callable[..., Any]:
    """What does to a batch of gradients what ``fn`` does to each.

    By a loop: the number that a level of ``vmap`` has while tracing is not the one when the hook runs.
    """

    def of_batch(g: Tensor) -> Tensor | None:
        bent = [fn(example) for example in g.unbind(axis)]
        if not bent or bent[0] is None:
            return None
        return torch.stack(bent, dim=axis)

    return of_batch


def _or_zeros(g: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device) if g is None else g


def _unless_absent(bent: Tensor, g: Tensor | None) -> Tensor | None:
    return None if g is None else bent


_given = torch.compiler.allow_in_graph(_or_zeros)  # type: ignore[no-untyped-call]
_kept = torch.compiler.allow_in_graph(_unless_absent)  # type: ignore[no-untyped-call]


def _where_given(fn: Callable[..., Any], layer: Tensor) -> Callable[..., Any]:
    """``fn``, of zeros and to no effect where no gradient comes, as by the Jacobian of a ``forwarddiff``.

    The tracer has put what ``fn`` does into a graph by then, which can't ask whether there is one.
    """
    shape, dtype, device = tuple(layer.shape), layer.dtype, layer.device

    def guarded(g: Tensor) -> Tensor | None:
        bent = fn(_given(g, shape, dtype, device))
        return None if bent is None else _kept(bent, g)

    return guarded


def _refuse_below(layer: Tensor, y: Tensor) -> None:
    if layer is not y and not tracer_follows_lower_hooks:
        raise RuntimeError(
            "hook: expected one derivative where torch.compile traces, by tensors that don't require grad "
            "outside of it, got more: the tracer of PyTorch 2.10 to 2.12 forgets hooks there; take a newer "
            "PyTorch, or leave the hook out of what is compiled"
        )


def _attach_to_tensor(fn: Callable[..., Any], x: Tensor) -> Tensor:
    y = x.view_as(x)
    layer = y
    for level in _levels():
        _call_while_tracing(_note)
        recorded, axis = _facts()
        if level == "vmap":
            if axis is None:
                continue
            fn = _for_each_example(fn, axis)
        elif recorded:
            _refuse_below(layer, y)
            layer.register_hook(_where_given(fn, layer))  # type: ignore[no-untyped-call]
        layer = _below(layer)
    if layer.requires_grad:
        _refuse_below(layer, y)
        layer.register_hook(_where_given(fn, layer))  # type: ignore[no-untyped-call]
    return y


def attach_traced(fn: Callable[..., Any], x: Any) -> Any:
    """A copy of ``x`` whose gradient goes through ``fn``; a leaf without a gradient counts as zeros here."""
    if isinstance(x, Tensor):

        def of_one(g: Tensor) -> Tensor | None:
            bent = fn(g.clone())  # which it may write into
            return None if bent is None else fitted(fn, bent, g, g.shape)

        return _attach_to_tensor(of_one, x) if is_inexact(x) else x
    leaves, spec = pytree.tree_flatten(x)
    refuse_holders("hook", leaves)
    slots = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    if not slots:
        return x
    # One tensor has one hook, which sees all leaves at once.
    tensors = [leaves[i] for i in slots]
    dtype = promoted([tensor.dtype for tensor in tensors])
    sizes = [tensor.numel() for tensor in tensors]

    def of_flat(g: Tensor) -> Tensor | None:
        whole: list[Any] = [None] * len(leaves)
        for i, tensor, part in zip(slots, tensors, torch.split(g, sizes), strict=True):
            whole[i] = _as_like(part.clone(), tensor)
        bent = fn(pytree.tree_unflatten(whole, spec))
        if bent is None:
            return None
        new = leaves_of(fn, bent, spec)
        parts = [whole[i] if new[i] is None else fitted(fn, new[i], whole[i], whole[i].shape) for i in slots]
        return torch.cat([part.reshape(-1).to(dtype) for part in parts])

    flat = _attach_to_tensor(of_flat, torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors]))
    for i, tensor, part in zip(slots, tensors, torch.split(flat, sizes), strict=True):
        leaves[i] = _as_like(part, tensor)
    return pytree.tree_unflatten(leaves, spec)


def _as_like(part: Tensor, like: Tensor) -> Tensor:
    if part.dtype.is_complex and not like.dtype.is_complex:
        part = part.real
    return part.reshape(like.shape).to(like.dtype)
