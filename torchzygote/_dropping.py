"""Whether what a function gave depends on more than its argument; ``forwarddiff`` drops such derivatives.

Knows tensors and their levels, nothing of how the function is differentiated.
"""

from __future__ import annotations

from torch import Tensor

from ._torch_private import depends_on_others, has_tangent, layers, maybe_batch_axis, transform_stack

__all__ = ["follows_others"]


def follows_others(x: object, start: int) -> bool:
    """Whether ``x``, of an argument that nobody follows, depends on what somebody may differentiate by.

    ``start``: nodes from there on are of the function itself.
    """
    if not isinstance(x, Tensor):
        return False
    forward = "jvp" in transform_stack()
    return any(
        (layer.requires_grad and (level > 0 or depends_on_others(layer, start)))
        or (forward and level > 0 and maybe_batch_axis(layer) is None and has_tangent(layer))
        for level, layer in layers(x)
    )
