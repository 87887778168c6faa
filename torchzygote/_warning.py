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


@contextlib.contextmanager
def making_sparse() -> Iterator[None]:
    """Around making a sparse tensor, without what PyTorch says about these once per process.

    That CSR tensors are in beta; in 2.11 and 2.12 also that nothing is checked, though it was told not to.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        warnings.filterwarnings("ignore", message="Sparse invariant checks are", category=UserWarning)
        yield
