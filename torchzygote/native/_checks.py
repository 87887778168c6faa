"""Refusals of the pure-PyTorch operators, in the words of the native library (csrc/checks.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch_private import is_wrapped

__all__ = [
    "check_colors",
    "check_compress",
    "check_index",
    "check_matrix",
    "check_out",
    "check_range",
    "check_scatter",
    "check_slots",
    "scattered_rows",
]

_INDEX_DTYPES = (torch.int64, torch.int32)
# What is converted where products and blocks differ; complex numbers not to real ones.
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = (torch.complex64, torch.complex128)


def _shape(x: Tensor) -> str:
    return "(" + ", ".join(map(str, x.shape)) + ")"


def check_range(lo: int, hi: int, most: int | None) -> None:
    """``0 <= lo <= hi``, and ``hi <= most`` where that is given."""
    if lo < 0:
        raise ValueError(f"lo: expected at least 0, got {lo}")
    if hi < lo:
        raise ValueError(f"hi: expected at least lo = {lo}, got {hi}")
    if most is not None and hi > most:
        raise ValueError(f"hi: expected at most the number of columns, {most}, got {hi}")


def check_matrix(
    name: str, x: Tensor, layouts: tuple[torch.layout, ...] = (torch.strided,)
) -> tuple[int, int]:
    """Shape of a matrix."""
    if x.layout not in layouts:
        raise ValueError(f"{name}: expected a strided tensor, got layout {x.layout}")
    if x.dim() != 2:
        raise ValueError(f"{name}: expected a matrix, got shape {_shape(x)}")
    return x.shape[0], x.shape[1]


def check_out(out: Tensor, shape: tuple[int, ...], products: Tensor) -> None:
    """Shape as given, dtype and device those of the products."""
    if tuple(out.shape) != shape:
        wanted = "(" + ", ".join(map(str, shape)) + ")"
        raise ValueError(f"out: expected shape {wanted}, got {_shape(out)}")
    if out.dtype != products.dtype:
        raise ValueError(f"out: expected the dtype of products, {products.dtype}, got {out.dtype}")
    if out.device != products.device:
        raise ValueError(f"out: expected the device of products, {products.device}, got {out.device}")


def _check_integers(name: str, x: Tensor, size: int) -> None:
    if x.dtype not in _INDEX_DTYPES:
        raise ValueError(f"{name}: expected int64 or int32, got {x.dtype}")
    if x.dim() != 1 or x.shape[0] != size:
        raise ValueError(f"{name}: expected shape ({size}), got {_shape(x)}")


def _check_values(name: str, x: Tensor, least: int, below: int | None) -> None:
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
        return  # values are not known while a program is traced
    if x.numel() == 0 or is_wrapped(x):
        return
    smallest, largest = torch.stack(torch.aminmax(x)).tolist()  # at once: a device is waited for
    if smallest < least:
        raise ValueError(f"{name}: expected at least {least}, got {smallest}")
    if below is not None and largest >= below:
        raise ValueError(f"{name}: expected less than {below}, got {largest}")


def check_colors(colors: Tensor, size: int, below: int | None = None) -> None:
    """One color for each column; -1 for none."""
    _check_integers("colors", colors, size)
    _check_values("colors", colors, -1, below)


def check_index(name: str, x: Tensor, slot_row: Tensor, below: int) -> None:
    """One position for each slot."""
    _check_integers(name, x, slot_row.numel())
    _check_values(name, x, 0, below)


def check_slots(products: Tensor, lo: int, slot_row: Tensor, slot_column: Tensor) -> None:
    """Where each value is found among the products."""
    _, columns = check_matrix("products", products)
    if lo < 0:
        raise ValueError(f"lo: expected at least 0, got {lo}")
    _check_integers("slot_row", slot_row, slot_row.numel())
    _check_values("slot_row", slot_row, 0, None)
    check_index("slot_column", slot_column, slot_row, columns)


def scattered_rows(products: Sequence[Tensor | None], lo: int, hi: int | None) -> int:
    """How many rows the products have."""
    if hi is not None:
        check_range(lo, hi, None)
        return hi - lo
    for product in products:
        if product is not None:
            return product.shape[0] if product.dim() > 0 else 0
    raise ValueError("hi: expected the end of the rows where all products are None, got None")


def check_scatter(blocks: Sequence[Tensor], products: Sequence[Tensor | None], lo: int, rows: int) -> None:
    """Products fit the rows ``lo`` to ``lo + rows`` of their blocks."""
    if len(blocks) != len(products):
        raise ValueError(f"products: expected {len(blocks)}, one for each block, got {len(products)}")
    if lo < 0:
        raise ValueError(f"lo: expected at least 0, got {lo}")
    for i, (block, product) in enumerate(zip(blocks, products, strict=True)):
        height, width = check_matrix(f"blocks[{i}]", block)
        if lo + rows > height:
            raise ValueError(f"blocks[{i}]: expected at least {lo + rows} rows, got {height}")
        if product is None:
            continue
        if product.dim() == 0 or product.shape[0] != rows or product.numel() != rows * width:
            raise ValueError(
                f"products[{i}]: expected {rows} rows of {width} elements, got shape {_shape(product)}"
            )
        if product.device != block.device:
            raise ValueError(
                f"products[{i}]: expected the device of its block, {block.device}, got {product.device}"
            )
        if product.dtype.is_complex and not block.dtype.is_complex:
            raise ValueError(
                f"products[{i}]: expected a real dtype for a block of {block.dtype}, got {product.dtype}"
            )
        if product.dtype != block.dtype and not _converts(product.dtype, block.dtype):
            raise ValueError(
                f"products[{i}]: expected a dtype that converts to {block.dtype}, got {product.dtype}"
            )


def _converts(source: torch.dtype, target: torch.dtype) -> bool:
    return source in (*_REAL, *_COMPLEX) and target in (_COMPLEX if source in _COMPLEX else _REAL + _COMPLEX)


def check_compress(matrix: Tensor, colors: Tensor, ncolors: int, by: str) -> tuple[int, int]:
    """How many lines of the matrix are summed, and how many elements each has."""
    if by not in ("columns", "rows"):
        raise ValueError(f"by: expected 'columns' or 'rows', got {by!r}")
    if ncolors < 0:
        raise ValueError(f"ncolors: expected at least 0, got {ncolors}")
    height, width = check_matrix("matrix", matrix, layouts=(torch.strided, torch.sparse_csr))
    summed, kept = (width, height) if by == "columns" else (height, width)
    _check_integers("colors", colors, summed)
    return summed, kept
