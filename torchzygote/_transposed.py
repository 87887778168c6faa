"""The recorded pullback as a function of its cotangent: what is pulled back through *it* is pushed forward.

Decides where that is known to be right; knows nothing of seeds or matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import _engine, _state
from ._engine import Linearization
from ._first_order import FirstOrder
from ._torch_private import node_name

__all__ = ["Transposed", "transposed"]


class Transposed(NamedTuple):
    """A cotangent, zero, and what it gives by each input, recorded: it is linear in the cotangent."""

    cotangent: Tensor
    pulled: list[Tensor | None]


def transposed(first: FirstOrder) -> Transposed | None:
    """``first`` pulled back so that it can be pushed forward; ``None`` where dual numbers are to be taken.

    ``f`` need not run again. Custom functions are left to dual numbers: a backward that is not differentiable
    by its cotangent would give silent zeros. Tensors that ``f`` finds by identity know no other way outside
    of ``torch.func``, whose transforms exchange them: what can't be had is raised.
    """
    if _engine.compiling() or _engine.in_transform():
        return None
    lin, identical = first.lin, not all(first.prepared.owned)
    if identical:
        _refuse_nonlinear(lin)
    elif first.hooked or lin.survey().nonlinear:
        return None
    try:
        # the caller may have switched autograd off
        with _engine.recording_if(not torch.is_grad_enabled()), _state.pushing():
            u = torch.zeros_like(lin.roots[0]).requires_grad_()
            return Transposed(u, lin.pull([u], retain=True, create_graph=True))
    except Exception:
        if identical:
            raise
        return None


def _refuse_nonlinear(lin: Linearization) -> None:
    if custom := lin.survey().nonlinear:
        names = ", ".join(node_name(node).removesuffix("Backward") for node in custom)
        raise RuntimeError(
            "mode 'forward' with Params differentiates the pullback by its cotangent, which is not known to "
            f"be right for custom autograd functions and a few others, found {names}; use mode 'reverse'"
        )
