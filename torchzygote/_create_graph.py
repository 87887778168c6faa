"""Whether results keep a graph (``create_graph``), which makes them differentiable themselves.

Knows nothing of how they are computed.
"""

from __future__ import annotations

import contextlib
from typing import NoReturn

import torch

from . import _state
from ._call_options import check_flags
from ._state import in_outer_forward_mode, in_transform
from ._torch_private import in_functorch_derivative

__all__ = ["compiling", "keeps_graph", "recording_if", "refuse_export", "refuse_recorder"]


def compiling() -> bool:
    """Whether ``torch.compile`` is tracing us.

    Its own function, so that Dynamo evaluates it at each graph break.
    """
    return torch.compiler.is_compiling()


def keeps_graph(create_graph: bool | None) -> bool:
    """Whether results must be differentiable themselves."""
    if create_graph is not None:
        check_flags(create_graph=create_graph)
    if compiling():
        return True
    if create_graph or (create_graph is not None and not in_transform()):
        return bool(create_graph)  # NumPy's, too
    if in_functorch_derivative() or in_outer_forward_mode():
        return True
    return torch.is_grad_enabled() and (_state.deriving() or _state.in_recorded_pass())


def recording_if(keep: bool) -> contextlib.AbstractContextManager[None]:
    """Autograd switched on where results keep a graph; without one, nothing needs to be recorded."""
    return torch.enable_grad() if keep and not compiling() else contextlib.nullcontext()


def refuse_export() -> None:
    """Refuse what is being recorded to be exported: the program would lack the backward pass.

    Dynamo raises an error of its own where it exports; as it compiles, older ones take this for that.
    """
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        refuse_recorder("torch.export", "export")


def refuse_recorder(tracer: str, verb: str) -> NoReturn:
    """Refuse a tracer that doesn't follow a backward pass."""
    raise RuntimeError(
        f"{tracer} doesn't follow derivatives in reverse mode, torch.func's and torch.autograd's included; "
        f"{verb} the function that is differentiated, compile the derivative (torch.compile), or trace it "
        "with torch.fx.experimental.proxy_tensor.make_fx"
    )
