"""What is asked of many tensors before a multi-tensor call, asked once and recognized afterwards.

The gradients of one step look like those of the last. One call tells that of all of them, where asking each
one takes as long as the call itself. Knows nothing of what is done with them. Addresses change from step to
step, so only the last compared are kept.
"""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from ._memory_layout import non_overlapping
from ._torch_private import alike, in_forward_ad, in_functorch

__all__ = ["COMMON", "TENSOR_TYPES", "Metadata", "by_kind", "extent_of", "metadata_of"]

# What a value mostly is: nothing has to be asked of these.
TENSOR_TYPES = frozenset({Tensor, Parameter})

# What all operators take, so that none of several calls fails after another has written.
COMMON = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    }
)

_strides: Callable[[Any], Any] = Tensor.stride
_is_nested: Callable[[Any], bool] = operator.attrgetter("is_nested")


def by_kind(xs: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors of each device and dtype."""
    if not xs:
        return []
    device, dtype = xs[0].device, xs[0].dtype
    if all(x.dtype is dtype and x.device == device for x in xs):
        return [list(range(len(xs)))]
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault((x.device, x.dtype), []).append(i)
    return list(groups.values())


def extent_of(x: Tensor) -> int:
    """How many bytes from the first element to behind the last."""
    if x.is_contiguous():
        return x.numel() * x.element_size()  # not nbytes, which Dynamo can't ask where sizes vary
    strides = x.stride()
    last: int = sum(map(operator.mul, x.shape, strides)) - sum(strides)
    return (last + 1) * x.element_size()


class Metadata:
    """What a list of tensors has in common, and what each one has."""

    __slots__ = (
        "__weakref__",
        "_apart",
        "_apart_from",
        "_extents",
        "_fitting",
        "common",
        "devices",
        "dtypes",
        "extents",
        "groups",
        "has_0dim",
        "has_complex",
        "has_meta",
        "inference",
        "is_same",
        "numels",
        "requires_grad",
        "shapes",
        "solid",
    )

    def __init__(self, xs: Sequence[Tensor]) -> None:
        self.is_same = alike(*xs)
        self.groups = by_kind(xs)
        self.shapes = [x.shape for x in xs]
        self.numels = [x.numel() for x in xs]
        self.dtypes = [x.dtype for x in xs]
        self.devices = [x.device for x in xs]
        self.has_0dim = any(x.dim() == 0 for x in xs)
        self.has_complex = any(x.is_complex() for x in xs)
        self.has_meta = any(x.is_meta for x in xs)
        self.requires_grad = any(x.requires_grad for x in xs)
        self.inference = any(x.is_inference() for x in xs)
        strided = all(x.layout is torch.strided for x in xs)
        # What the multi-tensor calls are made for.
        self.common = strided and COMMON.issuperset(self.dtypes)
        # No conjugate or negative view, nor one whose elements lie over each other.
        self.solid = strided and not any(
            x.is_conj() or x.is_neg() or not (x.is_contiguous() or non_overlapping(x)) for x in xs
        )
        self.extents = [extent_of(x) for x in xs] if strided else None
        self._extents: Any = None
        self._fitting: weakref.ref[Metadata] | None = None
        self._apart: list[int] = []
        self._apart_from: weakref.ref[Metadata] | None = None

    def fits(self, other: Metadata) -> bool:
        """Whether each tensor has the shape, dtype and device of its fellow."""
        if self is other or (self._fitting is not None and self._fitting() is other):
            return True
        if (self.shapes, self.dtypes, self.devices) != (other.shapes, other.dtypes, other.devices):
            return False
        self._fitting = weakref.ref(other)
        return True

    def were_apart(self, other: Metadata, addresses: list[int]) -> bool:
        """Whether these addresses, of both, are the last ones that were found to be apart.

        A step's gradients mostly lie where those of the last one lay.
        """
        last = self._apart_from
        return last is not None and last() is other and self._apart == addresses

    def found_apart(self, other: Metadata, addresses: list[int]) -> None:
        """Remember that."""
        self._apart, self._apart_from = addresses, weakref.ref(other)

    def extents_as_array(self) -> Any:
        """The same as uint64."""
        if self._extents is None:
            self._extents = np.array(self.extents, dtype=np.uint64)
        return self._extents

    def recorded(self) -> bool:
        """Whether an operation on one of them is recorded."""
        return self.requires_grad and torch.is_grad_enabled()

    def writable(self) -> bool:
        """Whether each one can be written into by a multi-tensor call, as far as it alone is concerned."""
        return self.solid and not (self.inference and not torch.is_inference_mode_enabled())


# By the number of tensors: the few that were seen last. They hold no tensors.
_seen: dict[int, tuple[Metadata, ...]] = {}
_LENGTHS, _EACH = 64, 16


def metadata_of(xs: Sequence[Tensor]) -> Metadata | None:
    """The metadata of ``xs``; ``None`` for what takes a closer look: batched, dual, traced, no plain one.

    In inference mode, too: tensors seen there look like those made there seen outside.
    """
    if not xs or torch.compiler.is_compiling() or in_functorch() or in_forward_ad():
        return None
    if torch.is_inference_mode_enabled() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return None
    # To compare nested tensors with others ends the process; lazy ones are of another type.
    if not TENSOR_TYPES.issuperset(map(type, xs)) or True in map(_is_nested, xs):
        return None
    for i, known in enumerate(seen := _seen.get(len(xs), ())):
        if known.is_same(*xs):
            if i > 1:  # those that are seen in turns find each other at once
                _seen[len(xs)] = (known, *seen[:i], *seen[i + 1 :])
            return known
    return _learned(xs)


def _learned(xs: Sequence[Tensor]) -> Metadata | None:
    try:
        deque(map(_strides, xs), maxlen=0)  # compressed ones have none
    except RuntimeError:
        return None
    new = Metadata(xs)
    if new.is_same(*xs):  # not if one of them comes twice
        if len(xs) not in _seen and len(_seen) >= _LENGTHS:
            _seen.clear()
        _seen[len(xs)] = (new, *_seen.get(len(xs), ())[: _EACH - 1])
    return new
