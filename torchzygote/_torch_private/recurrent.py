"""LSTMs by PyTorch's operators, one for each step, in place of oneDNN's, whose backward can't be batched.

``torch.func.vmap`` runs it row by row: 96 rows of 12 steps take 10 ms, where those of the operators take 2. A
row alone is oneDNN's, which has a switch, but for all of the process: it is counted.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from .exchanges import Exchange
from .wants import runs_fused_here

__all__ = ["RECURRENT"]

_C: Any = torch._C
_VF: Any = torch._VF
_lstm: Any = _VF.lstm

_lock = threading.Lock()
_users = 0
_was_on = True


class _Off:
    """Around what is to run without oneDNN."""

    __slots__ = ()

    def __enter__(self) -> None:
        global _users, _was_on
        with _lock:
            if _users == 0:
                _was_on = _C._get_mkldnn_enabled()
                _C._set_mkldnn_enabled(False)
            _users += 1

    def __exit__(self, *error: object) -> None:
        global _users
        with _lock:
            _users -= 1
            if _users == 0:
                _C._set_mkldnn_enabled(_was_on)


def _stepwise_lstm(*args: Any) -> Any:
    if torch.compiler.is_compiling() or runs_fused_here() or not args[0].is_cpu:
        return _lstm(*args)
    with _Off():
        return _lstm(*args)


RECURRENT = (Exchange(_VF, "lstm", _lstm, _stepwise_lstm),)
# TorchScript takes what stands in an operator's place for it.
torch.jit._builtins._register_builtin(_stepwise_lstm, "aten::lstm")
