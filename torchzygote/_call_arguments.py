"""What a call differentiates by: its arguments, or one Params in their place.

The entry points' first step. It must not know how a derivative is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from ._arguments import Prepared, prepare, refuse_unrecordable
from ._create_graph import compiling, keeps_graph
from .params import Params

__all__ = ["implicit", "is_implicit", "prepare_call", "prepared_by"]


def is_implicit(args: tuple[Any, ...]) -> bool:
    """Whether a call differentiates by ``Params``."""
    return len(args) == 1 and isinstance(args[0], Params)


def implicit(args: tuple[Any, ...]) -> Params | None:
    """The ``Params`` of an implicit call as they are now, or ``None`` for a call with arguments."""
    return args[0]._taken() if is_implicit(args) else None


def prepared_by(
    caller: str, args: tuple[Any, ...], argnums: int | Sequence[int] | None, *, arrays_only: bool = False
) -> tuple[Params | None, Prepared]:
    """The ``Params``, if they are what is differentiated by, and the arguments as tensors."""
    params = args[0]._taken() if is_implicit(args) else None  # not by `implicit`: small calls wait for this
    if params is not None:
        return params, _prepare_implicit(caller, params, argnums)
    return None, prepare(args, argnums, arrays_only=arrays_only)


def prepare_call(
    caller: str,
    args: tuple[Any, ...],
    argnums: int | Sequence[int] | None,
    create_graph: bool | None,
    *,
    arrays_only: bool = False,
) -> tuple[Params | None, Prepared, bool]:
    """As :func:`prepared_by`, and whether results must be differentiable."""
    params, prepared = prepared_by(caller, args, argnums, arrays_only=arrays_only)
    keep = keeps_graph(create_graph)
    if keep:
        prepared.copy_arrays()
    return params, prepared, keep


def _prepare_implicit(caller: str, params: Params, argnums: object) -> Prepared:
    """The arguments of a call with ``Params``: none, and tensors that ``f`` finds by identity."""
    if argnums is not None:
        raise TypeError(f"{caller}: argnums goes with arguments, got {argnums!r} together with Params")
    if compiling():
        raise RuntimeError(
            f"{caller}: inside torch.compile, Params can't be differentiated by identity; pass the "
            "tensors as arguments (torch.func.functional_call calls a module with them)"
        )
    tensors = list(params)
    if any(map(is_lazy, tensors)) or any(map(Tensor.is_inference, tensors)):
        for p in tensors:
            refuse_unrecordable(p, params._names.get(id(p), "a tensor"))
    prepared = Prepared(())
    prepared.inputs = tensors
    prepared.owned = [False] * len(prepared.inputs)
    return prepared
