"""Along which axes the values inside a function keep samples apart, up to its result.

Knows shapes and graph nodes; it must not know what the values are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from .alignment import aligned_axes, jointly_aligned

__all__ = ["all_apart", "apart_from", "may_have_samples"]


def may_have_samples(y: Tensor, shape: Sequence[int]) -> bool:
    """Whether an axis is as long as one of ``y``, or may have such an axis folded in."""
    return any(n > 1 and size % n == 0 for n in y.shape for size in shape)


def _guessed(y: Tensor, z: Tensor, own: Collection[int]) -> dict[int, int]:
    """Axes of ``y`` and the first ones of ``z`` that have the same size: samples, most likely."""
    found: dict[int, int] = {}
    for p, size in enumerate(y.shape):
        free = (q for q in range(z.dim()) if q not in own and q not in found.values() and z.shape[q] == size)
        q = next(free, None) if size > 1 else None
        if q is not None:
            found[p] = q
    return found


def apart_from(y: Tensor, z: Tensor, own: Collection[int]) -> dict[int, int]:
    """Axes of ``y`` and those of ``z`` that tell the same samples apart."""
    if not _guessed(y, z, own):
        return {}
    return {p: q for p, q in aligned_axes(y, z) or [] if q not in own}


def all_apart(
    y: Tensor, values: Sequence[tuple[Tensor, Collection[int]]], *, one_by_one: bool
) -> tuple[list[int], list[dict[int, int]]]:
    """Axes of ``y`` along which samples stay apart from all of these on, and for each value its own.

    Nothing for a value of which that can't be said. One walk proves what sizes suggest; if it doesn't, there
    is one for each value, where that isn't too long (``one_by_one``).
    """
    guessed = [_guessed(y, z, own) for z, own in values]
    some = [i for i, pairs in enumerate(guessed) if pairs]
    if not some:
        return [], guessed
    common = sorted(set.intersection(*(set(guessed[i]) for i in some)))
    pairs = [[(p, guessed[i][p]) for p in common] for i in some]
    proved = jointly_aligned(y, [values[i][0] for i in some], pairs) if common else []
    if proved or not one_by_one:
        return proved, guessed
    apart = [apart_from(y, z, own) for z, own in values]
    return sorted(set.intersection(*(set(one) for one in apart if one)) if any(apart) else ()), apart
