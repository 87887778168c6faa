"""Pictures of patterns and colors, by matplotlib. Knows index structure alone."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .coloring.recovery import Recovery
from .sparsity.pattern import Pattern

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

# Pixels along the longer side, and rows and columns of the corner that is shown enlarged.
_PIXELS = 400
_CORNER = 48


def draw(recovery: Recovery, title: str, path: str | os.PathLike[str] | None = None) -> Figure:
    """A figure with each pattern, entries in the color of their column or row; large ones with a corner.

    Parameters
    ----------
    recovery : Recovery
        Patterns and coloring.
    title : str
        What to write above.
    path : path, optional
        Where to save it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            'spy: expected matplotlib to be installed; pip install "torchzygote[plot]" installs it'
        ) from None
    panels = _panels(recovery)
    figure = Figure(figsize=(4.6 * len(panels), 5.0), layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 74 * len(panels))), fontsize=8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (label, image, extent) in zip(axes, panels, strict=True):
        ax.imshow(image, extent=extent, interpolation="nearest", aspect="auto")
        ax.set_title(label, fontsize=9)
        ax.set_xlabel("column")
        ax.set_ylabel("row")
        ax.set_box_aspect(min(2.0, max(0.5, extent[2] / max(1e-9, extent[1]))))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _panels(recovery: Recovery) -> list[tuple[str, Any, tuple[float, float, float, float]]]:
    panels = []
    shades = _shades(max(1, recovery.ncolors))
    offset = 0
    for i, pattern in enumerate(recovery.patterns):
        colors = recovery.coloring.colors
        if recovery.mode == "reverse":
            of_entry = colors[pattern.rows()]
        else:
            of_entry = colors[pattern.indices + offset]
        offset += pattern.shape[1]
        alone = len(recovery.patterns) == 1  # the title above has its number of entries already
        name = "" if alone else f"argument {i}: "
        corner = tuple(min(_CORNER, n) for n in pattern.shape)
        small = max(pattern.shape) <= 2 * _CORNER
        whole = _raster(pattern.rows(), pattern.indices, of_entry, pattern.shape, shades)
        panels.append(("" if alone else f"{name}{pattern.nnz} nonzeros", whole, _extent(pattern.shape)))
        if not small:
            part, entry_colors = _corner(pattern, of_entry, corner)
            image = _raster(part[0], part[1], entry_colors, corner, shades)
            panels.append((f"{name}upper left corner", image, _extent(corner)))
    return panels


def _extent(shape: tuple[int, ...]) -> tuple[float, float, float, float]:
    return (0.0, float(max(1, shape[1])), float(max(1, shape[0])), 0.0)


def _corner(
    pattern: Pattern, of_entry: Tensor, corner: tuple[int, ...]
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    end = int(pattern.indptr[corner[0]])
    rows, columns = pattern.rows()[:end], pattern.indices[:end]
    inside = columns < corner[1]
    return (rows[inside], columns[inside]), of_entry[:end][inside]


def _raster(rows: Tensor, columns: Tensor, colors: Tensor, shape: tuple[int, ...], shades: Any) -> Any:
    """An image with a cell for each entry, or where there are more than pixels, for several."""
    scale = max(1.0, max(shape) / _PIXELS)
    height, width = (max(1, round(n / scale)) for n in shape)
    image = np.full((height * width, 3), 0.97)
    where = (rows * height // max(1, shape[0])) * width + columns * width // max(1, shape[1])
    counts = torch.bincount(where, minlength=height * width).clamp(min=1)
    for channel in range(3):
        shade = torch.from_numpy(shades[:, channel].copy())[colors]
        summed = torch.bincount(where, weights=shade, minlength=height * width) / counts
        filled = torch.zeros(height * width, dtype=torch.bool, device="cpu")
        filled[where] = True
        image[:, channel] = torch.where(filled, summed, 0.97).numpy()
    return image.reshape(height, width, 3)


def _shades(count: int) -> Any:
    """Colors that can be told apart, as rows of red, green and blue."""
    from matplotlib import colormaps

    if count <= 10:
        return np.asarray(colormaps["tab10"].colors)[:count]  # type: ignore[attr-defined]
    if count <= 20:
        return np.asarray(colormaps["tab20"].colors)[:count]  # type: ignore[attr-defined]
    order = np.argsort(np.arange(count) * 0.618033988749895 % 1.0)
    return colormaps["turbo"](np.linspace(0.03, 0.97, count))[order, :3]
