"""What can be a member of Params, and what is said of the rest.

Knows tensors, and nothing of sets.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ._arguments import is_inexact, is_number
from ._buffer.refusal import NotATensor
from ._multi_tensor import describe

__all__ = ["advice", "checked", "what"]


def checked(p: Tensor) -> Tensor:
    """``p``, if it can be a member."""
    if not is_inexact(p):
        raise TypeError(
            f"Params: expected tensors of floating or complex dtype, got {what(p)}; there is no derivative "
            "by integers or bools: convert it, as in x.float(), and let f use that"
        )
    return p


def what(x: object) -> str:
    """``x`` for a message."""
    if isinstance(x, Tensor):
        return f"a tensor {describe(x)}"
    if is_number(x):
        return f"the number {x}"
    return f"a {type(x).__name__}"


def advice(x: object) -> str:
    """What to give in place of ``x``, which is no tensor."""
    if is_number(x):
        return ", which has no identity that f could close over: make it a tensor, as in torch.tensor(2.0)"
    if isinstance(x, (np.ndarray, np.generic)):
        return ", which f can't be differentiated by: make it a tensor, as in torch.from_numpy(x)"
    if isinstance(x, NotATensor):
        return ", whose rows f doesn't use: copy it first, as in buf.copy(), and let f use that"
    if isinstance(x, str):
        return "; for (name, tensor) pairs write Params(dict(pairs))"
    return ""
