"""Single nodes of the graph that autograd has recorded: what they saved, and what stands for their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph as _graph

from .levels import vmap_flat
from .walked import keep_number

__all__ = [
    "ValueOfNode",
    "axis_of",
    "count_outputs",
    "curvature_by",
    "custom_function_of",
    "is_leaf",
    "node_attribute",
    "node_name",
    "node_of",
    "node_shape",
    "node_type",
    "pulled_through",
    "pushed_through",
    "recorded_since",
    "saved_by",
    "saves_by_hooks",
    "signed",
    "slopes",
    "source_of",
    "value_at",
    "value_of_node",
]


# Fewer rows take less than vmap does to begin.
_FEW = 8


class ValueOfNode(Tensor):
    """Stands for a value of the recorded graph, which keeps no tensor of it."""

    edge: _graph.GradientEdge
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def value_of_node(node: Any, output: int, number: int | None = None) -> Tensor:
    """What stands for an output of a node where derivatives by it are asked for.

    ``number``: of the differentiation that it was recorded in, if its inputs are new.
    """
    meta = node._input_metadata[output]
    value: Any = torch.empty((), dtype=meta.dtype, device=meta.device).expand(tuple(meta.shape))
    value = value.as_subclass(ValueOfNode)
    value.edge = _graph.GradientEdge(node, output)
    if number is not None:
        keep_number(value, number)
    if meta.dtype.is_floating_point or meta.dtype.is_complex:
        value.requires_grad_()
    return value  # type: ignore[no-any-return]


def node_name(node: Any) -> str:
    """What PyTorch calls the operation; a custom function may have an attribute ``name`` of its own."""
    return str(type(node).name(node))


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


def value_at(value: tuple[Any, int]) -> _graph.GradientEdge:
    """What a backward pass takes for a value of the graph, to bring its cotangent."""
    return _graph.GradientEdge(*value)


def pulled_through(node: Any, position: int, cotangent: Tensor, shape: Sequence[int]) -> Tensor | None:
    """A cotangent pulled back through one node of one output, to what it has in one place, of this shape.

    ``torch.autograd.grad`` adds up what comes to a value by all ways; this is a single one. Where the node
    repeats what it gets, summing that up is left to who calls it.
    """
    found = node(cotangent)
    given = found if isinstance(found, Tensor) else found[position]
    return None if given is None else given.sum_to_size(tuple(shape))


def pushed_through(node: Any, tangents: Sequence[Tensor | None], shape: Sequence[int], keep: bool) -> Tensor:
    """Tangents (directions, *input's) of what goes into a node that is linear in all of it, pushed on.

    The node's backward is its transpose, and that has a transpose again, which is the node. One output.
    """
    given = [(i, t) for i, t in enumerate(tangents) if t is not None]
    with torch.enable_grad():
        cotangent = torch.zeros(tuple(shape), dtype=given[0][1].dtype, device=given[0][1].device)
        cotangent.requires_grad_()
        found = node(cotangent)
        pulled = [(found if isinstance(found, Tensor) else found[i], t) for i, t in given]
        if any(g is None or not g.requires_grad or g.shape != t.shape[1:] for g, t in pulled):
            raise RuntimeError(f"the transpose of {node_name(node)} isn't recorded")
        by = [g for g, _ in pulled]
        rows: list[Tensor] = [t for _, t in pulled]
        if len(rows) == 1 and len(rows[0]) > _FEW:
            push = lambda row: torch.autograd.grad(by, cotangent, row, True, keep)
            return vmap_flat(push, rows[0])[0]
        each = zip(*(t.unbind() for t in rows), strict=True)
        return torch.stack([torch.autograd.grad(by, cotangent, row, True, keep)[0] for row in each])


def slopes(
    node: Any, position: int, value: tuple[Any, int] | None, shape: Sequence[int], like: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """First and second derivative, element by element, of a node that makes each element of one of ``value``.

    ``position``: where the value goes in. ``None`` for the second: it is zero, or nobody asks, as there is
    no ``value``.
    """
    with torch.enable_grad():
        ones = torch.ones(tuple(shape), dtype=like.dtype, device=like.device)
        found = node(ones)
        first = found if isinstance(found, Tensor) else found[position]
        if first.shape != ones.shape:
            raise RuntimeError(f"{node_name(node)} doesn't work element by element")
        second = None
        if value is not None and first.requires_grad:
            edge = _graph.GradientEdge(*value)
            # What a node saved of its result leads back through the node itself.
            (second,) = torch.autograd.grad(first, [edge], ones, True, keep, allow_unused=True)
    if second is not None and second._is_zerotensor():
        second = None
        if sum(before is not None for before, _ in node.next_functions) == 1:
            first = first.detach()  # a graph of zeros, into which some backwards can't write
    return (first, second) if keep else (first.detach(), second)


# Where nodes of each type keep what they saved, as it is kept.
_raw_names: dict[type, tuple[str, ...]] = {}


def saves_by_hooks(node: Any) -> bool:
    """Whether what a node saved is made anew each time that it is asked for, as in a checkpoint.

    Asked for outside of a backward pass, it makes ``torch.utils.checkpoint`` run all again each time.
    """
    names = _raw_names.get(type(node))
    if names is None:
        names = tuple(name for name in dir(node) if name.startswith("_raw_saved_"))
        if type(node).__name__ == node_name(node):  # not a type that many functions share
            _raw_names[type(node)] = names
    for name in names:
        raw = getattr(node, name)
        if isinstance(raw, tuple):
            if any(one.unpack_hook is not None for one in raw):
                return True
        elif raw.unpack_hook is not None:
            return True
    return False


def curvature_by(
    node: Any, position: int, value: tuple[Any, int], cotangent: Tensor, tangents: Tensor, keep: bool
) -> Tensor | None:
    """Curvature of a node of one output: products of its second derivative by ``value`` with tangents.

    ``value`` goes in at ``position``; the derivative is that of the output times its cotangent, which must
    not come of ``value``. Tangents and products have shape (directions, *value's); ``None`` for zeros.
    """
    with torch.enable_grad():
        found = node(cotangent)
        first = found if isinstance(found, Tensor) else found[position]
        if not first.requires_grad:
            return None
        edge = [_graph.GradientEdge(*value)]
        rows = [torch.autograd.grad(first, edge, t, True, keep, allow_unused=True)[0] for t in tangents]
    if any(row is None for row in rows):
        return None
    return torch.stack(rows)


def node_shape(node: Any, output: int) -> tuple[int, ...] | None:
    """Shape of an output of a node of the recorded graph, ``None`` if nested; nothing public tells it."""
    meta = node._input_metadata[output]
    return None if meta.is_nested_tensor else tuple(meta.shape)


def count_outputs(node: Any) -> int:
    """How many values a node gives."""
    return len(node._input_metadata)


def node_type(node: Any, output: int) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of an output of a node."""
    meta = node._input_metadata[output]
    return meta.dtype, meta.device


def multiplications(node: Any) -> int:
    """How many a product of two matrices takes: one pullback to a factor takes as many. 0 for other nodes."""
    for names in (
        ("_saved_self_sym_sizes", "_saved_mat2_sym_sizes"),
        ("_saved_mat1_sym_sizes", "_saved_mat2_sym_sizes"),
    ):
        left, right = (getattr(node, name, None) for name in names)
        if left is not None and right is not None:
            return int(math.prod(left) * right[-1])
    return 0


def recorded_since(node: Any, start: int) -> bool:
    """Whether its thread recorded ``node`` when :func:`sequence_number` was ``start``, or later."""
    return bool(node._sequence_nr() >= start)


def custom_function_of(node: Any) -> Any:
    """The ``torch.autograd.Function`` that made ``node``; ``None`` for PyTorch's own operators."""
    return getattr(node, "_forward_cls", None)


# An operand or a result that a node saved; raises where it was freed, or written into since. Nothing public
# tells what an operation was given, which structure and curvature are read off.
saved_by: Callable[[Any, str], Any] = getattr


def node_attribute(node: Any, name: str) -> Any:
    """The same, mostly of what is no tensor (a ``dim``, a shape); ``None`` where a node has no such thing."""
    return getattr(node, name, None)


def signed(number: Any) -> int:
    """A number that a node saved, which PyTorch keeps without its sign."""
    found = int(number)
    return found - (1 << 64) if found >= 1 << 63 else found


def axis_of(dim: Any, rank: int) -> int:
    """A ``dim`` that a node saved."""
    return signed(dim) % rank if rank else 0
