"""Colorings: which rows or columns of a sparse matrix may share one product.

Knows index structure alone; it must not know of derivatives or values.
"""

from __future__ import annotations

from .choice import Coloring, color

__all__ = ["Coloring", "color"]
