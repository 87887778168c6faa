"""The graph that autograd has recorded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .levels import in_functorch
from .nodes import node_name, node_of, source_of
from .walked import came_before, number_of

__all__ = [
    "consumers_below",
    "depends_on_others",
    "has_hooks",
    "has_nodes_before",
    "hooks_made",
    "is_recorded_by",
    "leads_to",
    "mark_as_own",
    "node_names",
    "reaches",
    "sequence_number",
]


def sequence_number() -> int:
    """The number of the next node that autograd records in this thread: what is older was there before."""
    return int(torch._C._autograd._get_sequence_nr())


def hooks_made() -> int:
    """How many hooks this process has made: whether a function registered any can't be seen in its graph."""
    return int(torch.utils.hooks.RemovableHandle.next_id)


def _nodes_below(starts: Iterable[Any], number: int | None = None) -> Iterator[Any]:
    """The nodes of the recorded graph from these on, each once; ``number`` as for a survey."""
    seen: set[Any] = set()
    stack = [node for node in starts if node is not None]
    while stack:
        node = stack.pop()
        if node in seen or (number is not None and came_before(node, number)):
            continue
        seen.add(node)
        yield node
        stack.extend([following for following, _ in node.next_functions if following is not None])


def is_recorded_by(
    function: type[torch.autograd.Function], roots: Sequence[Tensor], ends: Collection[Any]
) -> bool:
    """Whether this function has recorded a node below ``roots``; ``ends`` as for a survey.

    Half a microsecond for each node.
    """
    kind: Any = function._backward_cls
    seen: set[Any] = {None, *ends}
    stack: list[Any] = [node_of(root) for root in roots]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        if type(node) is kind:
            return True
        seen.add(node)
        stack.extend([following for following, _ in node.next_functions])
    return False


def has_nodes_before(roots: Sequence[Tensor], start: int) -> bool:
    """Whether what has been recorded for ``roots`` begins before :func:`sequence_number` was ``start``."""
    return any(
        getattr(node, "variable", None) is None and node._sequence_nr() < start
        for node in _nodes_below(node_of(root) for root in roots)
    )


def has_hooks(x: Tensor) -> bool:
    """Whether hooks have been registered on ``x``; those on what was computed from it don't show."""
    return bool(x._backward_hooks)


def mark_as_own(leaf: Tensor) -> None:
    """Note that ``leaf`` was made by this package, and stands for nothing that anybody else holds."""
    leaf._torchzygote_own = True  # type: ignore[attr-defined]


def depends_on_others(root: Tensor, start: int) -> bool:
    """Whether the graph recorded for ``root`` leads to anything but the package's own leaves.

    ``start``: the :func:`sequence_number` from which nodes are not older than the computation itself.
    """
    for node in _nodes_below([root.grad_fn if root.grad_fn is not None else source_of(root)[0]]):
        leaf = getattr(node, "variable", None)
        if leaf is None and node._sequence_nr() < start:
            return True
        if leaf is not None and not hasattr(leaf, "_torchzygote_own"):
            return True
    return False


def consumers_below(root: Tensor, inputs: Iterable[Tensor]) -> dict[tuple[Any, int], list[tuple[Any, int]]]:
    """For each value recorded below ``root`` the nodes that it goes into, and in which place of each.

    What was there before the ``inputs`` of the differentiation may be left out.
    """
    found: dict[tuple[Any, int], list[tuple[Any, int]]] = {}
    for node in _nodes_below([root.grad_fn], number_of(inputs)):
        for position, value in enumerate(node.next_functions):
            if value[0] is not None:
                found.setdefault(value, []).append((node, position))
    return found


def node_names(root: Tensor) -> list[str]:
    """Names of the operations below ``root`` in the recorded graph, each once."""
    return sorted({node_name(node) for node in _nodes_below([root.grad_fn])})


def leads_to(node: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether the recorded graph leads from ``node`` to one of the inputs that it was recorded for."""
    if in_functorch():  # inputs are leaves there, and their edges can't be asked for outside of their level
        return _reach([node], inputs)
    return not {source_of(x)[0] for x in inputs}.isdisjoint(_nodes_below([node], number_of(inputs)))


def reaches(roots: list[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the recorded graph leads from ``roots`` to one of these leaves.

    ``torch.autograd.grad`` would tell by computing gradients.
    """
    return _reach((root.grad_fn for root in roots), leaves)


def _reach(starts: Iterable[Any], leaves: Sequence[Tensor]) -> bool:
    wanted = {id(leaf) for leaf in leaves}
    return any(id(getattr(node, "variable", None)) in wanted for node in _nodes_below(starts))
