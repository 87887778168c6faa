"""Attention and weight norm by their unfused formulas while a second or a forward derivative is taken.

Fused attention has neither a forward derivative nor (on the CPU) a double backward, and the inference fast
path of PyTorch's transformer layers has no derivative at all; the double backward of fused weight norm is
wrong (2.13). The switches are process-wide, so they are counted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.backends import cuda, mha

from ._torch_private import enable_fused_weight_norm, fused_weight_norm_enabled

__all__ = ["unfused"]

# torch.nn.attention.sdpa_kernel does the same in ten times the time, which small Hessians would feel.
_KERNELS: tuple[tuple[Any, Any], ...] = (
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    (mha.get_fastpath_enabled, mha.set_fastpath_enabled),
    (fused_weight_norm_enabled, enable_fused_weight_norm),
)

_math_is_on: Any = cuda.math_sdp_enabled
_lock = threading.Lock()
_users = 0
_switched_off: list[int] = []
_math_was_on = True


def _enter() -> None:
    global _users, _math_was_on
    with _lock:
        _users += 1
        if _users == 1:
            for position, (is_on, switch) in enumerate(_KERNELS):
                if is_on():
                    switch(False)
                    _switched_off.append(position)
            _math_was_on = _math_is_on()
            if not _math_was_on:
                cuda.enable_math_sdp(True)


def _leave() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            while _switched_off:
                _KERNELS[_switched_off.pop()][1](True)
            if not _math_was_on:
                cuda.enable_math_sdp(False)


class unfused:
    """Around running a function whose derivative the fused kernels lack, or have wrong."""

    __slots__ = ("_leave",)

    def __enter__(self) -> None:
        if not torch.compiler.is_compiling():
            self._leave: Callable[[], None] | None = _leave
            _enter()
        elif fused_weight_norm_enabled():
            # The tracer undoes this at once, and can't follow the rest.
            self._leave = _fuse_weight_norm
            enable_fused_weight_norm(False)
        else:
            self._leave = None

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if self._leave is not None:
            self._leave()


def _fuse_weight_norm() -> None:
    enable_fused_weight_norm(True)
