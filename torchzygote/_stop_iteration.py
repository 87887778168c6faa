"""``StopIteration`` on its way through generators, which would make a ``RuntimeError`` of it (PEP 479).

Knows nothing of what is generated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["Carried", "carried", "released"]

Returned = TypeVar("Returned")
Given = ParamSpec("Given")


class Carried(Exception):
    """In place of ``error``."""

    def __init__(self, error: StopIteration) -> None:
        super().__init__(str(error))
        self.error = error


def carried(inside: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """What a generator calls that runs the caller's code; :func:`released` is around who iterates."""
    if torch.compiler.is_compiling():
        return inside

    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        try:
            return inside(*args, **kwargs)
        except StopIteration as error:
            raise Carried(error) from None

    return wrapped


def released(outside: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """A function that iterates, and is itself called by no generator of this package."""

    @functools.wraps(outside)
    def wrapped(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        if torch.compiler.is_compiling():
            return outside(*args, **kwargs)
        try:
            return outside(*args, **kwargs)
        except Carried as found:
            held = [found.error]
        # Raised outside the except, to keep its context; popped, so that no frame keeps it alive.
        raise held.pop()

    return wrapped
