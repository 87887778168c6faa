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

from .._torch_private import is_wrapped, outside_functorch, set_versions

__all__ = ["ModuleBuffers", "insides_of", "modules_among", "parameters_in"]

_Buffers = dict[str, Tensor | None]


class _Entry(NamedTuple):
    """A buffer before the first run."""

    buffers: _Buffers
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


def insides_of(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The attributes of ``modules`` and of what is in them, each once."""
    found: list[dict[str, Any]] = []
    seen: set[int] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        inside = module.__dict__
        found.append(inside)
        children = inside.get("_modules")
        if children and type(children) is dict:
            waiting.extend(child for child in children.values() if child is not None)
    return found


def parameters_in(insides: Iterable[dict[str, Any]]) -> Iterator[Tensor]:
    """The parameters that modules hold themselves, by their attributes."""
    for inside in insides:
        parameters = inside.get("_parameters")
        if parameters and type(parameters) is dict:  # scripted ones have none of their own
            yield from (p for p in parameters.values() if p is not None)


def _updated_by_running(insides: Iterable[dict[str, Any]]) -> Iterator[_Entry]:
    """The buffers of modules in training mode."""
    for inside in insides:
        buffers = inside.get("_buffers")
        if not (buffers and inside.get("training") and type(buffers) is dict):
            continue
        passing = inside.get("_non_persistent_buffers_set") or ()
        for name, x in buffers.items():
            if x is not None and _is_plain(x):
                yield _Entry(buffers, name, x, x._version, _copy(x, x._version), name not in passing)


def _is_plain(x: Any) -> bool:
    return type(x) is Tensor and not (x.requires_grad or x.is_inference() or is_wrapped(x))


def _copy(x: Tensor, version: int) -> Tensor:
    """With a version that makes the writes of the rerun count as those of the first run did."""
    with torch.no_grad(), outside_functorch():
        copy = x.clone()
    set_versions([(copy, version)])
    return copy


def _may_have_changed(entry: _Entry) -> bool:
    """PyTorch's norms write without counting it, and so does who writes to ``.data``.

    On a device nobody waits to see whether one did.
    """
    x = entry.x
    if x._version != entry.version or entry.buffers.get(entry.name) is not x:
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
