"""Parameters that are updated as soon as their gradient is complete, in pullbacks by this package.

Knows nothing of how they were chosen, nor of ``backward()``, for which PyTorch has hooks.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._engine import Linearization
from ._forward_mode_lock import behalf
from ._forward_mode_lock import update as _update
from ._torch_private import innermost_transform

__all__ = ["Update", "enroll", "pull", "registry", "run", "updating", "withdraw"]

Update = Callable[[Tensor, Tensor], Any]

# By identity of the parameter; the reference tells whether it is still the same one.
registry: dict[int, tuple[weakref.ref[Tensor], Update]] = {}


# Threads in which an update runs, for a quick answer.
_running: set[int] = set()


def updating() -> bool:
    """Whether an update runs: what it differentiates updates nothing, lest it be entered without end."""
    return bool(_running) and behalf().updating


def run(update: Update, p: Tensor, gradient: Tensor) -> None:
    """Update ``p``."""
    me = threading.get_ident()
    # Another one may run here: while it waits for another device, this one's thread goes on with its pass.
    outermost = me not in _running
    _running.add(me)
    try:
        with _update(), torch.no_grad():
            update(p, gradient)
    finally:
        if outermost:
            _running.discard(me)


def enroll(p: Tensor, update: Update) -> None:
    """Have ``p`` updated in pullbacks."""
    key = id(p)

    def forget(_: object) -> None:
        registry.pop(key, None)

    registry[key] = (weakref.ref(p, forget), update)


def withdraw(p: Tensor) -> None:
    """Have ``p`` no longer updated."""
    registry.pop(id(p), None)


def is_enrolled(p: Tensor) -> bool:
    """Whether ``p`` is updated in pullbacks."""
    found = registry.get(id(p))
    return found is not None and found[0]() is p


def pull(
    lin: Linearization, cotangents: Sequence[Tensor | None], implicit: bool, *, retain: bool, keep: bool
) -> list[Tensor | None]:
    """The pullback of ``lin``; ``None`` where a gradient went into an update (in ``implicit`` calls).

    ``keep``: the gradients must be differentiable, which refuses updates.
    """
    if not implicit or not registry or updating():
        return lin.pull(cotangents, retain=retain, create_graph=keep)
    return _with_updates(
        lin.prepared.inputs, lambda: lin.pull(cotangents, retain=retain, create_graph=keep), keep
    )


def _refuse(differentiable: bool) -> None:
    """Refuse where a gradient is needed later, or belongs to a transform."""
    transform = innermost_transform()
    if differentiable:
        which = "that is differentiated itself"
    elif transform is not None:
        which = f"inside torch.func.{transform}{', one for each example,' if transform == 'vmap' else ''}"
    else:
        return
    raise RuntimeError(
        f"eager_update: a gradient {which} can't be used up on the way; call remove() on the handle, or "
        "differentiate by parameters that have no eager update"
    )


def _kind(x: Tensor) -> tuple[torch.dtype, torch.device]:
    return x.dtype, x.device


def _with_updates(
    params: Sequence[Tensor], pullback: Callable[[], list[Tensor | None]], differentiable: bool
) -> list[Tensor | None]:
    """No more gradients are alive at a time than the backward pass needs, and one copy.

    What is kept of one that was used is a zero of its shape, without memory.
    """
    enrolled = [(i, p) for i, p in enumerate(params) if is_enrolled(p)]
    if not enrolled:
        return pullback()
    _refuse(differentiable)
    used: list[int] = []
    # Made before: what little they take would lie between large gradients, and the heap couldn't shrink.
    zeros = {kind: torch.zeros((), dtype=kind[0], device=kind[1]) for kind in {_kind(p) for _, p in enrolled}}
    spent = {i: zeros[_kind(p)].expand(p.shape) for i, p in enrolled}

    def used_up(i: int, p: Tensor) -> Callable[[Tensor | None], Tensor | None]:
        def hook(gradient: Tensor | None) -> Tensor | None:
            # A custom function may give none; a gradient inside of an update comes by here as well; and an
            # update may have removed the others.
            if gradient is None or updating() or not is_enrolled(p):
                return gradient
            # A copy: the gradient of another parameter, or the caller's cotangent, may be the same tensor.
            run(registry[id(p)][1], p, gradient.clone())
            used.append(i)
            if gradient.layout is not torch.strided or _kind(gradient) != _kind(p):
                return torch.zeros_like(gradient)
            return spent[i]

        return hook

    handles = [p.register_hook(used_up(i, p)) for i, p in enrolled]  # type: ignore[no-untyped-call]
    try:
        gradients = pullback()
    finally:
        for handle in handles:
            handle.remove()
    for i in used:
        gradients[i] = None
    return gradients
