"""One pushforward: tangents that fit their inputs, and PyTorch's forward mode around ``f``.

Knows nothing of matrices, chunks or results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _state
from ._arguments import Prepared
from ._exchange import forward_mode_held
from ._tangent_fitting import fit_tangent
from ._torch_private import (
    batched_like,
    in_functorch,
    jvp_flat,
    load_decompositions,
    nested_batches_watched,
    nested_tangents_watched,
    operators_pushed,
    pushed_by_formulas,
)
from ._unfused import unfused

__all__ = ["forward_mode", "jvp", "tangents_for"]


def tangents_for(
    prepared: Prepared, xdots: Sequence[Any], inputs: Sequence[Tensor], keep: bool
) -> list[Tensor]:
    """A tangent per input, from one per argument; ``keep``: with the graph that it has."""
    tangents: list[Tensor] = []
    for position, xdot in enumerate(xdots):
        where = f"push: tangent {position}"
        for value in [xdot] if prepared.simple else prepared.slots[position].match(xdot, where):
            tangent = fit_tangent(inputs[len(tangents)], value, where)
            # A copy, with an element for each: f may write into its argument, and may return a view of it.
            tangents.append((tangent if keep else tangent.detach()).clone())
    return tangents


def _pushed(
    f: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Any, ...]:
    try:
        return jvp_flat(f, inputs, tangents)
    except RuntimeError as error:
        if "Nested forward mode AD" in str(error):
            raise RuntimeError(
                "forward mode can't be had inside plain forward mode (torch.autograd.forward_ad, "
                "torch.func.linearize): PyTorch allows one of them at a time; use reverse mode for this "
                "derivative, or torch.func.jvp around it"
            ) from error
        raise


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """PyTorch's forward-AD levels are process-wide: one thread at a time."""
    if torch.compiler.is_compiling():
        with unfused():
            yield
        return
    load_decompositions()
    with forward_mode_held(), _state.forward_mode_opened(), unfused():
        yield


def jvp(
    f: Callable[..., tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    tangents: Sequence[Tensor],
    keep: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``f(*inputs)``, a tuple of tensors, and its derivative along ``tangents``.

    ``keep``: the derivative is going to be differentiated itself.
    """
    if not torch.compiler.is_compiling() and in_functorch():
        tangents = [batched_like(t, x) for t, x in zip(tangents, inputs, strict=True)]
    with forward_mode():
        if torch.compiler.is_compiling():
            pushed: tuple[Any, ...] = torch.func.jvp(f, tuple(inputs), tuple(tangents))
        else:
            with (
                nested_batches_watched(),
                nested_tangents_watched(),
                operators_pushed(),
                pushed_by_formulas() if keep else contextlib.nullcontext(),
            ):
                pushed = _pushed(f, inputs, tangents)
    return pushed[0], pushed[1]
