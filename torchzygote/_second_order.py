"""The gradient of a scalar function, recorded so that it can be differentiated itself.

One forward pass gives value, gradient and what Hessian rows are pulled back from. Knows nothing of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _engine
from ._arguments import Prepared
from ._engine import Linearization
from .gradients import scalar_root

__all__ = ["Options", "SecondOrder", "record_gradient"]


class Options(NamedTuple):
    """How the products of one call are computed."""

    chunk_size: int | None
    keep: bool
    progress: bool


class SecondOrder:
    """Value and gradient of one call; ``by_input(i)``: the gradient by input ``i``, ready to be pulled back."""

    __slots__ = ("_lin", "_positions", "caller", "grads", "prepared", "value")

    def __init__(self, caller: str, prepared: Prepared, value: Any, grads: list[Tensor | None]) -> None:
        self.caller = caller
        self.prepared = prepared
        self.value = value
        self.grads = grads
        self._lin: Linearization | None = None
        self._positions: list[int | None] = [None] * len(grads)

    def record(self, lin: Linearization, positions: list[int | None]) -> None:
        """``lin.roots[positions[i]]`` is the gradient by input ``i``."""
        self._lin = lin
        self._positions = positions

    def by_input(self, i: int) -> Linearization | None:
        """``None`` where the gradient depends on nothing."""
        position = self._positions[i]
        if self._lin is None or position is None:
            return None
        return self._lin.restricted(position, i)


def _root(caller: str, lin: Linearization, y: Any) -> Tensor | None:
    if lin.y_spec is not None:
        raise ValueError(f"{caller}: expected f to return a real scalar, got {_engine.type_name(y)}")
    try:
        return scalar_root(caller, lin.y_leaves[0])
    except TypeError as error:
        raise ValueError(str(error)) from None


def record_gradient(
    caller: str, f: Callable[..., Any], prepared: Prepared, options: Options, *, once: bool = False
) -> SecondOrder:
    """Run ``f`` once, and its pullback once.

    ``once``: the gradient will not be differentiated by the result (it is being pushed forward through).
    """
    if not once and (_engine.compiling() or _engine.in_functorch()):
        return _record_nested(caller, f, prepared, options)
    lin = _engine.linearize(f, prepared, keep=options.keep)
    root = _root(caller, lin, lin.y)
    count = len(prepared.inputs)
    if root is None:
        return SecondOrder(caller, prepared, lin.y, [None] * count)
    grads = lin.pull([torch.ones_like(root)], retain=True, create_graph=True)
    visible = grads if options.keep or once else [None if g is None else g.detach() for g in grads]
    second = SecondOrder(caller, prepared, lin.y, visible)
    if once:
        return second
    roots: list[Tensor] = []
    positions: list[int | None] = []
    for g in grads:
        depends = g is not None and g.requires_grad
        positions.append(len(roots) if depends else None)
        if g is not None and g.requires_grad:
            roots.append(g)
    second.record(Linearization(prepared, roots, lin.inputs), positions)
    return second


def _record_nested(
    caller: str, f: Callable[..., Any], prepared: Prepared, options: Options
) -> SecondOrder:
    """Inside ``torch.func``: one level differentiates the gradient that another one gives."""

    def gradient_and_value(*inputs: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        inner = record_gradient(caller, f, prepared.at(list(inputs)), options, once=True)
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, inner.grads, strict=True)
        ]
        return tuple(grads), inner.value

    if not all(prepared.owned):
        raise RuntimeError(
            f"{caller}: inside a torch.func transform, second derivatives by Params are not supported; "
            "pass the tensors as arguments (torch.func.functional_call calls a module with them)"
        )
    outer = Prepared(())
    outer.inputs = list(prepared.inputs)
    outer.owned = [True] * len(outer.inputs)
    outer.simple = True
    lin = _engine.linearize(gradient_and_value, outer, keep=True)
    grads, value = lin.y
    second = SecondOrder(caller, prepared, value, list(grads))
    compiled = _engine.compiling()
    second.record(
        lin, [i if compiled or lin.roots[i].requires_grad else None for i in range(len(prepared.inputs))]
    )
    return second
