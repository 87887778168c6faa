"""What a function depends on besides its arguments, found while it runs, and proof that nothing is missing.

Tensors are noted as PyTorch's functions get them. What enters by other ways (a compiled extension, a
scripted module) shows in the recorded graphs, as a node that was there before: then the search has failed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_private import (
    functorch_depth,
    is_wrapped,
    layers,
    outside_functorch,
    pytree,
    recorded_since,
    sequence_number,
    source_of,
    version_of,
)

__all__ = ["ClosureRecorder", "has_version", "needs_name", "reaches_only"]

_PULLBACKS = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


def needs_name(x: Tensor) -> bool:
    """Whether a derivative by ``x`` may be asked for, or ``x`` is bound to a level that may end."""
    return x.requires_grad or is_wrapped(x)


class ClosureRecorder(TorchFunctionMode):
    """Notes the tensors that enter PyTorch's functions, except those made inside and ``arguments``.

    ``tensors``: by which derivatives may be asked for; ``constants``: the others, and their versions.
    """

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []
        self.constants: list[tuple[weakref.ref[Tensor], int]] = []
        # The number that the first node recorded inside will have.
        self.start = sequence_number()
        # A backward pass inside, on a device: its thread numbers the nodes that it records by itself.
        self.misnumbered = False
        self._known = {id(x) for x in arguments}
        self._depth = functorch_depth()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in pytree.tree_iter((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.note(leaf)
                if func in _PULLBACKS and leaf.device.type != "cpu":
                    self.misnumbered = True
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._known.add(id(result))
        else:
            self._known.update(id(leaf) for leaf in pytree.tree_iter(result) if isinstance(leaf, Tensor))
        return result

    def note(self, x: Tensor) -> None:
        """``x`` is used, be it only as a result."""
        if id(x) in self._known:
            return
        for level, layer in layers(x):  # an inner transform of f wraps what comes from outside
            if level <= self._depth:
                x = layer
                break
        if id(x) in self._known:
            return
        if not needs_name(x):
            self._known.add(id(x))
            if not x.is_inference():
                self.constants.append((weakref.ref(x), version_of(x)))
        elif not self._is_made_inside(x):
            self._known.add(id(x))
            self.tensors.append(x)

    def adopt(self, x: Tensor) -> None:
        """``x``, made inside, stands for something from outside."""
        self._known.add(id(x))
        if needs_name(x):
            self.tensors.append(x)

    def _is_made_inside(self, x: Tensor) -> bool:
        """What an inner transform returns comes from no function that we see."""
        return any(
            layer.grad_fn is not None and recorded_since(layer.grad_fn, self.start) for _, layer in layers(x)
        )

    def untouched(self) -> list[tuple[weakref.ref[Tensor], int]]:
        """The constants that weren't written to."""
        return [(ref, version) for ref, version in self.constants if has_version(ref(), version)]

    def finds_all(self, roots: Sequence[Tensor], arguments: Sequence[Tensor]) -> bool:
        """Whether ``roots`` depend on nothing from outside but ``arguments`` and the tensors found."""
        return not self.misnumbered and reaches_only(roots, [*arguments, *self.tensors], self.start)


def has_version(x: Tensor | None, version: int) -> bool:
    """Whether ``x``, if it is still there, was written to ``version`` times; true for wrapped tensors, too.

    Theirs is unknown.
    """
    return x is None or is_wrapped(x) or version_of(x) == version


def reaches_only(roots: Sequence[Tensor], named: Sequence[Tensor], start: int) -> bool:
    """Whether the graphs behind ``roots``, at every level, end in ``named`` and nothing else from before.

    ``start``: the number that the first node recorded since would have.
    """
    edges: dict[int, set[tuple[Any, int]]] = {}
    leaves: dict[int, list[Tensor]] = {}
    for x in named:
        for level, layer in layers(x):
            if layer.grad_fn is not None:
                edges.setdefault(level, set()).add((layer.grad_fn, layer.output_nr))
            elif layer.requires_grad:
                leaves.setdefault(level, []).append(layer)
    for root in roots:
        for level, layer in layers(root):
            if layer.requires_grad and not _level_reaches_only(
                layer, edges.get(level, set()), leaves.get(level, []), start
            ):
                return False
    return True


def _is_node_of(node: Any, leaves: Sequence[Tensor]) -> bool:
    """Whether ``node`` is that of a leaf: a checkpoint that runs again is given one as another tensor."""
    plain = [known for known in leaves if not is_wrapped(known)]
    with outside_functorch():
        return any(source_of(known)[0] is node for known in plain)


def _level_reaches_only(
    root: Tensor, edges: set[tuple[Any, int]], leaves: Sequence[Tensor], start: int
) -> bool:
    if root.grad_fn is None:
        return any(root is leaf for leaf in leaves)
    seen: set[tuple[Any, int]] = set()
    stack = [(root.grad_fn, root.output_nr)]
    while stack:
        edge = stack.pop()
        if edge in edges or edge in seen:
            continue
        seen.add(edge)
        node = edge[0]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if not (any(leaf is known for known in leaves) or _is_node_of(node, leaves)):
                return False
            continue
        if not recorded_since(node, start):
            return False
        stack.extend((following, nr) for following, nr in node.next_functions if following is not None)
    return True
