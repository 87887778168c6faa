"""The operators of a mapping with arithmetic: which operation each one stands for.

Knows nothing of what is combined.
"""

from __future__ import annotations

from typing import TypeVar

__all__ = ["Arithmetic"]

Self = TypeVar("Self", bound="Arithmetic")


class Arithmetic:
    """Binary operators, their in-place and their reflected forms, by three methods that take the symbol."""

    # NumPy leaves `np.float64(2) * g` to __rmul__.
    __array_ufunc__ = None

    def _combined(self: Self, symbol: str, other: object) -> Self:
        raise NotImplementedError

    def _combined_(self: Self, symbol: str, other: object) -> Self:
        raise NotImplementedError

    def _reflected(self: Self, symbol: str, other: object) -> Self:
        raise NotImplementedError

    def __add__(self: Self, other: object) -> Self:
        return self._combined("+", other)

    def __sub__(self: Self, other: object) -> Self:
        return self._combined("-", other)

    def __mul__(self: Self, other: object) -> Self:
        return self._combined("*", other)

    def __truediv__(self: Self, other: object) -> Self:
        return self._combined("/", other)

    def __pow__(self: Self, other: object) -> Self:
        return self._combined("**", other)

    def __iadd__(self: Self, other: object) -> Self:
        return self._combined_("+", other)

    def __isub__(self: Self, other: object) -> Self:
        return self._combined_("-", other)

    def __imul__(self: Self, other: object) -> Self:
        return self._combined_("*", other)

    def __itruediv__(self: Self, other: object) -> Self:
        return self._combined_("/", other)

    def __ipow__(self: Self, other: object) -> Self:
        return self._combined_("**", other)

    def __radd__(self: Self, other: object) -> Self:
        return self._reflected("+", other)

    def __rsub__(self: Self, other: object) -> Self:
        return self._reflected("-", other)

    def __rmul__(self: Self, other: object) -> Self:
        return self._reflected("*", other)

    def __rtruediv__(self: Self, other: object) -> Self:
        return self._reflected("/", other)

    def __rpow__(self: Self, other: object) -> Self:
        return self._reflected("**", other)
