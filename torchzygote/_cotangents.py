"""Cotangents in, gradients out: fitting what the caller gives to what ``f`` returned, and owning results.

Knows nothing of how a cotangent is pulled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._arguments import kind_of, number_to_tensor, numpy_to_tensor, type_name
from ._engine import Linearization
from ._parts import parts_for
from ._torch_private import pytree

__all__ = ["own", "unfold_cotangent"]

Result = TypeVar("Result", Tensor, Tensor | None)

_PLAIN = {Tensor, torch.nn.Parameter}  # subclasses needn't have memory of their own


def own(results: list[Result], given: Sequence[Tensor | None] = ()) -> list[Result]:
    """``results`` such that the caller may write into each: no stride-0 axes, no memory shared among them.

    ``given``: tensors of the caller that a result must not share memory with.
    """
    if len(results) == 1 and not given:
        only = results[0]
        if only is None or only.layout is not torch.strided or only.is_contiguous():
            return results
    taken = {x.data_ptr() for x in given if type(x) in _PLAIN and x.layout is torch.strided}  # type: ignore[union-attr]
    for i, x in enumerate(results):
        if x is None or type(x) not in _PLAIN or x.layout is not torch.strided:
            continue
        pointer = x.data_ptr()
        if pointer == 0:
            continue  # no elements
        if pointer in taken:
            results[i] = x.clone(memory_format=torch.contiguous_format)
        elif not x.is_contiguous() and 0 in x.stride():
            results[i] = x.contiguous()
        taken.add(pointer)
    return results


def fit_cotangent(leaf: Any, ybar: Any) -> Tensor | None:
    """``ybar`` as a tensor of the shape and dtype of ``leaf``, ``None`` where nothing is pulled back."""
    if ybar is None:
        return None
    kind = kind_of(ybar)
    if kind == "number":
        cotangent = number_to_tensor(ybar)
    elif kind == "array":
        cotangent = numpy_to_tensor(ybar) if isinstance(ybar, np.ndarray) else ybar
    else:
        raise ValueError(f"ybar: expected what fits y, {type_name(leaf)}, got {type_name(ybar)}")
    shape = leaf.shape if isinstance(leaf, (Tensor, np.ndarray)) else ()
    if not isinstance(leaf, Tensor) and kind_of(leaf) not in ("number", "array"):
        raise ValueError(f"ybar: expected None, as y is {type_name(leaf)} there, got {type_name(ybar)}")
    if tuple(cotangent.shape) != tuple(shape):
        raise ValueError(
            f"ybar: expected the shape of y, {tuple(shape)}, got {type_name(ybar)}; "
            "pass a cotangent for every element of y"
        )
    if not isinstance(leaf, Tensor) or not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
        return None
    if cotangent.dtype.is_complex and not leaf.dtype.is_complex:
        raise ValueError(
            f"ybar: expected a real cotangent for y of dtype {leaf.dtype}, got {type_name(ybar)}"
        )
    if cotangent.dtype != leaf.dtype or cotangent.device != leaf.device:
        cotangent = cotangent.to(dtype=leaf.dtype, device=leaf.device)
    return cotangent


def unfold_cotangent(lin: Linearization, ybar: Any) -> list[Tensor | None]:
    """One cotangent (or ``None``) per root of ``lin``."""
    if lin.y_spec is None:
        leaves = [ybar]
    else:
        leaves, spec = pytree.tree_flatten(ybar)
        if spec != lin.y_spec:
            leaves = parts_for(lin.y, ybar, "ybar")
    cotangents = []
    roots = {id(root) for root in lin.roots}
    for leaf, bar in zip(lin.y_leaves, leaves, strict=True):
        fitted = fit_cotangent(leaf, bar)
        if id(leaf) in roots:
            cotangents.append(fitted)
    return cotangents
