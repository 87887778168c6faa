"""Options that many calls take: which arguments, and what is either on or off.

Knows nothing of arguments or derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["check_argnums", "check_callable", "check_flags"]


def check_callable(caller: str, f: object) -> None:
    """Refuse what can't be called, before anything else is done."""
    if not callable(f):
        shape = f" of shape {tuple(f.shape)}" if hasattr(f, "shape") else ""
        raise TypeError(f"{caller}: f: expected a function, which comes first, got {type(f).__name__}{shape}")


def check_argnums(argnums: int | Sequence[int] | None, count: int) -> frozenset[int] | None:
    """``argnums`` as a set of positions; ``None`` stands for all of them."""
    if argnums is None:
        return None
    numbers = [argnums] if isinstance(argnums, (int, np.integer)) else argnums
    if isinstance(argnums, (bool, str)) or not isinstance(numbers, Sequence):
        raise TypeError(f"argnums: expected an int or a sequence of ints, got {argnums!r}")
    found: set[int] = set()
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            raise TypeError(f"argnums: expected an int or a sequence of ints, got {argnums!r}")
        if not -count <= number < count:
            none = "; f's arguments come after it, as in gradient(f, x)" if count == 0 else ""
            raise ValueError(
                f"argnums: expected positions below the number of arguments, {count}, got {number}{none}"
            )
        position = int(number % count)
        if position in found:
            raise ValueError(f"argnums: expected each position once, got {number} again in {argnums!r}")
        found.add(position)
    return frozenset(found)


def check_flags(**flags: object) -> None:
    """Refuse what is neither ``True`` nor ``False``, as strings are, which would count as ``True``."""
    for name, value in flags.items():
        if value is not True and value is not False and not isinstance(value, np.bool_):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
