"""Custom functions whose backward leaves autograd: noticed while their gradient is recorded for another.

PyTorch gives zeros, silently, for a backward that leaves autograd (NumPy, ``detach``), and even for
``once_differentiable`` as long as no cotangent requires grad. Knows nodes of the recorded graph and what
passes through them.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ._other_ways import cut_off
from ._torch_private import (
    hides_another,
    is_compiled_function,
    node_name,
    recorded_since,
    sequence_number,
    source_of,
)

__all__ = ["checked_copies", "checked_custom_functions", "hooked"]

_ERROR = "torch::autograd::Error"


@contextlib.contextmanager
def hooked(nodes: Sequence[Any], hook_for: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """While each of the nodes has its hook, which gets what the node gives and what it was given."""
    handles = [node.register_hook(hook_for(node)) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _RecordedPullback:
    """A recorded pullback, from where its first nodes are recorded."""

    def __init__(self) -> None:
        self._start = sequence_number()
        self._thread = threading.get_ident()

    def leads(self, node: Any, ends: Collection[Any]) -> bool:
        """Whether what was recorded for ``node`` since leads to one of ``ends``: near ones come first."""
        counts = threading.get_ident() == self._thread  # each thread numbers its nodes
        seen: set[Any] = set()
        queue = deque([node])
        while queue:
            node = queue.popleft()
            if node is None or node in seen:
                continue
            if node in ends:
                return True
            seen.add(node)
            if not counts or recorded_since(node, self._start):
                queue.extend(following for following, _ in node.next_functions)
        return False


def _ends(cotangents: Sequence[Any]) -> set[Any]:
    return {source_of(c)[0] for c in cotangents if isinstance(c, Tensor) and c.requires_grad}


@contextlib.contextmanager
def checked_custom_functions(nodes: list[Any], seeds: list[Tensor]) -> Iterator[list[Tensor]]:
    """Around a pullback that must be differentiable: refuse custom functions whose backward isn't.

    The cotangents require grad, and each result of a custom backward must be connected to them, or zero for
    any of them. ``nodes``: those of the custom functions.
    """
    _refuse_compiled(nodes)
    here = _RecordedPullback()
    probes: list[_DensePass] = []

    def check(node: Any) -> Callable[..., None]:
        def hook(results: Sequence[Any], cotangents: Sequence[Any]) -> None:
            if probes:
                probes[-1].look(node, results)
                return
            ends = _ends(cotangents)
            for place, result in enumerate(results if ends else ()):
                if not isinstance(result, Tensor) or not _is_cut_off(here, node, result, ends):
                    continue
                if bool(result.any()) or _DensePass(node).is_nonzero(place, cotangents, probes):
                    raise cut_off(_refusal(node))

        return hook

    with hooked(nodes, check):
        with torch.enable_grad():  # not leaves: a backward may write into its cotangent
            watched = [
                seed if seed.requires_grad else seed.detach().requires_grad_().clone() for seed in seeds
            ]
        yield watched


def _is_cut_off(here: _RecordedPullback, node: Any, result: Tensor, ends: set[Any]) -> bool:
    source = source_of(result)[0] if result.requires_grad else None
    if source is not None and node_name(source) == _ERROR:
        raise RuntimeError(_refusal(node))  # forward mode may do: it is on where recording is off
    return source is None or not here.leads(source, ends)


class _DensePass:
    """Another pass through one node, for dense cotangents: at an optimum those of the first are zero."""

    def __init__(self, node: Any) -> None:
        self._node = node
        self._results: Sequence[Any] = ()

    def look(self, node: Any, results: Sequence[Any]) -> None:
        if node is self._node:
            self._results = results

    def is_nonzero(self, place: int, cotangents: Sequence[Any], probes: list[_DensePass]) -> bool:
        """Whether a result that is zero for these cotangents isn't zero for all."""
        given = [(k, c) for k, c in enumerate(cotangents) if isinstance(c, Tensor)]
        outputs = [GradientEdge(self._node, k) for k, _ in given]
        dense = [_dense(c) if c.requires_grad else c for _, c in given]
        probes.append(self)
        try:
            torch.autograd.grad(
                outputs, [GradientEdge(*self._node.next_functions[place])], dense, retain_graph=True
            )
        except Exception:  # it doesn't take any cotangent
            return False
        finally:
            probes.pop()
        found = self._results[place] if self._results else None
        return isinstance(found, Tensor) and bool(found.any())


def _dense(like: Tensor) -> Tensor:
    dense = torch.linspace(0.5, 1.5, like.numel(), dtype=torch.float64, device=like.device)
    return dense.to(like.dtype).view(like.shape)


@contextlib.contextmanager
def checked_copies(nodes: list[Any]) -> Iterator[None]:
    """Around the same, for operations that write into views: their own node, custom or not, is hidden.

    Only where the cotangent depends on something. What is written over has no gradient, which is right.
    """
    here = _RecordedPullback()

    def check(node: Any) -> Callable[..., None]:
        def hook(results: Sequence[Any], cotangents: Sequence[Any]) -> None:
            result, cotangent = results[0], cotangents[0]
            if not (isinstance(result, Tensor) and isinstance(cotangent, Tensor) and cotangent.requires_grad):
                return
            copied = source_of(result)[0] if result.requires_grad else None
            if copied is None or not hides_another(copied) or len(copied.next_functions) < 2:
                return
            source = copied.next_functions[1][0]
            if source is not None and node_name(source) == _ERROR:
                raise RuntimeError(_refusal(None))
            if source is not None and here.leads(source, _ends(cotangents)):
                return
            with torch.no_grad():
                if _went_through(_as_real(result), _as_real(cotangent)):
                    raise cut_off(_refusal(None))

        return hook

    with hooked(nodes, check):
        yield


def _as_real(x: Tensor) -> Tensor:
    """Real and imaginary parts by themselves: a view may be of one of them."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _went_through(result: Tensor, cotangent: Tensor) -> bool:
    """Whether anything of the cotangent has gone through a node that may zero it, or else has changed it."""
    passed = (result != cotangent) & (result != 0)
    return bool(passed.any()) and bool((passed & (result == result)).any())


def _refusal(node: Any) -> str:
    what = "a custom autograd function that writes into a view"
    if node is not None:
        what = f"the custom autograd function {node_name(node).removesuffix('Backward')}"
    return (
        f"f can't be differentiated twice: the backward of {what} gives a gradient that autograd can't "
        "follow; write it with differentiable PyTorch operations"
    )


def _refuse_compiled(nodes: list[Any]) -> None:
    if any(map(is_compiled_function, nodes)):
        # Its backward is another compiled function, cut off from what the first one was given.
        raise RuntimeError(
            "f can't be differentiated twice: it calls a function made with torch.compile, whose backward "
            "autograd can't follow; call the uncompiled function here, and compile what differentiates it"
        )
    if any("linear_cross_entropy_batch_chunked" in node_name(node) for node in nodes):
        raise RuntimeError(
            "f can't be differentiated twice: torch.nn.functional.linear_cross_entropy with chunked options "
            "computes its gradients as it runs, where autograd can't follow; leave options out"
        )
