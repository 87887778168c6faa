"""Which mode, and how many rows at a time: pure functions of sizes and capabilities.

Runs nothing and allocates nothing; it must not know what a row is.
"""

from __future__ import annotations

import numbers
import os
from typing import NamedTuple

import torch

__all__ = [
    "FORWARD_COST",
    "FREE",
    "LEAST_BYTES",
    "RowCost",
    "check_chunk_size",
    "check_mode",
    "choose_chunk",
    "choose_mode",
    "costs_calls_alone",
    "memory_budget",
    "set_memory_budget",
]

JACOBIAN_MODES = ("auto", "reverse", "forward")
HESSIAN_MODES = ("auto", "forward_over_reverse", "reverse_over_reverse")

# A pushforward costs about half as much again as a pullback, as f runs anew for it; measured on MLPs and
# elementwise f, nothing compiled.
FORWARD_COST = 1.5
_GIBIBYTE = 1 << 30
# Below this many bytes per chunk nobody asks how much memory is free: asking costs more than it saves.
_SMALL = 8 << 20
# Chunks beyond this fall out of a CPU's caches; more rows at a time no longer save dispatches that matter.
# Measured with n = 500 to 4000: 4 to 64 MiB are at most a fifth apart, 16 is best. A GPU wants to be filled.
_COMFORTABLE = {"cpu": 16 << 20, "cuda": 512 << 20}
# An operation costs some 25 microseconds whatever its size: in a long graph each gets that many bytes.
# (Rosenbrock's Hessian, n = 1000, 35 nodes: 42 ms in chunks of 32, 32 of 64, 25 of 256, 32 of 1000.)
_NODE_BYTES = 3 << 18
_LEAST_ROWS = 64
# A matrix product with 524 rows takes 1.4 times as long as one with 512 (667 and 672 likewise, on AVX2).
_ALIGNED = 32

# Below so many bytes that the dense way moves, it takes no longer than to find out whether fewer products do:
# a walk along the graph costs 4 microseconds a node, as much as moving some 50 KB.
LEAST_BYTES = 4 << 20

# In a graph of so many operations, those that hold no more than so many bytes for all rows take as long as
# for one: one batched pullback is cheapest then. (RK4, 100 steps, 4 to 200: 380 ms instead of 890.)
_LONG_GRAPH = 256
_HARDLY_ANY = 1 << 16
# So many bytes take less time than forward mode does to begin with, and to be checked.
_SOON_MOVED = 1 << 21

_budget: int | None = None


def set_memory_budget(nbytes: int | None) -> None:
    """Set how many bytes one chunk of batched rows may take.

    Parameters
    ----------
    nbytes : int or None
        A positive number of bytes; ``None`` goes back to the default: a quarter of the free memory of the
        device, on the CPU at most 1 GiB. The environment variable ``TORCHZYGOTE_MEMORY_BUDGET`` (bytes) sets
        it for a whole process.

    Raises
    ------
    TypeError
        ``nbytes`` is no int.
    ValueError
        ``nbytes`` is below 1.

    Examples
    --------
    >>> from torchzygote import set_memory_budget
    >>> set_memory_budget(256 * 2**20)
    >>> set_memory_budget(None)
    """
    global _budget
    if nbytes is not None and (isinstance(nbytes, bool) or not isinstance(nbytes, numbers.Integral)):
        raise TypeError(f"nbytes: expected an int, a number of bytes, or None, got {nbytes!r}")
    if nbytes is not None and nbytes < 1:
        raise ValueError(f"nbytes: expected a positive number of bytes or None, got {nbytes}")
    _budget = None if nbytes is None else int(nbytes)


def memory_budget(device: torch.device) -> int:
    """Bytes that one chunk of batched rows may take on ``device``, now."""
    if _budget is not None:
        return _budget
    setting = os.environ.get("TORCHZYGOTE_MEMORY_BUDGET")
    if setting:
        if not setting.isdecimal() or int(setting) < 1:
            raise ValueError(f"TORCHZYGOTE_MEMORY_BUDGET: expected a number of bytes, got {setting!r}")
        return int(setting)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # PyTorch keeps what it has freed.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return max(free // 4, 1)
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return _GIBIBYTE  # not a POSIX system: nothing in the standard library tells
    return max(min(free // 4, _GIBIBYTE), 1)


def exceeds_budget(nbytes: int, device: torch.device) -> bool:
    """Whether ``nbytes`` are more than one chunk may take."""
    return nbytes > _SMALL and nbytes > memory_budget(device)


def is_small(nbytes: int) -> bool:
    """Whether so few bytes are never divided into chunks."""
    return nbytes <= _SMALL


def check_mode(mode: object, allowed: tuple[str, ...]) -> str:
    """``mode`` if it is one of the ``allowed`` words."""
    if not isinstance(mode, str) or mode not in allowed:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, allowed))}, got {mode!r}")
    return mode


def check_chunk_size(chunk_size: object) -> int | None:
    """``chunk_size`` if it is ``None`` or a positive int."""
    if chunk_size is None:
        return None
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, numbers.Integral):  # NumPy's too
        raise TypeError(f"chunk_size: expected None or an int, got {chunk_size!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    return int(chunk_size)


def choose_mode(mode: str, rows: int, columns: int, complex_input: bool) -> str:
    """``"reverse"`` or ``"forward"`` for a Jacobian of this shape."""
    if mode != "auto":
        return mode
    if complex_input or rows == 0 or columns == 0:
        return "reverse"
    return "forward" if FORWARD_COST * columns + 2 < rows else "reverse"


def costs_calls_alone(rows: int, row: RowCost) -> bool:
    """Whether all rows pulled back together take hardly longer than one, or than f does."""
    long = row.nodes >= _LONG_GRAPH and rows * row.nbytes <= row.nodes * _HARDLY_ANY
    return long or rows * row.nbytes <= _SOON_MOVED


class RowCost(NamedTuple):
    """What one row takes while it is pulled back: bytes at most, and operations.

    ``misbatched``: one of them that PyTorch batches wrongly, so that rows go one at a time. ``looped``: they
    do so in any case, as PyTorch batches one by a loop.
    """

    nbytes: int
    nodes: int
    misbatched: str | None = None
    looped: bool = False


FREE = RowCost(0, 0)


def choose_chunk(chunk_size: int | None, rows: int, row: RowCost, device: torch.device) -> int:
    """Rows at a time, at least one: within the memory budget, and no more than is comfortable."""
    if chunk_size is not None:
        return max(1, min(chunk_size, rows))
    if is_small(rows * row.nbytes):
        return max(1, rows)
    row_bytes = max(1, row.nbytes)
    affordable = memory_budget(device) // row_bytes
    at_best = max(_COMFORTABLE.get(device.type, _SMALL), row.nodes * _NODE_BYTES)
    comfortable = max(_LEAST_ROWS, at_best // row_bytes)
    chunk = min(affordable, comfortable)
    if chunk >= rows:
        return rows
    return max(1, chunk - chunk % _ALIGNED if chunk > _ALIGNED else chunk)
