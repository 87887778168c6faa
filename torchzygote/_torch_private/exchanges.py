"""Functions of PyTorch's that have no switch, exchanged for others and back, in a row.

Small second derivatives wait for this, and code that has left the caches is what they wait for: one loop for
all. Knows nothing of who asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

__all__ = ["Exchange", "Exchanges", "exchange", "known_to_torchscript"]


class Exchange(NamedTuple):
    """``holder.name`` is ``own``, and ``written`` while formulas are wanted; ``holder`` is a module."""

    holder: Any
    name: str
    own: Any
    written: Any


class Exchanges:
    """Several at once, by the modules' dictionaries: a loop over attributes takes twice the time."""

    __slots__ = ("_table",)

    def __init__(self, *table: Exchange) -> None:
        self._table = [(vars(holder), name, own, written) for holder, name, own, written in table]

    def exchange(self, back: bool) -> None:
        """As :func:`exchange`; a module that hands on what another one has holds nothing before the first."""
        for held, name, own, written in self._table:
            if back:
                if held.get(name) is written:
                    held[name] = own
            elif held.get(name, own) is own:
                held[name] = written


def exchange(table: Iterable[Exchange], back: bool = False) -> None:
    """Put the formulas in place, or what was there before ``back``; what others have put there stays.

    PyTorch's tracer follows this.
    """
    for holder, name, own, written in table:
        before, after = (written, own) if back else (own, written)
        if getattr(holder, name) is before:
            setattr(holder, name, after)


def known_to_torchscript(table: Iterable[Exchange]) -> None:
    """Have TorchScript take each formula for the operator in whose place it stands; nothing public does."""
    for one in table:
        torch.jit._builtins._register_builtin(one.written, f"aten::{one.name}")
