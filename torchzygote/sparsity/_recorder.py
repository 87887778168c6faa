"""The recorder that a process needs: Dynamo must not trace one, where it runs.

Knows nothing of what is recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch_private import dynamo_is_loaded
from ._trace import Probe, Recorder

__all__ = ["recorder"]


class _SkippedByDynamo(Recorder):  # type: ignore[no-untyped-call]
    """For when compiled functions may run inside."""

    skipped_by_dynamo = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return super().__torch_dispatch__(func, types, args, kwargs)


def recorder(inputs: Sequence[Tensor], probes: dict[str, Probe], varying: Sequence[Any] = ()) -> Recorder:
    """A :class:`Recorder`; ``varying`` as there."""
    return (_SkippedByDynamo if dynamo_is_loaded() else Recorder)(inputs, probes, varying)
