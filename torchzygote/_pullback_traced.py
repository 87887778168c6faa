"""``torch.func.vjp`` whose pullback may be called in another trace than its own. Imported only while tracing.

Where a graph breaks inside of ``f``, what comes after is compiled by itself, and the tracer of PyTorch 2.10
and 2.11 makes zeros of a pullback that it hasn't seen made. It runs uncompiled there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._torch_private import trace_name

__all__ = ["vjp_traced"]

_trace = torch.compiler.assume_constant_result(trace_name)  # type: ignore[no-untyped-call]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _uncompiled(pull: Callable[..., Any], cotangents: tuple[Tensor, ...]) -> Any:
    return pull(cotangents)


def vjp_traced(f: Callable[..., Any], *inputs: Tensor) -> tuple[Any, ...]:
    """``torch.func.vjp(f, *inputs, has_aux=True)``."""
    made_in = _trace()
    made: tuple[Any, ...] = torch.func.vjp(f, *inputs, has_aux=True)
    roots, pull, aux = made

    def pull_anywhere(cotangents: tuple[Tensor, ...]) -> Any:
        return pull(cotangents) if _trace() == made_in else _uncompiled(pull, cotangents)

    return roots, pull_anywhere, aux
