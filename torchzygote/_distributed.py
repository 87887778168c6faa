"""Modules whose gradients are reduced over processes by ``backward()`` alone, which are refused.

Here nobody calls ``backward()``: what is found is the derivative of this process's own function.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import distributed, nn

__all__ = ["refuse_reduced"]

_AVERAGE = (
    "pass its .module, and average: flat = grads.to_vector(); torch.distributed.all_reduce(flat); "
    "copy_(grads, flat / torch.distributed.get_world_size())"
)
_BACKWARD = "call loss.backward(), which leaves gradients in p.grad"


def _kinds() -> list[tuple[Any, str]]:
    """Such classes, and what to do instead."""
    found: list[tuple[Any, str]] = [(torch.nn.parallel.DistributedDataParallel, _AVERAGE)]
    sharded = sys.modules.get("torch.distributed.fsdp")  # nobody has made one before it was imported
    for name in ("FullyShardedDataParallel", "FSDPModule"):
        if (kind := getattr(sharded, name, None)) is not None:
            found.append((kind, _BACKWARD))
    return found


def refuse_reduced(module: nn.Module) -> None:
    """Raise where ``module`` is one, or holds one."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    kinds = _kinds()
    for name, inside in module.named_modules():
        for kind, instead in kinds:
            if isinstance(inside, kind):
                where = f"submodule {name}" if name else "module"
                raise TypeError(
                    f"{where}: expected a module without a process group, got {kind.__name__}, which reduces "
                    "gradients over processes in backward() alone: a derivative by its parameters would be "
                    f"that of this process; {instead}"
                )
