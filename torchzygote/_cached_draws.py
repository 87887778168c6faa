"""Random draws that are the same in each call, and are kept: a loop asks for the same ones time and again.

They are drawn on the CPU, so that a device gets the same. Knows nothing of what they are drawn for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

from ._torch_private import plain_tensors

__all__ = ["MOST_KEPT", "generator_for", "kept"]

Given = ParamSpec("Given")
Drawn = TypeVar("Drawn")

# Elements of one draw; to keep more takes more memory than drawing takes time.
MOST_KEPT = 1 << 16


def generator_for(count: int) -> torch.Generator:
    """One of its own for a draw of this size: the global random state is left alone."""
    return torch.Generator("cpu").manual_seed(20_240_229 + count)


def kept(draw: Callable[Given, Drawn]) -> Callable[Given, Drawn]:
    """``draw``, of which the last few results are kept for all who ask: plain, wherever they are drawn."""

    def drawn(*args: Given.args, **kwargs: Given.kwargs) -> Drawn:
        with plain_tensors():
            return draw(*args, **kwargs)

    return cast(Callable[Given, Drawn], functools.lru_cache(maxsize=8)(drawn))
