"""A function run once and written down: which operators touched what depends on its inputs.

The program refers to memory, not to tensor objects, so views and writes in place need no rule: whoever
replays it keeps a shadow of each piece of memory. Knows nothing of index sets or rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_private import (
    DispatchMode,
    OpOverload,
    has_hooks,
    is_missing_tangent,
    pytree,
    storage_key,
)
from ._memory import Const, Memory
from ._operator_facts import About, about
from .varying import addresses, lies_in

__all__ = ["Const", "Op", "Place", "Probe", "Program", "Recorder", "Ref"]


# Given the arguments, the keyword arguments and the result of an operator.
Probe = Callable[[tuple[Any, ...], dict[str, Any], Any], Any]


class Place:
    """A piece of memory that depends on the inputs; ``itemsize`` is that of the tensor that made it."""

    __slots__ = ("index", "itemsize", "nbytes")

    def __init__(self, index: int, nbytes: int, itemsize: int) -> None:
        self.index = index
        self.nbytes = nbytes
        self.itemsize = itemsize


class Ref(NamedTuple):
    """A tensor that depends on the inputs: where it lies in its place."""

    place: Place
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


class Op(NamedTuple):
    """One operator that met something dependent. Tensors in ``args`` are :class:`Ref` or :class:`Const`."""

    about: About
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[Any, ...]
    written: tuple[Ref, ...]
    extra: Any


class Program(NamedTuple):
    """What :class:`Recorder` wrote down."""

    ops: list[Op]
    places: list[Place]
    is_local: bool
    operators: tuple[str, ...]


# They exchange the memory itself, or reach memory that their argument is only a part of.
_REARRANGING = {"set", "resize", "resize_as", "as_strided_copy", "as_strided_scatter"}
# They show values without an operator.
_HANDING_OUT = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__}
# They read what has no memory, the zeros that stand for a missing tangent: PyTorch hands these on to modes as
# they are, and calls nothing below that knows them (2.13). `addcdiv` and `add(alpha=...)` call them.
_BLIND_TO_ZEROS = {torch.ops.aten.mul.Scalar, torch.ops.aten.add.Scalar}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def carries_derivative(dtype: torch.dtype) -> bool:
    """Whether a tensor of this dtype can depend differentiably on anything."""
    return dtype.is_floating_point or dtype.is_complex


class _Listener(TorchFunctionMode):
    """Tells of the tensors whose values are handed out to Python or NumPy."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _HANDING_OUT:
            self._tell(args[0])
        return func(*args, **(kwargs or {}))


class Recorder(DispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, writes down every operator that meets memory which depends on ``inputs``.

    Memory that was there before and is written into (running statistics) is put back by :meth:`undo`.

    Parameters
    ----------
    inputs : sequence of Tensor
        Any tensor that shares their memory depends on them.
    probes : dict
        By operator name: what a rule needs to know of the values, asked as the operator runs.
    varying : sequence of Tensor or numpy.ndarray
        Values of this call alone: where they decide anything, the structure is local.
    """

    def __init__(
        self, inputs: Sequence[Tensor], probes: dict[str, Probe], varying: Sequence[Any] = ()
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ops: list[Op] = []
        self._places: list[Place] = []
        self._dependent: dict[int, Place] = {}
        self._seen: set[int] = set()
        self._volatile: set[int] = set()
        self._memory = Memory()
        self._local = False
        self._cutting = False
        self._apart: set[int] = set()
        self._names: dict[str, None] = {}
        self._probes = probes
        self._listener: _Listener | None = _Listener(self._handed_out)
        self.unsupported: str | None = None
        self._arrays = [addresses(x) for x in varying if not isinstance(x, Tensor)]
        for x in varying:
            if isinstance(x, Tensor):
                self._varies(x, storage_key(x))
        for x in inputs:
            self.depends(x)

    def __enter__(self) -> Any:
        assert self._listener is not None
        self._listener.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        assert self._listener is not None
        self._listener.__exit__(*error)  # type: ignore[no-untyped-call]
        self._listener = None  # which holds us

    def _handed_out(self, x: Tensor) -> None:
        key = storage_key(x)
        self._local = self._local or key in self._seen or key in self._dependent
        if key in self._apart:  # NumPy may write there, which nobody sees
            self.unsupported = "memory that ignore_derivatives was given or gave is handed out"

    def _varies(self, x: Tensor, key: int) -> None:
        """Use no values in this memory; where it has no key (sparse layouts), nor in any other without."""
        self._seen.add(key)
        if key:
            self._volatile.add(self._memory.keep(x, key))

    def cut(self, x: Tensor) -> Tensor:
        """``x`` in memory of its own, which depends on no input but varies with them."""
        if x.layout != torch.strided or not carries_derivative(x.dtype):
            return x.detach()
        self._cutting = True
        try:
            copy = x.detach().clone()
        finally:
            self._cutting = False
        for one in (x, copy):  # in other runs they share memory
            if key := storage_key(one):
                self._apart.add(self._memory.keep(one, key))
        return copy

    def depends(self, x: Tensor) -> Ref:
        """Make the memory of ``x`` depend on the inputs, and say where ``x`` lies in it."""
        return self._depends(x, self._memory.keep(x, storage_key(x)))

    def _depends(self, x: Tensor, key: int) -> Ref:
        place = self._dependent.get(key)
        if place is None:
            place = Place(len(self._places), x.untyped_storage().nbytes(), x.itemsize)
            self._places.append(place)
            self._dependent[key] = place
        return _ref(x, place)

    def reference(self, x: Tensor) -> Ref | None:
        """Where ``x`` lies; ``None`` if it doesn't depend on the inputs."""
        place = self._dependent.get(storage_key(x))
        return None if place is None or not carries_derivative(x.dtype) else _ref(x, place)

    def program(self) -> Program:
        """What has been recorded."""
        return Program(self._ops, self._places, self._local, tuple(self._names))

    def undo(self) -> None:
        """Put back what the run wrote into memory that was there before."""
        self._memory.undo()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            self.unsupported = str(func)  # a higher-order operator keeps its inside to itself
            return func(*args, **kwargs)
        facts = about(func)
        self._names[facts.full_name] = None
        if facts.mutable:
            for x in self._written(facts, args, kwargs):
                key = storage_key(x)
                if key in self._apart:
                    self.unsupported = f"{facts.full_name} on what ignore_derivatives was given or gave"
                self._memory.before_write(x, key)
        if func in _BLIND_TO_ZEROS and is_missing_tangent(args[0]):
            args = (torch.zeros_like(args[0]), *args[1:])
        out = func(*args, **kwargs)
        self._record(facts, args, kwargs, out)
        return out

    def _written(self, facts: About, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        found: list[Tensor] = []
        for where in facts.written:
            if isinstance(where, str):
                found.extend(tensors_in(kwargs.get(where)))
            elif where < len(args):
                found.extend(tensors_in(args[where]))
            else:
                found.extend(tensors_in(kwargs.get(facts.parameters[where][0])))
        return found

    def _record(self, facts: About, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        given = [*tensors_in(args), *tensors_in(tuple(kwargs.values()))]
        results = list(tensors_in(out if isinstance(out, (list, tuple)) else (out,)))
        key_of = {id(x): storage_key(x) for x in given}
        keys = set(key_of.values())
        for x in results:
            key_of.setdefault(id(x), storage_key(x))
        # What has no memory to be known by (sparse layouts) is never taken for a view.
        fresh = [x for x in results if not key_of[id(x)] or key_of[id(x)] not in keys]
        carrying = {key_of[id(x)] for x in given if carries_derivative(x.dtype)}
        dependent = not self._cutting and not carrying.isdisjoint(self._dependent)
        self._look_at(given, key_of)
        seen = dependent or not keys.isdisjoint(self._seen) or not keys.isdisjoint(self._dependent)
        if facts.reveals_values and seen:
            self._local = True
        written = self._written(facts, args, kwargs) if facts.mutable else []
        if not fresh and not written:
            return  # a view: its memory is known
        for x in fresh:
            if key_of[id(x)]:
                self._memory.made(x, key_of[id(x)])
        self._memory.after_write(key_of[id(x)] for x in written)
        if dependent:
            self._append(facts, args, kwargs, out, fresh, written, key_of)
        volatile = seen or facts.random or not keys.isdisjoint(self._volatile)
        for x in (*fresh, *written):
            key = key_of[id(x)]
            if key and (volatile or (facts.adds_to and self._memory.was_there(key))):
                self._volatile.add(self._memory.keep(x, key))
                if seen:
                    self._seen.add(key)

    def _look_at(self, given: Sequence[Tensor], key_of: dict[int, int]) -> None:
        """Flags and hooks of tensors that an operator was given."""
        for x in given:
            if x.requires_grad and key_of[id(x)]:
                self._volatile.add(self._memory.keep(x, key_of[id(x)]))
            if self._arrays and lies_in(x, self._arrays):
                self._varies(x, key_of[id(x)])
            if has_hooks(x):
                self.unsupported = "a hook on a tensor in f"
            if x.is_nested:
                self.unsupported = "a nested tensor in f"

    def _append(
        self,
        facts: About,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        fresh: list[Tensor],
        written: list[Tensor],
        key_of: dict[int, int],
    ) -> None:
        if facts.name in _REARRANGING:
            self.unsupported = f"{facts.full_name} in f"
        # Arguments first: what the operator makes of them must not depend on them yet.
        new = {id(x) for x in fresh}
        targets = {id(x) for x in written}
        overwritten = {key_of[id(x)] for x in written}
        coded = self._code(args, overwritten, key_of)
        coded_kwargs = {name: self._code(value, overwritten, key_of) for name, value in kwargs.items()}
        outs: list[Any] = []
        for x in pytree.tree_leaves(out):
            if not isinstance(x, Tensor):
                outs.append(x)
                continue
            key = key_of[id(x)]
            if not carries_derivative(x.dtype):
                outs.append(self._memory.constant(x, key, True, False))
            elif not key:
                self.unsupported = f"{facts.full_name} makes a tensor of layout {x.layout}"
            elif id(x) in new or id(x) in targets:
                outs.append(self._depends(x, self._memory.keep(x, key)))
            else:
                outs.append(self.reference(x))
        refs = []
        for x in written:
            key = key_of[id(x)]
            if key and carries_derivative(x.dtype):
                refs.append(self._depends(x, self._memory.keep(x, key)))
            elif key in self._dependent or not key:
                self.unsupported = f"{facts.full_name} writes into memory that depends on the input"
        probe = self._probes.get(facts.name)
        extra = None if probe is None else probe(args, kwargs, out)
        self._ops.append(Op(facts, tuple(coded), coded_kwargs, tuple(outs), tuple(refs), extra))

    def _code(self, value: Any, overwritten: set[int], key_of: dict[int, int]) -> Any:
        if isinstance(value, Tensor):
            key = key_of[id(value)]
            place = self._dependent.get(key)
            if place is not None and carries_derivative(value.dtype):
                return _ref(value, place)
            seen = key in self._seen or place is not None
            fixed = not seen and key not in self._volatile
            if key in overwritten:  # by this very operator
                return Const(value, seen, False)
            return self._memory.constant(value, key, seen, fixed)
        if isinstance(value, (list, tuple)):
            return [self._code(part, overwritten, key_of) for part in value]
        return value


def _ref(x: Tensor, place: Place) -> Ref:
    return Ref(place, tuple(x.shape), x.stride(), int(x.storage_offset()), x.dtype)
