"""Preparing arguments: what is differentiated, what passes through, and how results are put back together.

The one place that knows numbers, arrays, structures, modules and opaque values apart. It must not know how a
derivative is computed: it hands out flat tensors (``inputs``) and takes flat results.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ._call_options import check_argnums
from ._distributed import refuse_reduced
from ._flags import requires_grad
from ._structure_matching import parts_for
from ._torch_private import pytree, rebuilt
from ._warning import warn

__all__ = ["ARRAY", "MODULE", "NUMBER", "OPAQUE", "STRUCTURE", "Prepared", "kind_of", "prepare"]

OPAQUE, NUMBER, ARRAY, STRUCTURE, MODULE = "opaque", "number", "array", "structure", "module"

_COMPLEX_OF = {
    torch.float16: torch.complex32,
    torch.float32: torch.complex64,
    torch.bfloat16: torch.complex64,
    torch.float64: torch.complex128,
}
_INTEGERS = frozenset(
    getattr(torch, name)
    for name in ("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64")
    if hasattr(torch, name)
)


def is_inexact(x: object) -> bool:
    """Whether ``x`` is a tensor of floating or complex dtype: what may have a derivative."""
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def kind_of(x: object) -> str:
    """Which of the contract's words ``x`` is: number, array, structure, module or opaque."""
    if isinstance(x, Tensor):
        dtype = x.dtype
        return ARRAY if dtype.is_floating_point or dtype.is_complex or dtype in _INTEGERS else OPAQUE
    if isinstance(x, bool):
        return OPAQUE
    if isinstance(x, (int, float, complex)):
        return NUMBER
    if isinstance(x, np.ndarray):
        if torch.compiler.is_compiling():  # the tracer doesn't know the dtypes of NumPy's
            return kind_of(torch.as_tensor(x))
        return ARRAY if x.dtype.kind in "iufc" else OPAQUE
    if isinstance(x, np.generic):
        return NUMBER if x.dtype.kind in "iufc" else OPAQUE
    if isinstance(x, nn.Module):
        return MODULE
    # A torch.Size is a registered pytree of ints, but a function that takes one wants plain ints.
    if isinstance(x, (str, bytes, torch.Size)) or x is None or pytree.tree_is_leaf(x):
        return OPAQUE
    return STRUCTURE


def is_number(x: object) -> bool:
    """Whether ``x`` is a number; bools and time spans of NumPy's aren't."""
    return kind_of(x) is NUMBER


def number_to_tensor(x: Any) -> Tensor:
    """A Python number or NumPy scalar as a 0-dim tensor of the default dtype (or its complex dtype)."""
    dtype = torch.get_default_dtype()
    value = x
    if isinstance(x, np.generic):  # item() leaves what is longer than Python's numbers as it is
        value = complex(x) if x.dtype.kind == "c" else x.item()
    if isinstance(value, complex):
        dtype = _COMPLEX_OF[dtype]
    try:
        return torch.tensor(value, dtype=dtype)
    except OverflowError:
        size = f"about 10**{math.log10(abs(value)):.0f}"
        raise OverflowError(
            f"expected a number that fits into {dtype}, got an integer of {size}; scale it down"
        ) from None


def numpy_to_tensor(a: np.ndarray[Any, Any], *, promote: bool = True) -> Tensor:
    """A NumPy array as a tensor of its dtype; memory is shared where PyTorch can share it.

    ``promote``: integers become floating-point values.
    """
    if torch.compiler.is_compiling():
        found = torch.as_tensor(a)
        return found.to(torch.get_default_dtype()) if promote and found.dtype in _INTEGERS else found
    if promote and a.dtype.kind in "iu":
        return torch.as_tensor(a.astype(np.float64), dtype=torch.get_default_dtype())
    if a.dtype.itemsize > 16 or (a.dtype.kind == "f" and a.dtype.itemsize > 8):
        raise TypeError(
            f"expected a NumPy array that PyTorch has a dtype for, got dtype {a.dtype}; "
            "convert it first, e.g. with .astype(numpy.float64)"
        )
    if not a.flags.writeable or not a.dtype.isnative or any(s < 0 or s % a.itemsize for s in a.strides):
        a = np.array(a, dtype=a.dtype.newbyteorder("="), order="C")
    return torch.as_tensor(a)


def _array_to_tensor(x: Any) -> Tensor:
    if isinstance(x, np.ndarray):
        return numpy_to_tensor(x)
    tensor: Tensor = x
    if tensor.dtype in _INTEGERS:
        return tensor.to(torch.get_default_dtype())
    # A tensor made in inference mode can't be recorded by autograd; its copy can.
    return tensor.clone() if _is_inference(tensor) else tensor


def _is_inference(x: Tensor) -> bool:
    # Dynamo cannot trace the question; it does not trace inference tensors either.
    return not torch.compiler.is_compiling() and x.is_inference()


def refuse_unrecordable(p: Tensor, name: str) -> None:
    """Refuse a tensor that ``f`` finds by identity and autograd can't record: it would seem unused."""
    if is_lazy(p):
        raise ValueError(
            f"expected parameters that have a shape, got {name}, which has none before its lazy module is "
            "called; run the module once first"
        )
    if _is_inference(p):
        raise RuntimeError(
            f"expected parameters made outside torch.inference_mode(), got {name}, {type_name(p)}, made "
            "inside, which autograd can't record; make it outside, or use a clone() made outside"
        )


def to_tensor(x: Any, kind: str) -> Tensor:
    """The tensor that stands for a number or an array."""
    return number_to_tensor(x) if kind is NUMBER else _array_to_tensor(x)


def is_promoted(x: Any) -> bool:
    """Whether preparing ``x`` turned integers into floating-point values."""
    if isinstance(x, Tensor):
        return x.dtype in _INTEGERS
    if isinstance(x, (np.ndarray, np.generic)):
        return not torch.compiler.is_compiling() and x.dtype.kind in "iu"
    return isinstance(x, int) and not isinstance(x, bool)


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Qualified name to parameter, trainable ones only, each once."""
    refuse_reduced(module)
    return {name: p for name, p in module.named_parameters() if requires_grad(p)}


class _Slot:
    """One argument: its kind, and where its tensors are among the flat inputs."""

    __slots__ = ("kind", "leaves", "names", "spec", "start", "value")

    def __init__(self, kind: str, value: Any, start: int) -> None:
        self.kind = kind
        self.value = value
        self.start = start
        self.names: list[str] = []
        self.leaves: list[_Slot] = []
        self.spec: Any = None

    def argument(self, tracked: Sequence[Tensor]) -> Any:
        """What ``f`` gets in this place."""
        if self.kind is ARRAY or self.kind is NUMBER:
            return tracked[self.start]
        if self.kind is STRUCTURE:
            return pytree.tree_unflatten([leaf.argument(tracked) for leaf in self.leaves], self.spec)
        return self.value

    def result(self, results: Sequence[Tensor | None]) -> Any:
        """The flat results in the shape of the argument."""
        if self.kind is ARRAY or self.kind is NUMBER:
            return results[self.start]
        if self.kind is STRUCTURE:
            return rebuilt([leaf.result(results) for leaf in self.leaves], self.spec)
        if self.kind is MODULE:
            return dict(zip(self.names, results[self.start : self.start + len(self.names)], strict=True))
        return None

    def match(self, given: Any, where: str) -> list[Any]:
        """What ``given``, in the argument's shape, holds for each of its tensors; ``None`` is nothing."""
        if self.kind is ARRAY or self.kind is NUMBER:
            return [given]
        if self.kind is STRUCTURE:
            parts = parts_for(self.value, given, where, is_size)
            return [
                part for leaf, its in zip(self.leaves, parts, strict=True) for part in leaf.match(its, where)
            ]
        if self.kind is MODULE:
            if given is None:
                return [None] * len(self.names)
            if not isinstance(given, dict) or not set(given) <= set(self.names):
                raise ValueError(f"{where}: expected a dict by the names {self.names}, got {given!r}")
            return [given.get(name) for name in self.names]
        if given is not None:
            raise ValueError(
                f"{where}: expected None, as the argument is {type_name(self.value)} there, which is opaque, "
                f"got {type_name(given)}"
            )
        return []


def is_size(x: object) -> bool:
    """Whether ``x`` is opaque, though PyTorch takes it for a structure of ints."""
    return isinstance(x, torch.Size)


class Prepared:
    """The arguments of one call, flattened.

    ``inputs``: the tensors to differentiate by, converted but not tracked. ``owned[i]``: input ``i`` may be
    replaced by a tracked twin (``False`` for a module's parameters, which ``f`` finds by identity).
    ``takes_argnums``: some may be left out.
    """

    __slots__ = ("args", "inputs", "modules", "owned", "promoted", "simple", "slots", "takes_argnums")

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args
        self.inputs: list[Tensor] = []
        self.owned: list[bool] = []
        self.slots: list[_Slot] = []
        self.modules: list[tuple[nn.Module, list[str], int]] = []
        self.promoted: list[str] = []
        self.simple = False
        self.takes_argnums = True

    def arguments(self, tracked: Sequence[Tensor]) -> Sequence[Any]:
        """The arguments that ``f`` is called with."""
        if self.simple:
            return tracked
        return [slot.argument(tracked) for slot in self.slots]

    def results(self, results: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """One entry per argument, in the argument's own shape."""
        if self.simple:
            return tuple(results)
        return tuple(slot.result(results) for slot in self.slots)

    def places(self) -> list[int]:
        """For each input the first one that is the same tensor to ``f``: itself, unless modules share one."""
        first: dict[int, int] = {}
        both = zip(self.inputs, self.owned, strict=True)
        return [i if owned else first.setdefault(id(x), i) for i, (x, owned) in enumerate(both)]

    def copy_arrays(self) -> None:
        """Let go of the memory of NumPy arrays: nothing tells that somebody writes into it later."""
        waiting = list(self.slots)
        while waiting:
            slot = waiting.pop()
            waiting.extend(slot.leaves)
            if slot.kind is ARRAY and isinstance(slot.value, np.ndarray):
                self.inputs[slot.start] = self.inputs[slot.start].clone()

    def at(self, inputs: list[Tensor]) -> Prepared:
        """The same call at other inputs."""
        moved = Prepared(self.args)
        moved.inputs = inputs
        moved.owned = self.owned
        moved.slots = self.slots
        moved.modules = self.modules
        moved.promoted = self.promoted
        moved.simple = self.simple
        moved.takes_argnums = self.takes_argnums
        return moved


def _describe(value: Any, where: str, to: Tensor) -> str:
    if isinstance(value, Tensor):
        what = f"an integer tensor of dtype {value.dtype}"
    elif isinstance(value, np.ndarray):
        what = f"an integer NumPy array of dtype {value.dtype}"
    else:
        what = f"the integer {value!r}"
    return f"{where}, {what}, was promoted to a tensor of dtype {to.dtype}, because its derivative is real"


def _fill(prepared: Prepared, value: Any, where: str, kinds: Callable[[object], str]) -> _Slot:
    """The slot of one value; its tensors are appended to the flat inputs."""
    kind = kinds(value)
    slot = _Slot(kind, value, len(prepared.inputs))
    if kind is ARRAY or kind is NUMBER:
        try:
            tensor = to_tensor(value, kind)
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from None
        except OverflowError as error:
            raise OverflowError(
                f"{where}: {error}, or leave its position out of argnums: f gets it as it is"
            ) from None
        prepared.inputs.append(tensor)
        prepared.owned.append(True)
        # Dynamo, which can't follow the words for a number that varies, shows an error of its own anyway.
        if is_promoted(value) and not torch.compiler.is_compiling():
            prepared.promoted.append(_describe(value, where, tensor))
    elif kind is STRUCTURE:
        leaves, slot.spec = pytree.tree_flatten(value, is_leaf=is_size)
        slot.leaves = [_fill(prepared, leaf, f"a leaf of {where}", kinds) for leaf in leaves]
    elif kind is MODULE:
        found = trainable(value)
        for name, p in found.items():
            refuse_unrecordable(p, name)
        slot.names = list(found)
        prepared.modules.append((value, slot.names, slot.start))
        prepared.inputs.extend(found.values())
        prepared.owned.extend([False] * len(found))
    elif getattr(type(value), "torchzygote_stands_alone", False):
        raise TypeError(
            f"{where}: expected Params alone, in place of all arguments, got them among others, where "
            "nothing would be differentiated by them; let f close over what it needs, or leave the position "
            "out of argnums"
        )
    elif kinds is kind_of and isinstance(value, (dict, list, tuple)) and not torch.compiler.is_compiling():
        _warn_of_tensors_in(value, where)
    return slot


def _warn_of_tensors_in(value: Any, where: str) -> None:
    """A kind of dict, list or tuple that nobody knows how to make anew: its tensors are constants."""
    held = False
    with contextlib.suppress(Exception):  # it may do anything as it is iterated
        values = value.values() if isinstance(value, dict) else value
        held = any(is_inexact(x) or (isinstance(x, np.ndarray) and x.dtype.kind in "fc") for x in values)
    if held:
        kind = type(value).__name__
        base = next(base for base in (dict, list, tuple) if isinstance(value, base)).__name__
        warn(
            f"{where} is a {kind}, which isn't registered with PyTorch's pytrees: f gets it as it is, and "
            f"its result is None, though it holds tensors. Pass a {base}, or register {kind} by "
            "torch.utils._pytree.register_pytree_node; for constants leave its position out of argnums"
        )


def _arrays_only(value: object) -> str:
    kind = kind_of(value)
    return kind if kind is ARRAY or kind is NUMBER else OPAQUE


def prepare(
    args: tuple[Any, ...], argnums: int | Sequence[int] | None = None, *, arrays_only: bool = False
) -> Prepared:
    """Flatten the arguments of a call.

    ``arrays_only``: structures and modules pass through untouched, as Jacobians and Hessians want it.
    """
    prepared = Prepared(args)
    if argnums is None:
        simple = True
        for x in args:  # the common case, without any bookkeeping
            if type(x) is not Tensor or not x.dtype.is_floating_point or _is_inference(x):
                simple = False
                break
        if simple:
            prepared.simple = True
            prepared.inputs = list(args)
            prepared.owned = [True] * len(args)
            return prepared
    chosen = check_argnums(argnums, len(args))
    kinds = _arrays_only if arrays_only else kind_of
    for position, value in enumerate(args):
        if chosen is None or position in chosen:
            prepared.slots.append(_fill(prepared, value, f"argument {position}", kinds))
        else:
            prepared.slots.append(_Slot(OPAQUE, value, len(prepared.inputs)))
    return prepared


def type_name(x: object) -> str:
    """The type of ``x`` for a message, with shape and dtype where there are any."""
    if isinstance(x, (Tensor, np.ndarray)):
        return f"{type(x).__name__} of shape {tuple(x.shape)} and dtype {x.dtype}"
    return type(x).__name__


def name_of(f: Callable[..., Any]) -> str:
    """What to call a function in a message."""
    return getattr(f, "__qualname__", None) or type(f).__name__
