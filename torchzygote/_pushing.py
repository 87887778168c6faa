"""One pushforward: from arguments and their tangents to the tangent of what ``f`` returns.

Knows nothing of pullbacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _engine, _state
from ._arguments import ARRAY, NUMBER, kind_of, prepare, to_tensor
from ._forward import tangents_for
from ._torch_private import pytree

__all__ = ["push"]

_TENSOR = object()


@_engine.entry_point
def push(f: Callable[..., Any], args: tuple[Any, ...], xdots: tuple[Any, ...]) -> Any:
    """The tangent of ``f(*args)`` for a tangent per argument."""
    prepared = prepare(args)
    if not prepared.inputs:
        raise ValueError("pushforward: expected at least one number, array, structure or module, got none")
    keep = _engine.keeps_graph(None)
    # A dual number has the memory of its tensor: f might write into that.
    sources = [x if keep else x.detach() for x in prepared.inputs]
    inputs = [
        x.clone() if owned else _engine.separate(x) for x, owned in zip(sources, prepared.owned, strict=True)
    ]
    tangents = tangents_for(prepared, xdots, inputs, keep)
    # A tensor that two modules share is one dual number.
    places = list(range(len(inputs))) if all(prepared.owned) else prepared.places()
    inputs, tangents, places = _each_once(inputs, tangents, places)
    kept: dict[str, Any] = {}

    def flat(*primals: Tensor) -> tuple[Tensor, ...]:
        y = _engine.call_exchanged(f, prepared, [primals[place] for place in places])
        leaves, kept["spec"] = pytree.tree_flatten(y)
        kept["leaves"] = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # torch.func.jvp wants at least one tensor; a function of constants has none
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)) or primals[:1]

    with _state.differentiation(), _engine.recording_if(keep):
        ys, ydots = _engine.jvp(flat, inputs, tangents, keep)
    # PyTorch takes a tangent of complex128 for what a complex number made of complex64.
    remaining = iter([ydot.to(y.dtype) for y, ydot in zip(ys, ydots, strict=True)])
    leaves = [next(remaining) if leaf is _TENSOR else _zero_like(leaf) for leaf in kept["leaves"]]
    ydot = pytree.tree_unflatten(leaves, kept["spec"])
    return ydot if keep else _engine.detached(ydot)


def _each_once(
    inputs: list[Tensor], tangents: list[Tensor], places: list[int]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Without the inputs that are another one: tangents of the same input are added."""
    if places == list(range(len(places))):
        return inputs, tangents, places
    first = sorted(set(places))
    totals = [tangents[place] for place in first]
    new = [first.index(place) for place in places]
    for i, place in enumerate(places):
        if place != i:
            totals[new[i]] = totals[new[i]] + tangents[i]
    return [inputs[place] for place in first], totals, new


def _zero_like(leaf: Any) -> Any:
    """The tangent of a leaf of ``y`` that is no tensor."""
    kind = kind_of(leaf)
    return torch.zeros_like(to_tensor(leaf, kind)) if kind is NUMBER or kind is ARRAY else None
