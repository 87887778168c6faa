"""Notes on an error that ``f`` or its backward pass raised: what may be behind it (PEP 678).

Looks at errors and arguments only, after the fact; it must not know how a derivative is computed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ._arguments import NUMBER, Prepared, is_number, is_promoted
from ._torch_private import pull_back

__all__ = ["annotate", "call", "pulled"]


def call(f: Callable[..., Any], prepared: Prepared, tracked: Sequence[Tensor]) -> Any:
    """``f`` with ``tracked`` in place of its inputs."""
    try:
        return f(*prepared.arguments(tracked))
    except Exception as error:
        annotate(error, prepared)
        raise


def pulled(
    roots: Sequence[Tensor],
    seeds: Sequence[Tensor],
    inputs: Sequence[Tensor],
    retain: bool,
    create_graph: bool,
    prepared: Prepared | None = None,
) -> list[Tensor | None]:
    """One backward pass; see :func:`pull_back`. ``prepared``: what its function was called with."""
    try:
        return pull_back(roots, seeds, inputs, retain, create_graph)
    except RuntimeError as error:
        if "donated buffers" in str(error):
            _add_note(
                error,
                "the model's first backward pass, here or in the compiler's cache, kept no graph; it is "
                "compiled to overwrite what the forward pass kept, and can be pulled back once, by gradient "
                "and withgradient. For the others set torch._functorch.config.donated_buffer = False before "
                "it is compiled (before it runs for the first time).",
            )
        elif "modified by an inplace operation" in str(error):
            _add_note(
                error,
                "a tensor that the value was computed from has been written into since, as a parameter is by "
                "an optimizer's step: call pullback again after that, or pull back before. Inside f, write "
                "into a clone().",
            )
        elif "a second time" in str(error):
            _add_note(
                error,
                "f must not call backward() on what it returns; return the loss. Of what was computed before "
                "and has been pulled back, take detach().",
            )
        elif prepared is not None:
            _on_promoted(error, list(prepared.promoted), prepared)
        raise


def annotate(error: BaseException, prepared: Prepared) -> None:
    """Add to an error that calling ``f`` raised what explains it; the caller raises it again."""
    text = str(error)
    made = list(prepared.promoted)
    if isinstance(error, TypeError) and _WANTS_NUMBER.search(text):
        made += [f"{what}, reached f as a tensor" for what in _numbers(prepared.slots)]
    _on_promoted(error, made, prepared)
    if prepared.promoted and any(isinstance(x, PackedSequence) for x in prepared.args):
        _add_note(
            error,
            "a PackedSequence p has integers that belong to it; pass p.data, and let f make it again, as "
            "p._replace(data=...).",
        )
    if isinstance(error, TypeError) and (error.__traceback__ is None or error.__traceback__.tb_next is None):
        _on_call(error, text, prepared)
    if isinstance(error, (TypeError, AttributeError)):
        _on_lists(error, text, prepared)
    if isinstance(error, RuntimeError):
        if "in-place" in text or "inplace" in text:
            _on_write(error, text)
        if "dtype" in text or "scalar type" in text:
            _on_dtypes(error, prepared)
    if isinstance(error, (RuntimeError, TypeError)) and _MET_NUMPY.search(text):
        _add_note(
            error,
            "NumPy's functions and arrays can't take part in what is differentiated; write f with PyTorch's, "
            "as torch.sin for numpy.sin, and make a tensor of an array that f closes over, as by "
            "torch.as_tensor(a), before. What is computed from x.detach() counts as a constant.",
        )


def _on_promoted(error: BaseException, made: Sequence[str], prepared: Prepared) -> None:
    """``made``: in words, what reached ``f`` as something else than was given."""
    if made:
        way = "leave its position out of argnums, the positions that are differentiated"
        if not prepared.takes_argnums:
            way = "let f close over it, as in lambda x: f(x, n)"
        _add_note(error, f"{'; '.join(made)}. To pass an argument to f as it was given, {way}.")


# What PyTorch says as NumPy asks a tensor for its numbers, and NumPy of a tensor.
_MET_NUMPY = re.compile(
    r"numpy\(\)|Cannot access data pointer of Tensor that doesn't have"
    r"|numpy\.ndarray.*Tensor|Tensor.*numpy\.ndarray"
)
# What functions of PyTorch say that take no tensor for a number.
_WANTS_NUMBER = re.compile(
    r"must be (.*\b)?(bool|floats?|ints?|[Nn]umber)\b.*, not Tensor"
    r"|combination of arguments - got \([^)]*Tensor.*\bNumber\b"
    r"|only integer tensors of a single",
    re.DOTALL,
)


def _numbers(slots: Sequence[Any], within: str = "") -> Iterator[str]:
    """In words, the numbers that became tensors and weren't integers, which have been told of."""
    for position, slot in enumerate(slots):
        where = within or f"argument {position}"
        if slot.kind is NUMBER and not is_promoted(slot.value):
            yield f"{where}, the number {slot.value!r}"
        yield from _numbers(slot.leaves, within or f"a leaf of argument {position}")


def _on_call(error: TypeError, text: str, prepared: Prepared) -> None:
    """``f`` takes other arguments."""
    if "positional argument" not in text:
        return
    elif not prepared.args and prepared.inputs:
        _add_note(error, "with Params, f is called without arguments; let it close over the tensors.")
    elif not prepared.args:
        _add_note(
            error,
            "nothing is given after f, where its arguments belong: gradient(f, x) gives a value; for a "
            "function, write lambda x: gradient(f, x)[0]. For tensors that f closes over, pass "
            "Params([...]).",
        )
    else:
        _add_note(
            error,
            f"f is called with what is given after it ({len(prepared.args)}); for tensors that it closes "
            "over, pass Params([...]) instead, and for keywords write a lambda.",
        )


def _on_lists(error: TypeError | AttributeError, text: str, prepared: Prepared) -> None:
    """``f`` takes a list of numbers for an array."""
    for position, x in enumerate(prepared.args):
        name = type(x).__name__
        if type(x) in (list, tuple) and x and name in text and all(_is_number(entry) for entry in x):
            _add_note(
                error,
                f"argument {position} is a {name}, and f gets it as a {name} of tensors; for an array, pass "
                "torch.tensor(...).",
            )


def _is_number(x: object) -> bool:
    return is_number(x) or (isinstance(x, Tensor) and x.ndim == 0)


def _on_write(error: RuntimeError, text: str) -> None:
    if "captured Tensor" in text:
        _add_note(
            error,
            "in forward mode and inside torch.func transforms f may not write in place into what it closes "
            "over. A batch norm in training mode does so with its running statistics: call module.eval(), or "
            "torch.func.replace_all_batch_norm_modules_(module).",
        )
        return
    _add_note(
        error,
        "f may not write in place into what it is differentiated by; write into a clone() of it, or use "
        "torchzygote.Buffer.",
    )


def _on_dtypes(error: RuntimeError, prepared: Prepared) -> None:
    found = list(_floating(prepared.args))
    if len({dtype for _, dtype in found}) < 2:
        return
    listed = ", ".join(f"{what} {dtype}" for what, dtype in found)
    _add_note(
        error,
        f"the floating dtypes of the arguments differ: {listed}. None is converted; make them one, as in "
        "x.to(torch.float32) or a.astype(numpy.float32), or module.double().",
    )


def _floating(args: tuple[Any, ...]) -> Iterator[tuple[str, str]]:
    """What has which floating dtype, in words, for the arguments that are no structures."""
    for position, x in enumerate(args):
        if isinstance(x, Tensor) and x.dtype.is_floating_point:
            yield f"argument {position} is", str(x.dtype).removeprefix("torch.")
        elif isinstance(x, np.ndarray) and x.dtype.kind == "f":
            yield f"argument {position}, a NumPy array, is", str(x.dtype)
        elif isinstance(x, nn.Module):
            for dtype in sorted({str(p.dtype) for p in x.parameters() if p.dtype.is_floating_point}):
                yield f"parameters of argument {position} are", dtype.removeprefix("torch.")


def _add_note(error: BaseException, note: str) -> None:
    note = f"torchzygote: {note}"
    if hasattr(error, "add_note"):
        if note not in getattr(error, "__notes__", ()):
            with contextlib.suppress(Exception):  # it may take none, as frozen dataclasses don't
                error.add_note(note)
        return
    last: BaseException = error  # Python 3.10: the note goes to the end of the chain of causes
    while last.__cause__ is not None:
        last = last.__cause__
    with contextlib.suppress(Exception):
        last.__cause__ = RuntimeError(note)
