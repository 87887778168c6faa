"""The global random state: as a plain call of ``f`` would leave it, the same draw in every run of ``f``.

Knows nothing of derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["OneRun", "RandomState", "restored_after"]


class RandomState:
    """The state of PyTorch's default generators, to be restored before ``f`` runs again."""

    __slots__ = ("_cpu", "_cuda")

    def __init__(self) -> None:
        self._cpu: Tensor = torch.get_rng_state()
        self._cuda = _cuda_states()

    def has_moved(self) -> bool:
        """Whether anything has been drawn since."""
        cuda = _cuda_states()
        if self._cuda is not None and cuda is not None and not _same(self._cuda, cuda):
            return True
        return not torch.equal(self._cpu, torch.get_rng_state())

    def restore(self) -> None:
        """Set the generators back to where they were."""
        torch.set_rng_state(self._cpu)
        if self._cuda is None or not torch.cuda.is_initialized() or _capturing():  # type: ignore[no-untyped-call]
            return
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        else:
            torch.cuda.manual_seed_all(torch.initial_seed())  # as its generators were made since


def _capturing() -> bool:
    """Whether a CUDA graph is being captured: it counts what is drawn, and refuses questions about that."""
    return torch.cuda.is_current_stream_capturing()


def _cuda_states() -> list[Tensor] | None:
    """The states of CUDA's generators, ``None`` where they can't be had."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    return None if _capturing() else torch.cuda.get_rng_state_all()


def _same(before: list[Tensor], now: list[Tensor]) -> bool:
    return len(before) == len(now) and all(map(torch.equal, before, now))


class _Restored:
    """The generators are left where they were found."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = RandomState()

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._before.restore()


def restored_after(random: RandomState | None) -> contextlib.AbstractContextManager[None]:
    """Around runs of ``f`` from ``random`` on, if there is one: the generators are afterwards as before."""
    return contextlib.nullcontext() if random is None else _Restored()


class OneRun:
    """Wraps ``f``; afterwards the generators are as after its first run."""

    __slots__ = ("_after", "_f")

    def __init__(self, f: Callable[..., Any]) -> None:
        self._f = f
        self._after: RandomState | None = None

    def __call__(self, *args: Any) -> Any:
        y = self._f(*args)
        if self._after is None:
            self._after = RandomState()
        return y

    def settle(self) -> None:
        """Leave the generators where the first run left them."""
        if self._after is not None:
            self._after.restore()
