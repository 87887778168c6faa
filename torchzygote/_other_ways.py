"""Errors that another way may get around, and those that it must not.

Where an operation lacks a derivative that one way needs, another one may do. Where memory runs out, the
others take more of it; and what is cut off from its cotangent, no way differentiates again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

__all__ = ["another_may_do", "cut_off", "first_that_does", "is_lack_of_memory", "suppressed"]

Found = TypeVar("Found")


def cut_off(message: str) -> RuntimeError:
    """The error of a gradient that is cut off from its cotangent: no way differentiates it again."""
    error = RuntimeError(message)
    error.torchzygote_cut_off = True  # type: ignore[attr-defined]
    return error


def another_may_do(error: BaseException | None) -> bool:
    """Whether another way is to be tried after ``error``."""
    return isinstance(error, Exception) and not (
        hasattr(error, "torchzygote_cut_off") or is_lack_of_memory(error)
    )


def is_lack_of_memory(error: Exception) -> bool:
    """Whether there was no memory; that of the CPU has no class of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return type(error) is RuntimeError and "DefaultCPUAllocator" in str(error)


def first_that_does(attempt: Callable[[str], Found], ways: Sequence[str]) -> tuple[str, Found]:
    """The first of ``ways`` that doesn't fail, and what it gave; if all do, what the first has raised."""
    failed: Exception | None = None
    for way in ways:
        try:
            found = attempt(way)
            failed = None  # whose traceback holds this frame
            return way, found
        except Exception as error:
            if not another_may_do(error):
                raise
            failed = failed or error
    assert failed is not None
    try:
        raise failed
    finally:
        failed = None


class suppressed:
    """Around what may fail where another way is going to be taken; what that wouldn't get right is raised.

    A class: of a generator, Python 3.12 leaves a cycle that keeps what the frames of the error hold.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        return another_may_do(error)
