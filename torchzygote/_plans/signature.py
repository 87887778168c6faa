"""What a plan remembers of its arguments, and how a call that doesn't fit is refused.

Knows nothing of derivatives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._arguments import NUMBER, STRUCTURE, Prepared, kind_of
from .._call_arguments import is_implicit
from .._call_options import check_argnums
from .._filling import filled_in

__all__ = ["InputSpec", "check_count", "check_inputs", "numbers_beside_arrays", "specs_of"]


class InputSpec(NamedTuple):
    """The shape, kind of dtype and kind of device of one differentiated tensor, and the dtype it had."""

    shape: tuple[int, ...]
    kind: str
    device: str
    dtype: str


def _spec_of(x: Tensor) -> InputSpec:
    kind = "complex" if x.dtype.is_complex else "floating point"
    return InputSpec(tuple(x.shape), kind, x.device.type, str(x.dtype).removeprefix("torch."))


def specs_of(prepared: Prepared) -> tuple[InputSpec, ...]:
    """Those of a call."""
    return tuple(_spec_of(x) for x in prepared.inputs)


def numbers_beside_arrays(prepared: Prepared) -> None:
    """Have numbers on the device of the arrays, if it is one: what a plan keeps is on one device."""
    numbers = [slot.start for slot in prepared.slots if slot.kind is NUMBER]
    devices = {x.device for i, x in enumerate(prepared.inputs) if i not in numbers}
    if len(devices) != 1:
        return
    (device,) = devices
    for i in numbers:
        if prepared.inputs[i].device != device:
            prepared.inputs[i] = filled_in(prepared.inputs[i], device)


def check_count(caller: str, f: Callable[..., Any], made_for: int | None, args: tuple[Any, ...]) -> None:
    """``TypeError`` where ``f`` can't be called with so many.

    ``made_for``: with how many it could: none, where the plan is by ``Params``.
    """
    by_params = is_implicit(args)
    count = 0 if by_params else len(args)
    if made_for is None or count == made_for:
        return
    try:
        called = inspect.signature(f)
    except (TypeError, ValueError):  # of some builtins it isn't known
        return
    try:
        called.bind(*args[:count])
    except TypeError as error:
        wanted = f"{made_for} argument{'s' * (made_for != 1)}" if made_for else "Params"
        got = "Params" if by_params else len(args)
        raise TypeError(
            f"{caller}: expected {wanted}, as it was made for, got {got}, with which f can't be called: "
            f"{error}"
        ) from None


def _structures(args: Sequence[Any], argnums: int | Sequence[int] | None) -> str:
    """What to say of those that would have to be differentiated by."""
    chosen = check_argnums(argnums, len(args))
    said = [
        f"; argument {i} is a {type(x).__name__}, a structure, by which Jacobians aren't taken: for an "
        "array, pass torch.tensor(...)"
        for i, x in enumerate(args)
        if (chosen is None or i in chosen) and kind_of(x) is STRUCTURE
    ]
    return "".join(said)


def check_inputs(
    caller: str,
    expected: Sequence[InputSpec],
    given: Sequence[Any],
    args: Sequence[Any] = (),
    argnums: int | Sequence[int] | None = None,
) -> None:
    """``ValueError`` with a line for each field that differs; ``args``: what the call was given."""
    found = [_spec_of(x) for x in given]
    if len(found) != len(expected):
        raise ValueError(
            f"{caller}: expected {len(expected)} differentiated arguments, as it was made for, "
            f"got {len(found)}{_structures(args, argnums) if args else ''}"
        )
    differences = [
        f"  input {i}, {label}: expected {getattr(want, field)}, got {getattr(got, field)}"
        for i, (want, got) in enumerate(zip(expected, found, strict=True))
        for field, label in (("shape", "shape"), ("kind", "kind of dtype"), ("device", "device"))
        if getattr(want, field) != getattr(got, field)
    ]
    if differences:
        listed = "\n".join(differences)
        raise ValueError(
            f"{caller}: expected the arguments that it was made for, but they differ; "
            f"make a new plan for other ones:\n{listed}"
        )
