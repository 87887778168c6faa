"""LSTMs by PyTorch's operators, one for each step, in place of oneDNN's, whose backward can't be batched.

``torch.func.vmap`` runs it row by row: 96 rows of 12 steps take 10 ms, where those of the operators take 2.
The operators run where rows may be wanted: as a Jacobian is recorded, and in second derivatives. The switch
is the process's, so that it is counted.
"""

from __future__ import annotations

import threading
from typing import Any

import torch

from .exchanges import Exchange, Exchanges, known_to_torchscript
from .wants import runs_fused_here, under_hooks

__all__ = ["RECURRENT", "forget_recorded", "stepwise"]

_C: Any = torch._C
_VF: Any = torch._VF
_lstm: Any = _VF.lstm

_lock = threading.Lock()
_users = 0
_was_on = True


class _RecurrentState(threading.local):
    """Per thread: how many Jacobians are being recorded."""

    jacobians = 0


_here = _RecurrentState()
_recorded = 0  # in all threads


class stepwise:
    """Around recording a function whose Jacobian is going to be pulled back in many rows."""

    __slots__ = ()

    def __enter__(self) -> None:
        global _recorded
        _here.jacobians += 1
        with _lock:
            _recorded += 1
            if _recorded == 1:
                _STEPS.exchange(back=False)

    def __exit__(self, *error: object) -> None:
        global _recorded
        _here.jacobians -= 1
        with _lock:
            _recorded -= 1
            if _recorded == 0:
                _STEPS.exchange(back=True)


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


def forget_recorded() -> None:
    """In a forked process, by threads that it doesn't have."""
    global _recorded, _users
    _lock._at_fork_reinit()  # type: ignore[attr-defined]
    _recorded = _here.jacobians
    if _users:  # another thread's: nothing forks in the middle of an LSTM
        _users = 0
        _C._set_mkldnn_enabled(_was_on)


def _stepwise_lstm(*args: Any) -> Any:
    fused = torch.compiler.is_compiling() or (_here.jacobians == 0 and runs_fused_here())
    # Autocast knows oneDNN's by name, and not the operators. What runs under a checkpoint's hooks runs again.
    if fused or not args[0].is_cpu or torch.is_autocast_enabled("cpu") or under_hooks():
        return _lstm(*args)
    with _Off():
        return _lstm(*args)


RECURRENT = (Exchange(_VF, "lstm", _lstm, _stepwise_lstm),)
_STEPS = Exchanges(*RECURRENT)
known_to_torchscript(RECURRENT)
