"""Single nodes of the graph that autograd has recorded: what they saved, and what stands for their values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph as _graph

__all__ = [
    "ValueOfNode",
    "axis_of",
    "is_leaf",
    "node_attribute",
    "node_of",
    "node_shape",
    "pulled_through",
    "signed",
    "source_of",
    "value_of_node",
]


class ValueOfNode(Tensor):
    """Stands for a value of the recorded graph, which keeps no tensor of it."""

    edge: _graph.GradientEdge
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def value_of_node(node: Any, output: int) -> Tensor:
    """What stands for an output of a node where derivatives by it are asked for."""
    meta = node._input_metadata[output]
    value: Any = torch.empty((), dtype=meta.dtype, device=meta.device).expand(tuple(meta.shape))
    value = value.as_subclass(ValueOfNode)
    value.edge = _graph.GradientEdge(node, output)
    if meta.dtype.is_floating_point or meta.dtype.is_complex:
        value.requires_grad_()
    return value  # type: ignore[no-any-return]


def source_of(x: Tensor) -> tuple[Any, int]:
    """The node of the graph that stands for ``x``, and which of its outputs ``x`` is."""
    edge = x.edge if isinstance(x, ValueOfNode) else _graph.get_gradient_edge(x)
    return edge.node, edge.output_nr


def is_leaf(x: Tensor) -> bool:
    """Whether ``x`` is what a graph begins with, so that a node at its end has ``x`` for its ``variable``."""
    return type(x) is not ValueOfNode and x.grad_fn is None


def node_of(x: Tensor) -> Any:
    """What ``x`` was recorded by, or what it stands for; ``None`` if it isn't the result of anything."""
    return x.edge.node if type(x) is ValueOfNode else x.grad_fn


def pulled_through(node: Any, position: int, cotangent: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A cotangent pulled back through one node of one output, to what it has in one place, of this shape.

    ``torch.autograd.grad`` adds up what comes to a value by all ways; this is a single one. Where the node
    repeats what it gets, summing that up is left to who calls it.
    """
    found = node(cotangent)
    given = found if isinstance(found, Tensor) else found[position]
    return None if given is None else given.sum_to_size(tuple(shape))


def node_shape(node: Any, output: int) -> tuple[int, ...] | None:
    """Shape of an output of a node of the recorded graph, ``None`` if nested; nothing public tells it."""
    meta = node._input_metadata[output]
    return None if meta.is_nested_tensor else tuple(meta.shape)


def node_attribute(node: Any, name: str) -> Any:
    """What a node saved besides tensors (a ``dim``, a shape); ``None`` where it has no such thing."""
    return getattr(node, name, None)


def signed(number: Any) -> int:
    """A number that a node saved, which PyTorch keeps without its sign."""
    found = int(number)
    return found - (1 << 64) if found >= 1 << 63 else found


def axis_of(dim: Any, rank: int) -> int:
    """A ``dim`` that a node saved."""
    return signed(dim) % rank if rank else 0
