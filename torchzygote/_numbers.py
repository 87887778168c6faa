"""Whether tensors have numbers that may be asked for: to look for structure, and to check what it gave.

Knows nothing of what is asked.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ._create_graph import compiling
from ._state import in_transform
from ._torch_private import has_numbers, is_tracing

__all__ = ["may_branch", "show_numbers"]


def may_branch() -> bool:
    """Whether Python may decide by numbers: not in transforms, or while something traces."""
    return not (compiling() or in_transform() or is_tracing())


def show_numbers(xs: Iterable[Tensor]) -> bool:
    """Not on the meta device, of fake tensors, in transforms, or while ``torch.compile`` or ``make_fx`` runs.

    There the plain ways are taken.
    """
    return not (compiling() or in_transform()) and all(map(has_numbers, xs))
