"""Operators on the results of derivatives, compiled where that was possible.

Each function here calls the compiled operator where it is loaded for the tensors' device and the tensors are
plain ones; otherwise (under ``torch.func``, ``torch.compile`` or autograd) the same in pure PyTorch from
:mod:`torchzygote.native.reference`. Knows nothing of derivatives, chunks or colorings.
"""

from __future__ import annotations

from . import reference
from ._colored import compress, decompress, decompress_dense
from ._loading import info, loaded_devices
from ._rows import gather_diagonal, scatter_rows_, seed_rows
from ._structure import color_graph, unite_sets

__all__ = [
    "color_graph",
    "compress",
    "decompress",
    "decompress_dense",
    "gather_diagonal",
    "info",
    "loaded_devices",
    "reference",
    "scatter_rows_",
    "seed_rows",
    "unite_sets",
]
