"""To what float32 factors are rounded before they are multiplied, where a backend is allowed to.

A product and the parts that explain it may then differ by more than float32 would have it.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["rounding_of_convolutions", "rounding_of_products"]

_backends: Any = torch.backends
_SPACING = {"tf32": 2.0**-10, "bf16": 2.0**-7}


def rounding_of_products(device: str) -> float:
    """Relative spacing of what matrix products of float32 multiply on devices of this type; 0: their own."""
    if device == "cuda":
        return _coarsest(_backends.cuda.matmul)
    return _coarsest(_backends.mkldnn.matmul) if device == "cpu" else 0.0


# The tracer can't follow the question, and takes its answer for a constant: what
# torch.compiler.assume_constant_result does, after it has imported Dynamo, which takes seconds.
rounding_of_products._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rounding_of_convolutions(device: torch.device, dtype: torch.dtype) -> float:
    """The same of convolutions and recurrent layers, which have settings of their own."""
    if dtype != torch.float32:
        return 0.0
    if device.type == "cuda":
        return _coarsest(_backends.cudnn.conv, _backends.cudnn.rnn)
    return _coarsest(_backends.mkldnn.conv, _backends.mkldnn.rnn) if device.type == "cpu" else 0.0


def _coarsest(*settings: Any) -> float:
    return max(_SPACING.get(setting.fp32_precision, 0.0) for setting in settings)
