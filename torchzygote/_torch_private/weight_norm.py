"""Weight norm by its formula: its fused kernel has no switch, and a wrong double backward (2.13)."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor

from .exchanges import Exchange
from .wants import runs_fused_here

__all__ = ["WEIGHT_NORM", "forget_exchanged", "fused_weight_norm_enabled"]

_fused_weight_norm: Any = torch._weight_norm
_old_weight_norm: Any = importlib.import_module("torch.nn.utils.weight_norm")


def _unfused_weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """What ``torch._weight_norm`` itself computes where it has no kernel."""
    if not torch.compiler.is_compiling() and runs_fused_here():
        return _fused_weight_norm(v, g, dim)  # type: ignore[no-any-return]
    return v * (g / torch.norm_except_dim(v, 2, dim))


# ``torch._weight_norm``, and where PyTorch's modules find it.
WEIGHT_NORM = tuple(
    Exchange(holder, "_weight_norm", _fused_weight_norm, _unfused_weight_norm)
    for holder in (torch, _old_weight_norm)
)


def fused_weight_norm_enabled() -> bool:
    """Whether anything still leads to the kernel."""
    return torch._weight_norm is _fused_weight_norm or _old_weight_norm._weight_norm is _fused_weight_norm


def forget_exchanged() -> None:
    """To be called once PyTorch's own functions are back in their places.

    As Dynamo is imported, it notes which objects are PyTorch's functions. Where that happens while others
    stand in for them, it would take these for operators, and look inside no more.
    """
    noted = getattr(sys.modules.get("torch._dynamo.trace_rules"), "get_torch_obj_rule_map", None)
    if noted is not None and noted.cache_info().currsize and _unfused_weight_norm in noted():
        noted.cache_clear()
