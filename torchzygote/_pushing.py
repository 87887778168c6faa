"""One pushforward: from arguments and their tangents to the tangent of what ``f`` returns.

Knows nothing of pullbacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _engine, _state
from ._arguments import ARRAY, NUMBER, is_size, kind_of, prepare, to_tensor
from ._forward import tangents_for
from ._random import RandomState, restored_after
from ._torch_private import is_wrapped, pytree, version_of

__all__ = ["Push"]

_TENSOR = object()


class Push:
    """Pushes tangents through ``f`` at arguments as they were: NumPy's are copied, structures taken apart.

    Modules are as they are at each push. All pushes are of the same draw.
    """

    __slots__ = ("_args", "_f", "_random", "_tensors")

    def __init__(self, f: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._f = f
        leaves: list[Any] = list(args)
        if not all(isinstance(x, Tensor) for x in args):
            leaves, spec = pytree.tree_flatten(args, is_leaf=is_size)
            leaves = [x.copy() if isinstance(x, np.ndarray) else x for x in leaves]
            args = pytree.tree_unflatten(leaves, spec)
        self._args = args
        self._tensors = [(x, _version(x)) for x in leaves if isinstance(x, Tensor)]
        self._random: RandomState | None = None

    def __call__(self, xdots: tuple[Any, ...]) -> Any:
        if any(_version(x) != then for x, then in self._tensors):
            raise RuntimeError(
                "push: expected the arguments of pushforward as they were then, but one has been written to "
                "in place since; call pushforward anew, or with a clone() of it"
            )
        if _engine.compiling():
            return _pushed(self._f, self._args, xdots)
        if self._random is None:
            self._random = RandomState()
            return _pushed(self._f, self._args, xdots)
        with restored_after(self._random):
            self._random.restore()
            return _pushed(self._f, self._args, xdots)


def _version(x: Tensor) -> int:
    """How often it was written to, where that is known."""
    return 0 if _engine.compiling() or x.is_inference() or is_wrapped(x) else version_of(x)


@_engine.entry_point
def _pushed(f: Callable[..., Any], args: tuple[Any, ...], xdots: tuple[Any, ...]) -> Any:
    """The tangent of ``f(*args)`` for a tangent per argument."""
    prepared = prepare(args)
    prepared.takes_argnums = False
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
        leaves, kept["spec"] = ([y], None) if isinstance(y, Tensor) else pytree.tree_flatten(y)
        kept["leaves"] = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # torch.func.jvp wants at least one tensor; a function of constants has none
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor)) or primals[:1]

    with _state.differentiation(), _engine.recording_if(keep):
        ys, ydots = _engine.jvp(flat, inputs, tangents, keep)
    # PyTorch takes a tangent of complex128 for what a complex number made of complex64.
    remaining = iter([ydot.to(y.dtype) for y, ydot in zip(ys, ydots, strict=True)])
    leaves = [next(remaining) if leaf is _TENSOR else _zero_like(leaf) for leaf in kept["leaves"]]
    ydot = leaves[0] if kept["spec"] is None else pytree.tree_unflatten(leaves, kept["spec"])
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
