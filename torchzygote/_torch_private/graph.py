"""The graph that autograd has recorded, and the pass that goes back through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "backward_bytes",
    "backward_pass",
    "custom_nodes",
    "depends_on_others",
    "mark_as_own",
    "misbatched_operation",
    "node_attribute",
    "node_names",
    "node_shape",
    "nonlinear_nodes",
    "reaches",
    "saved_tensors_hooks",
    "sequence_number",
    "source_of",
]


def sequence_number() -> int:
    """The number of the next node that autograd records in this thread: what is older was there before."""
    return int(torch._C._autograd._get_sequence_nr())


def backward_pass() -> int:
    """A number for the backward pass that this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def saved_tensors_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """The pack and unpack hooks in force; a pair that calls them can then be put on top of them.

    ``torch.utils.checkpoint`` keeps its own to itself.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks  # type: ignore[no-any-return]


def custom_nodes(roots: list[Tensor], also: frozenset[str] = frozenset()) -> list[Any]:
    """The nodes below ``roots`` that are not PyTorch's own: Python and C++ autograd functions.

    Their backward need not be differentiable by its cotangent, and may say so by silence. Those of this
    package, which are, say so by a class attribute ``torchzygote_composes``. ``also``: names of others.
    """
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    found: list[Any] = []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            if not getattr(node._forward_cls, "torchzygote_composes", False):  # type: ignore[attr-defined]
                found.append(node)
        elif "CppNode" in (name := node.name()) or name in also:
            found.append(node)
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return found


def mark_as_own(leaf: Tensor) -> None:
    """Note that ``leaf`` was made by this package, and stands for nothing that anybody else holds."""
    leaf._torchzygote_own = True  # type: ignore[attr-defined]


def depends_on_others(root: Tensor, start: int) -> bool:
    """Whether the graph recorded for ``root`` leads to anything but the package's own leaves.

    ``start``: the :func:`sequence_number` from which nodes are not older than the computation itself.
    """
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn if root.grad_fn is not None else source_of(root)[0]]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is None and node._sequence_nr() < start:
            return True
        if leaf is not None and not hasattr(leaf, "_torchzygote_own"):
            return True
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return False


# PyTorch's batching rule of these backwards gives wrong numbers where the rows alone are batched (2.13).
_MISBATCHED = {"CdistBackward0": "torch.cdist"}
# Their derivative by the cotangent is NaN where that is zero (2.13), though they are linear in it.
_NOT_LINEAR_AT_ZERO = frozenset({"LogcumsumexpBackward0"})


def nonlinear_nodes(roots: list[Tensor]) -> list[Any]:
    """The nodes below ``roots`` whose backward isn't known to be differentiable by its cotangent, at zero."""
    return custom_nodes(roots, _NOT_LINEAR_AT_ZERO)


def misbatched_operation(roots: Sequence[Tensor]) -> str | None:
    """An operation below ``roots`` whose backward must not run under ``vmap``; ``None`` if there is none."""
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() in _MISBATCHED:
            return _MISBATCHED[node.name()]
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return None


def source_of(x: Tensor) -> tuple[Any, int]:
    """The node of the graph that stands for ``x``, and which of its outputs ``x`` is."""
    edge = torch.autograd.graph.get_gradient_edge(x)
    return edge.node, edge.output_nr


def node_shape(node: Any, output: int) -> tuple[int, ...]:
    """Shape of an output of a node of the recorded graph; nothing public tells it."""
    return tuple(node._input_metadata[output].shape)


def node_attribute(node: Any, name: str) -> Any:
    """What a node saved besides tensors (a ``dim``, a shape); ``None`` where it has no such thing."""
    return getattr(node, name, None)


def node_names(root: Tensor) -> list[str]:
    """Names of the operations below ``root`` in the recorded graph, each once."""
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return sorted({node.name() for node in seen})


def backward_bytes(roots: list[Tensor], most_nodes: int = 20_000) -> tuple[int, int, str | None]:
    """Bytes of all gradients that one backward pass from ``roots`` makes, and how many operations it takes.

    And the name of one that must not run under ``vmap``, as :func:`misbatched_operation` finds it.

    Read off the recorded graph (``_input_metadata``), without running it: an upper bound of what one row of a
    Jacobian needs while its rows are batched.
    """
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    total = 0
    misbatched = None
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        if len(seen) >= most_nodes:
            misbatched = misbatched or misbatched_operation(roots)
            break
        seen.add(node)
        if node.name() in _MISBATCHED:
            misbatched = _MISBATCHED[node.name()]
        for meta in node._input_metadata:
            total += math.prod(meta.shape) * meta.dtype.itemsize
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return total, len(seen), misbatched


def reaches(roots: list[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the recorded graph leads from ``roots`` to one of these leaves.

    ``torch.autograd.grad`` would tell by computing gradients.
    """
    wanted = {id(leaf) for leaf in leaves}
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return False
