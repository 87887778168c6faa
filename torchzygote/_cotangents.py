"""Cotangents in, gradients out: fitting what the caller gives to what ``f`` returned, and owning results.

Knows nothing of how a cotangent is pulled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import getrefcount
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._arguments import is_inexact
from ._engine import Linearization, recording_if
from ._structure_matching import parts_for
from ._tangent_fitting import fit_cotangent
from ._torch_private import base_of, memory_holders, object_holders, pytree

__all__ = ["laid_out", "own", "unfold_cotangent"]

Result = TypeVar("Result", Tensor, Tensor | None)

_PLAIN = {Tensor, torch.nn.Parameter}  # subclasses needn't have memory of their own


def laid_out(results: list[Tensor | None], params: Sequence[Tensor], keep: bool) -> list[Tensor | None]:
    """``results`` in memory of the order that the parameters' have, as ``backward()`` accumulates them.

    Convolutions give other orders, and a norm that sums in another order rounds differently. ``keep``: they
    are differentiable.
    """
    for i, (x, p) in enumerate(zip(results, params, strict=True)):
        if x is None or x.dim() < 2:
            continue
        if x.is_nested or not x.layout == p.layout == torch.strided or x.stride() == p.stride():
            continue
        like = torch.empty_like(p)
        if like.stride() != x.stride() and x.shape == p.shape:
            with recording_if(keep):
                results[i] = like.copy_(x)
    return results


def own(results: list[Result]) -> list[Result]:
    """``results`` such that the caller may write into each, and nobody else sees it.

    No stride-0 axes, no lazy conjugates or negative views, no memory that somebody else holds: another
    result, a cotangent, or what a hook or a custom backward kept. Whoever calls holds nothing of it himself.
    """
    # Backwards: of several that share memory, the one that comes last has it for itself.
    for i in range(len(results) - 1, -1, -1):
        x = results[i]
        if x is None or type(x) not in _PLAIN:
            continue
        if getrefcount(x) <= _REFERENCES and object_holders(x) <= _USES:
            try:
                holders = memory_holders(x)
            except NotImplementedError:  # sparse
                continue
            if holders == 1:
                continue
            if holders == 2 and _is_alone_with_its_base(x):
                if not x.is_contiguous() and 0 in x.stride():
                    results[i] = x.contiguous()
                continue
        if x.layout is torch.strided:
            results[i] = _copy(x)
    return results


def _is_alone_with_its_base(x: Tensor) -> bool:
    """Whether ``x`` is a view of memory that nobody sees besides, and no lazy conjugate or negative one."""
    base = base_of(x)  # alive, mostly for the view's sake only
    if base is None or x.is_conj() or x.is_neg():
        return False
    return getrefcount(base) <= _BASE_REFERENCES and object_holders(base) <= _BASE_USES


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)  # resolved, too


def _counts(results: Sequence[Tensor], i: int) -> tuple[int, int, int, int]:
    """What :func:`own` counts for a result that nobody else holds: Python's versions differ."""
    x = results[i]
    base = base_of(x)
    assert base is not None
    return getrefcount(x), object_holders(x), getrefcount(base), object_holders(base)


with torch.inference_mode(False):
    _REFERENCES, _USES, _BASE_REFERENCES, _BASE_USES = _counts([torch.empty(1, 1, device="cpu").view(1)], 0)


def unfold_cotangent(lin: Linearization, ybar: Any) -> list[Tensor | None]:
    """One cotangent (or ``None``) per root of ``lin``."""
    if lin.y_spec is None:
        leaves = [ybar]
    else:
        try:
            leaves, spec = pytree.tree_flatten(ybar)
        except AttributeError:  # a dataclass that lacks a field
            spec = None
        if spec != lin.y_spec:
            leaves = parts_for(lin.y, ybar, "ybar")
    cotangents = []
    for leaf, bar in zip(lin.y_leaves, leaves, strict=True):
        fitted = fit_cotangent(leaf, bar)
        if is_inexact(leaf):
            cotangents.append(fitted)
    return cotangents
