"""The recorded pullback as a function of its cotangent: what is pulled back through *it* is pushed forward.

Decides where that is known to be right; knows nothing of seeds or matrices.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from . import _engine, _state
from ._engine import Linearization
from ._first_order import FirstOrder
from ._other_ways import another_may_do, is_lack_of_memory
from ._parts import Parts, parts_of
from ._row_cost import is_plain
from ._torch_private import node_name

__all__ = ["Transposed", "or_else", "pulls_as_recorded", "transposed"]

_T = TypeVar("_T")
_log = logging.getLogger("torchzygote")


class Transposed(NamedTuple):
    """A cotangent and what it gives by each input, recorded: it is linear in the cotangent.

    With ``parts`` it is linear in theirs instead.
    """

    cotangent: Tensor
    pulled: list[Tensor | None]
    parts: Parts | None = None

    @property
    def leaves(self) -> list[Tensor]:
        """What it is linear in."""
        return [self.cotangent] if self.parts is None else self.parts.cotangents

    def joined(self, products: Sequence[Tensor | None], rows: int) -> Tensor:
        """Products with the ``leaves`` as one with the cotangent."""
        if self.parts is not None:
            return self.parts.joined(products, rows)
        (product,) = products
        return self.cotangent.new_zeros(rows, *self.cotangent.shape) if product is None else product

    def detached(self) -> tuple[Tensor, list[Tensor | None]]:
        """The cotangent, flat, and what it gives, as any pullback has it."""
        return self.cotangent.detach().reshape(-1), [None if g is None else g.detach() for g in self.pulled]


def pulls_as_recorded(lin: Linearization) -> bool:
    """Whether a pullback that is recorded is any other one: by the same formulas, linear in its cotangent."""
    return type(lin.roots[0]) is Tensor and lin.survey().elementary and is_plain(lin)


def transposed(first: FirstOrder, vector: Tensor | None = None, in_parts: bool = False) -> Transposed | None:
    """``first`` pulled back so that it can be pushed forward; ``None`` where dual numbers are to be taken.

    ``vector``: the cotangent, flat, else ones. ``in_parts``: those of a result of many parts, where it goes.

    ``f`` need not run again. Custom functions are left to dual numbers: a backward that is not differentiable
    by its cotangent would give silent zeros. Tensors that ``f`` finds by identity know no other way outside
    of ``torch.func``, whose transforms exchange them: what can't be had is raised.
    """
    if _engine.compiling() or _engine.in_transform():
        return None
    lin, identical = first.lin, not all(first.prepared.owned)
    if identical:
        _refuse_nonlinear(lin)
    elif first.hooked or lin.survey().nonlinear or lin.survey().fused:
        return None
    try:
        # the caller may have switched autograd off
        with _engine.recording_if(not torch.is_grad_enabled()), _state.pushing():
            # Not zeros, where some backwards are masked, as that of xlogy is.
            like = lin.roots[0]
            u = torch.ones_like(like) if vector is None else vector.to(like).view(like.shape)
            if in_parts and (parts := parts_of(like, u)) is not None:
                by_parts = lin.onward(parts.values, lin.inputs)
                return Transposed(u, by_parts.pull(parts.cotangents, retain=True, create_graph=True), parts)
            u.requires_grad_()
            return Transposed(u, lin.pull([u], retain=True, create_graph=True))
    except Exception as error:
        if identical or is_lack_of_memory(error):
            raise
        return None


def or_else(attempt: Callable[[], _T], known: _T) -> _T:
    """What dual numbers give, or what the tape gave, if they can't be had."""
    try:
        return attempt()
    except Exception as error:
        if not another_may_do(error):
            raise
        _log.debug("dual numbers: %s: %s", type(error).__name__, error)
        return known


def _refuse_nonlinear(lin: Linearization) -> None:
    if custom := lin.survey().nonlinear:
        names = ", ".join(node_name(node).removesuffix("Backward") for node in custom)
        raise RuntimeError(
            "mode 'forward' with Params differentiates the pullback by its cotangent, which is not known to "
            f"be right for custom autograd functions and a few others, found {names}; use mode 'reverse'"
        )
