"""One backward pass: how it is run, and what is asked of the one that runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph as _graph

from .nodes import ValueOfNode
from .passing import passes_leave_their_thread

__all__ = ["at_end_of_pass", "backward_pass", "pull_back", "running_node"]

_run_by_pytorch: Any = getattr(_graph, "_engine_run_backward", None)
_engine: Any = torch.autograd.Variable._execution_engine
_log = logging.getLogger(_graph.__name__)
_PLAIN_TENSORS = frozenset({Tensor, torch.nn.Parameter, _graph.GradientEdge})


def backward_pass() -> int:
    """A number for the backward pass that this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def running_node() -> Any:
    """The node whose backward runs in this thread, or ``None``; nothing public tells."""
    return torch._C._current_autograd_node()


def at_end_of_pass(callback: Callable[[], None]) -> None:
    """Call ``callback`` as the backward pass ends that this thread is in, unless it fails."""
    _engine.queue_callback(callback)


def _run(*args: Any, **options: Any) -> Any:
    """PyTorch's own function keeps the caller's context for other threads, and logs each operation.

    What is kept so is copied for each operation that the pass comes to: 6 microseconds for 12 of them.
    """
    if passes_leave_their_thread() or _log.isEnabledFor(logging.DEBUG):
        return _run_by_pytorch(*args, **options)
    return _engine.run_backward(*args, **options)


# None: this PyTorch may run passes in a way of its own.
_run_backward: Any = None if _run_by_pytorch is None else _run


def pull_back(
    roots: Sequence[Tensor],
    seeds: Sequence[Tensor],
    inputs: Sequence[Tensor | _graph.GradientEdge],
    retain: bool,
    create_graph: bool,
) -> list[Tensor | None]:
    """``torch.autograd.grad``, unused inputs allowed; each seed has the shape of its root.

    The public function looks at its arguments for longer than the backward pass of a small function takes (60
    and 45 microseconds). Subclasses and modes that override it get to see it.
    """
    compiler = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiler is not None and compiler.compiled_autograd_enabled:
        # Compiled passes are cut off where a hook unpacks or a custom function runs, and refuse batched rows.
        with compiler._disable():
            return pull_back(roots, seeds, inputs, retain, create_graph)
    if (
        _run_backward is not None
        and torch._C._len_torch_function_stack() == 0
        and _PLAIN_TENSORS.issuperset(map(type, (*roots, *inputs)))
    ):
        return list(
            _run_backward(
                tuple(roots),
                tuple(seeds),
                retain or create_graph,
                create_graph,
                tuple(inputs),
                True,
                accumulate_grad=False,
            )
        )
    of: list[Any] = [y.edge if isinstance(y, ValueOfNode) else y for y in roots]
    by: list[Any] = [x.edge if isinstance(x, ValueOfNode) else x for x in inputs]
    return list(
        torch.autograd.grad(
            of,
            by,
            seeds,
            retain_graph=retain or create_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    )
