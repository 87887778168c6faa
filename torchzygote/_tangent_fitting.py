"""Tangents and cotangents that the caller gives, as tensors that fit what they belong to.

Knows nothing of what becomes of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arguments import ARRAY, NUMBER, is_inexact, kind_of, number_to_tensor, numpy_to_tensor, type_name

__all__ = ["fit_cotangent", "fit_tangent"]


def fit_tangent(x: Tensor, tangent: Any, where: str) -> Tensor:
    """``tangent`` as a tensor that fits ``x``; anything else is a ``ValueError``."""
    return torch.zeros_like(x) if tangent is None else _fitted(x, tangent, where, "tangent")


def fit_cotangent(leaf: Any, ybar: Any) -> Tensor | None:
    """``ybar`` as a tensor that fits ``leaf``, ``None`` where nothing is pulled back."""
    if ybar is None:
        return None
    if not isinstance(leaf, Tensor) and kind_of(leaf) not in (NUMBER, ARRAY):
        way = "; let f return its to_vector(), which can be pulled back" if hasattr(leaf, "to_vector") else ""
        raise ValueError(f"ybar: expected None, as y is {type_name(leaf)} there, got {type_name(ybar)}{way}")
    cotangent = _fitted(leaf, ybar, "ybar", "cotangent for y")
    return cotangent if is_inexact(leaf) else None


def _fitted(x: Any, given: Any, where: str, what: str) -> Tensor:
    """``given`` as a tensor of the shape of ``x``, and of its dtype and device where ``x`` is a tensor."""
    shape = tuple(x.shape) if isinstance(x, (Tensor, np.ndarray)) else ()
    tensor = _as_tensor(given, where)
    if tensor is None or tuple(tensor.shape) != shape:
        advice = "a number for each element"
        if isinstance(given, (list, tuple)):
            advice = "a tensor of that shape, as torch.tensor(...)"
        raise ValueError(
            f"{where}: expected a {what} of shape {shape}, got {type_name(given)}; pass {advice}, or None "
            "for zeros"
        )
    if not is_inexact(x):
        return tensor
    if tensor.dtype.is_complex and not x.dtype.is_complex:
        raise ValueError(f"{where}: expected a real {what} of dtype {x.dtype}, got {type_name(given)}")
    if tensor.is_meta and not x.is_meta:
        raise ValueError(
            f"{where}: expected a {what} with values, got one on the meta device, which has none; make it on "
            f"{x.device}"
        )
    if tensor.dtype != x.dtype or tensor.device != x.device:
        tensor = tensor.to(dtype=x.dtype, device=x.device)
    return tensor


def _as_tensor(given: Any, where: str) -> Tensor | None:
    """A number or an array as a tensor, ``None`` for anything else."""
    if isinstance(given, Tensor):
        return given if kind_of(given) is ARRAY else None
    kind = kind_of(given)
    try:
        if kind is NUMBER:
            return number_to_tensor(given)
        return numpy_to_tensor(given) if kind is ARRAY else None
    except (TypeError, OverflowError) as error:
        raise type(error)(f"{where}: {error}") from None
