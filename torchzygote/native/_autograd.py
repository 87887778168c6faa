"""What the raw operators do beyond the kernels: fake kernels, and refusals where a derivative is asked for.

An operator without autograd rules gives silent zeros under ``torch.func``; these refuse instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch_private import has_tangent, register_autograd_kernel

__all__ = ["OPERATORS", "finish_registration"]

# These write to their first argument, a tensor or a list of tensors, and return nothing.
_WRITING = (
    "seed_rows_",
    "scatter_rows_",
    "gather_diagonal_",
    "decompress_",
    "decompress_dense_",
    "compress_",
)
OPERATORS = (
    *_WRITING,
    "mirrored_blocks",
    "push_elementwise_",
    "unite_sets",
    "unite_pairs",
    "expand_pairs",
    "color_graph",
)


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _tensors(tuple(arg))


def _refuse_derivatives(name: str, args: tuple[Any, ...]) -> None:
    recording = torch.is_grad_enabled()
    for x in _tensors(args):
        if (recording and x.requires_grad) or has_tangent(x):
            raise RuntimeError(
                f"torchzygote::{name}: expected tensors that are not being differentiated, got one of shape "
                f"{tuple(x.shape)} that is; use torchzygote.native.{name.rstrip('_')}, which PyTorch can "
                "differentiate, or detach it"
            )


def _writes_only(*args: Any) -> None:
    """Fake kernel of an operator that writes to its arguments and returns nothing."""


def _united(set_members: Tensor, groups: int) -> list[Tensor]:
    """What uniting sets gives: how many new sets there are depends on the values."""
    size = torch.library.get_ctx().new_dynamic_size
    sizes = set_members.new_empty(size(), dtype=torch.int64)
    return [set_members.new_empty(groups), sizes, set_members.new_empty(size())]


def _united_groups(set_ptr: Tensor, set_members: Tensor, group_ptr: Tensor, ids: Tensor, most: int) -> Any:
    return _united(set_members, group_ptr.numel() - 1)


def _united_pairs(set_ptr: Tensor, set_members: Tensor, first: Tensor, second: Tensor, most: int) -> Any:
    return _united(set_members, first.numel())


def _expanded(
    set_ptr: Tensor, set_members: Tensor, first: Tensor, second: Tensor, bounds: Tensor, most: int
) -> list[Tensor]:
    size = torch.library.get_ctx().new_dynamic_size
    return [set_ptr.new_empty(size()), set_ptr.new_empty(size())]


def _colors(indptr: Tensor, indices: Tensor, ncols: int, kind: str, order: str) -> Tensor:
    return indptr.new_empty(ncols if kind == "distance2_columns" else indptr.numel() - 1)


def _mirrored(
    products: list[Tensor], shifts: Tensor, scales: Tensor, widths: list[int], slack: float
) -> tuple[list[Tensor], Tensor]:
    diagonals = [scales.new_empty(shifts.numel() * width) for width in widths]
    return diagonals, scales.new_empty((), dtype=torch.bool)


def _pushed(tangents: Tensor, slope: Tensor, weight: Tensor, squared: bool, function: str) -> Tensor:
    return tangents.new_empty(tangents.shape[:2])


def finish_registration() -> None:
    """Give each loaded operator its fake kernel and its refusal."""
    for name in _WRITING:
        torch.library.register_fake(f"torchzygote::{name}", _writes_only)
        register_autograd_kernel(name, _refuse_derivatives)
    torch.library.register_fake("torchzygote::unite_sets", _united_groups)
    torch.library.register_fake("torchzygote::unite_pairs", _united_pairs)
    torch.library.register_fake("torchzygote::expand_pairs", _expanded)
    torch.library.register_fake("torchzygote::color_graph", _colors)
    torch.library.register_fake("torchzygote::mirrored_blocks", _mirrored)
    torch.library.register_fake("torchzygote::push_elementwise_", _pushed)
    for name in ("mirrored_blocks", "push_elementwise_"):
        register_autograd_kernel(name, _refuse_derivatives)
