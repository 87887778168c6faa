"""Buffers of modules that a function updates as it runs: what it found is there again as it runs again.

Only modules in training mode are looked at: spectral norms, running statistics. They keep what the first run
made of them, once. Knows nothing of derivatives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch_private import Buffers, buffers_in, is_wrapped, outside_functorch, set_versions, version_of

__all__ = ["ModuleBuffers", "modules_among"]


class _BufferState(NamedTuple):
    """A buffer before the first run."""

    buffers: Buffers
    """Those of its module."""
    name: str
    x: Tensor
    version: int
    copy: Tensor
    persistent: bool
    """Whether a saved module has it; masks and tables mostly aren't."""


def modules_among(values: Iterable[Any]) -> Iterator[nn.Module]:
    """Those of ``values`` that are modules, and those in lists and tuples."""
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif type(value) is list or type(value) is tuple:
            yield from (x for x in value if isinstance(x, nn.Module))


def _updated_by_running(insides: Iterable[dict[str, Any]]) -> Iterator[_BufferState]:
    """The buffers of modules in training mode."""
    for inside in insides:
        found = buffers_in(inside) if inside.get("training") else None
        if found is None:
            continue
        buffers, passing = found
        for name, x in buffers.items():
            if x is not None and _is_plain(x):
                version = version_of(x)
                yield _BufferState(buffers, name, x, version, _copy(x, version), name not in passing)


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor and not (x.requires_grad or x.is_inference() or is_wrapped(x))


def _copy(x: Tensor, version: int) -> Tensor:
    """With a version that makes the writes of the rerun count as those of the first run did."""
    with torch.no_grad(), outside_functorch():
        copy = x.clone()
    set_versions([(copy, version)])
    return copy


def _may_have_changed(entry: _BufferState) -> bool:
    """PyTorch's norms write without counting it, and so does who writes to ``.data``.

    On a device nobody waits to see whether one did.
    """
    x = entry.x
    if version_of(x) != entry.version or entry.buffers.get(entry.name) is not x:
        return True
    if not entry.persistent or not x.is_cpu:
        return entry.persistent
    with torch.no_grad(), outside_functorch():
        return not torch.equal(x, entry.copy)


class ModuleBuffers:
    """Buffers of modules, by their attributes, before the first run; :meth:`settle` keeps what changed."""

    __slots__ = ("_entries",)

    def __init__(self, insides: Iterable[dict[str, Any]]) -> None:
        self._entries = list(_updated_by_running(insides))

    def settle(self) -> None:
        """The first run is over."""
        changed = {id(entry.buffers) for entry in self._entries if _may_have_changed(entry)}
        self._entries = [entry for entry in self._entries if id(entry.buffers) in changed]

    def put_back(self, stack: contextlib.ExitStack) -> None:
        """They are as they were before the first run, until ``stack`` is left."""
        for buffers, name, _, version, copy, _ in self._entries:
            if name in buffers:
                stack.callback(buffers.__setitem__, name, buffers[name])
                buffers[name] = _copy(copy, version)
