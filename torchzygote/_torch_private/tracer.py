"""What the tracer of ``torch.compile`` gets wrong silently in some versions, and which trace is going on."""

from __future__ import annotations

import torch
from torch._guards import CompileContext

__all__ = ["known_to_be_one", "trace_name", "tracer_follows_lower_hooks", "tracer_follows_pullbacks"]

# Compiling a call of what torch.func.vjp returned outside of that graph gives zeros in 2.10 and 2.11.
tracer_follows_pullbacks: bool = torch.__version__ >= "2.12"
# 2.11 and 2.12 put a custom function in the place of the variable that a hook is registered on: what was made
# of this tensor before doesn't see the hook, and second derivatives through it are zeros.
tracer_follows_lower_hooks: bool = torch.__version__ >= "2.13"


def known_to_be_one(size: int) -> bool:
    """Whether a size is 1; ``False`` where it depends on values that the tracer doesn't know.

    Asked in the plain way, the tracer gives up there; nothing public asks otherwise.
    """
    if not torch.compiler.is_compiling():
        return size == 1
    # Half a second to import, and the tracer has done it.
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(size == 1)


def trace_name() -> str:
    """The name of the trace that is going on, another one for each part that a graph break leaves.

    Nothing public tells one from another.
    """
    return str(CompileContext.current_compile_id())
