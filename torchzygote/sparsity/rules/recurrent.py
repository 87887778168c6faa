"""Fused recurrent layers: what a step gives depends on the steps before it."""

from __future__ import annotations

from typing import Any

from ._table import CURVED, Call, Context, rule

__all__: list[str] = []


@rule("mkldnn_rnn_layer", curvature=CURVED)
def _recurrent(ctx: Context, call: Call) -> Any:
    """Each sequence of the batch as a whole; the weights, if dependent, reach all of them."""
    united = ctx.everything(call)
    ctx.couple(united)
    return call.spread(united)
