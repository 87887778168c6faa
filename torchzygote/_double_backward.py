"""What a pullback can't be trusted with: a second derivative that PyTorch would get wrong, silently.

Knows nodes of the recorded graph, nothing of arguments or results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from ._custom_backwards import checked_copies, checked_custom_functions, hooked
from ._error_notes import pulled
from ._torch_private import is_recorded_by, leads_to, node_name, pull_back, pulled_by_formula, survey

__all__ = [
    "are_norms_refused",
    "pulled_for_another",
    "pulled_inside",
    "refuse_reentrant",
    "refuse_twice",
]


def pulled_for_another(
    roots: Sequence[Tensor],
    seeds: list[Tensor],
    inputs: Sequence[Tensor],
    retain: bool,
    custom: list[Any],
    sparse: list[Any],
    rewritten: list[Any],
    copies: list[Any],
) -> list[Tensor | None]:
    """A recorded pullback through nodes, some at least, that have to be watched or put right for another."""
    with hooked(rewritten, _gradient_for) if rewritten else contextlib.nullcontext(), checked_copies(copies):
        if sparse or not custom:
            with _checked_sparse_tensors(sparse) if sparse else contextlib.nullcontext():
                results = pulled(roots, seeds, inputs, retain or bool(custom), True)
        if custom:  # by cotangents that depend on themselves, which sparse tensors must not see
            with checked_custom_functions(custom, seeds) as checked:
                results = pulled(roots, checked, inputs, True, True)
    return results


@contextlib.contextmanager
def _checked_sparse_tensors(nodes: list[Any]) -> Iterator[None]:
    """Around a pullback that must be differentiable: refuse what sparse tensors would cut off, silently.

    A cotangent that depends on nothing may pass: the derivative is linear there. ``nodes``: those of the
    sparse tensors.
    """

    def refuse(cotangents: Sequence[Any]) -> None:
        if any(isinstance(c, Tensor) and c.requires_grad for c in cotangents):
            raise RuntimeError(
                "f can't be differentiated twice: it computes with a sparse tensor, whose gradient PyTorch "
                "can't follow any further; take the values by plan.values(...), or a dense matrix by "
                "dense=True or without sparse=True"
            )

    handles = [node.register_prehook(refuse) for node in nodes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pulled_inside(
    roots: Sequence[Tensor], seeds: Sequence[Tensor], inputs: Sequence[Tensor], keep: bool
) -> list[Tensor | None]:
    """A pullback of a run inside of a backward pass; ``keep``: it is recorded, and put right for another."""
    found = survey(roots, (), inputs) if keep else None
    rewritten = [] if found is None else found.running + found.biased
    with hooked(rewritten, _gradient_for) if rewritten else contextlib.nullcontext():
        return pull_back(roots, seeds, inputs, False, keep)


def _gradient_for(node: Any) -> Callable[..., Any]:
    """What puts a gradient in place of that of ``node``, which is right, but can't be differentiated."""
    name = node_name(node)
    return _running_gradient(node) if "Logcumsumexp" in name else _summed_bias("LayerNorm" in name)


def _running_gradient(node: Any) -> Callable[..., Any]:
    def hook(results: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        if results[0] is None or cotangents[0] is None:
            return None
        found = pulled_by_formula(node, cotangents[0])
        return None if found is None else (found,)

    return hook


def _summed_bias(of_layer: bool) -> Callable[..., Any]:
    """Gradients by the biases of normalizations without a weight are sums of cotangents.

    PyTorch's are too, but autograd takes them for constants.
    """

    def hook(results: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        bias, cotangent = results[2], cotangents[0]
        if bias is None or cotangent is None:
            return None
        batch = range(cotangent.dim() - bias.dim()) if of_layer else {*range(cotangent.dim())} - {1}
        # no axes would mean all of them
        total = cotangent.sum(tuple(batch), dtype=bias.dtype) if batch else cotangent.to(bias.dtype)
        return (*results[:2], total, *results[3:])

    return hook


def refuse_reentrant(roots: list[Tensor], ends: Collection[Any]) -> None:
    """Refuse what hides the tensors that a function closes over: they would seem unused.

    ``ends``: as for :func:`survey`.
    """
    if is_recorded_by(CheckpointFunction, roots, ends):
        raise RuntimeError(
            "f calls torch.utils.checkpoint with use_reentrant=True, which can't be differentiated "
            "by what the checkpointed function closes over; pass use_reentrant=False, or use "
            "torchzygote.checkpointed"
        )


_NORMS = "norm's gradient"
_WRONG_TWICE = {
    "weight_norm": (
        "second derivative of torch._weight_norm's fused kernel takes norms for constants; call "
        "torch.nn.utils.parametrizations.weight_norm's module inside f, or write v * (g / v.norm(...))"
    ),
    _NORMS: (
        "third derivative through layer_norm, batch_norm or instance_norm takes mean and deviation for "
        "constants; call them as torch.nn.functional.layer_norm and the like, not by names bound before, and "
        "take gradients outside of f by torchzygote.gradient"
    ),
    "sparse_coo_tensor": (
        "second derivative by the values of torch.sparse_coo_tensor is zero; make a dense tensor of them, as "
        "with torch.zeros(...).index_put((i, j), values, accumulate=True)"
    ),
}


def refuse_twice(operations: Sequence[tuple[str, Any]], inputs: Sequence[Tensor]) -> None:
    """Refuse a second derivative that PyTorch gets wrong, silently: mostly it would be zero."""
    for name, source in operations:
        if leads_to(source, inputs):
            wrong = _WRONG_TWICE.get(name) or (
                f"derivative of {name}'s gradient by its bias fails where there is no weight; "
                "pass weight=torch.ones(...) with the bias"
            )
            raise RuntimeError(
                f"f can't be differentiated twice, or its pullback by a cotangent: PyTorch's {wrong}"
            )


def are_norms_refused(operations: Sequence[tuple[str, Any]], inputs: Sequence[Tensor]) -> bool:
    """Whether :func:`refuse_twice` would refuse this for norms, which their formulas would be right for."""
    return any(name == _NORMS and leads_to(source, inputs) for name, source in operations)
