"""Warnings as of the caller's line: Python shows a text once for each place. And PyTorch's own warnings.

Knows frames of the stack, nothing of what the package says.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

__all__ = ["making_sparse", "warn"]

_PACKAGE = str(Path(__file__).parent) + os.sep


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the innermost line of the stack that isn't this package's."""
    level = 1
    frame: FrameType | None = sys._getframe(0)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)


_said: set[torch.layout] = set()


def making_sparse(layout: torch.layout = torch.sparse_csr) -> contextlib.AbstractContextManager[None]:
    """Around making a sparse tensor, without what PyTorch says about these once per process.

    That CSR tensors are in beta; in 2.11 and 2.12 also that nothing is checked, though it was told not to.
    """
    # Filters are the process's: other threads would see them, and plans of small matrices wait for them.
    if layout in _said and not torch.is_warn_always_enabled():
        return contextlib.nullcontext()
    return _silenced(layout)


@contextlib.contextmanager
def _silenced(layout: torch.layout) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        warnings.filterwarnings("ignore", message="Sparse invariant checks are", category=UserWarning)
        yield
    _said.add(layout)
