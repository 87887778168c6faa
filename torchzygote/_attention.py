"""Attention by its unfused formula while a second or a forward derivative is taken.

Fused kernels have neither a forward derivative nor (on the CPU) a double backward, and the inference fast path
of PyTorch's transformer layers has no derivative at all. Both switches are process-wide, so they are counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["unfused_attention"]


class _Switch:
    """Off for as long as anybody needs it off."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._fast_path = True
        self._restore = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._restore.enter_context(sdpa_kernel(SDPBackend.MATH))
                self._fast_path = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                torch.backends.mha.set_fastpath_enabled(self._fast_path)
                self._restore.close()


_switch = _Switch()


@contextlib.contextmanager
def unfused_attention() -> Iterator[None]:
    """Around running a function whose derivative the fused kernels lack."""
    if torch.compiler.is_compiling():
        yield
        return
    _switch.enter()
    try:
        yield
    finally:
        _switch.leave()
