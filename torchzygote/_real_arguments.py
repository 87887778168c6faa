"""Arguments of second derivatives, which are real; a Hessian is by one of them.

Knows nothing of how a derivative is computed.
"""

from __future__ import annotations

from typing import Any

import torch

from ._arguments import ARRAY, NUMBER, Prepared, kind_of, prepare, type_name

__all__ = ["prepare_one", "refuse_complex"]


def prepare_one(caller: str, x: Any) -> Prepared:
    """``x`` alone, which must be a real number or array."""
    kind = kind_of(x)
    if kind is not ARRAY and kind is not NUMBER:
        advice = "for several arguments or a module, write f as a function of one flat tensor"
        if callable(x) and not isinstance(x, torch.nn.Module):
            advice = "the function comes first, then x"
        elif isinstance(x, torch.Tensor) and x.dtype is torch.bool:
            advice = "convert it, as in x.float()"
        elif type(x).__name__ == "Params":
            advice = (
                "diaghessian takes Params, and gives the diagonal; for the rows of all of it, take "
                "jacobian(lambda: gradient(f, params).to_vector(), params)"
            )
        raise TypeError(f"{caller}: expected x to be a number or an array, got {type_name(x)}; {advice}")
    prepared = prepare((x,), arrays_only=True)
    prepared.takes_argnums = False
    refuse_complex(caller, prepared)
    return prepared


def refuse_complex(caller: str, prepared: Prepared) -> None:
    """Second derivatives by complex arguments aren't defined here."""
    for x in prepared.inputs:
        if x.dtype.is_complex:
            raise ValueError(
                f"{caller}: expected real arguments, got {type_name(x)}; "
                "write f as a function of the real and imaginary parts (torch.view_as_real)"
            )
