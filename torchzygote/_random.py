"""The global random state: as a plain call of ``f`` would leave it, the same draw in every run of ``f``.

Knows nothing of derivatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RandomState"]


class RandomState:
    """The state of PyTorch's default generators, to be restored before ``f`` runs again."""

    __slots__ = ("_cpu", "_cuda")

    def __init__(self) -> None:
        self._cpu: Tensor = torch.get_rng_state()
        self._cuda: list[Tensor] = []
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._cuda = torch.cuda.get_rng_state_all()

    def restore(self) -> None:
        """Set the generators back to where they were."""
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
