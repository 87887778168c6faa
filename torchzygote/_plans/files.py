"""Plans on disk: an ``.npz`` file of plain arrays, checked field by field as it is read.

Nothing in a file is executed: pickled objects are refused. Knows nothing of functions or derivatives.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..coloring import Coloring
from ..coloring.recovery import Recovery
from ..sparsity.pattern import Pattern
from .signature import InputSpec

__all__ = ["Contents", "read", "write"]

_FORMAT = "torchzygote plan"
# The second one knows of patterns that list everything, of which no index is stored.
_VERSIONS = (1, 2)
_MODES = {
    "JacobianPlan": {"forward": "distance2_columns", "reverse": "distance2_rows"},
    "HessianPlan": {"symmetric": "star"},
}

_KINDS = ("floating point", "complex")
_DEVICES = ("cpu", "cuda", "xpu", "mps", "meta")
# What NumPy and zipfile raise for damaged files.
_BROKEN = (
    ValueError,
    TypeError,
    EOFError,
    NotImplementedError,
    OverflowError,
    RuntimeError,
    MemoryError,
    OSError,
    LookupError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


class Contents(NamedTuple):
    """What a file holds; ``argnums``: those that the plan was made with."""

    inputs: tuple[InputSpec, ...]
    recovery: Recovery
    argnums: int | Sequence[int] | None


def write(path: str | os.PathLike[str], kind: str, contents: Contents) -> None:
    """Write a plan of this kind, to this path exactly."""
    inputs, recovery, argnums = contents
    arrays: dict[str, Any] = {
        "format": np.array(_FORMAT),
        "version": np.array(_VERSIONS[any(pattern.lists_all for pattern in recovery.patterns)]),
        "kind": np.array(kind),
        "mode": np.array(recovery.mode),
        "rows": np.array(recovery.rows),
        "colors": recovery.coloring.colors.numpy(),
        "order": np.array(recovery.coloring.order),
        "count": np.array(len(inputs)),
    }
    if argnums is not None:
        arrays["argnums"] = np.array(argnums, dtype=np.int64)
    for i, (spec, pattern) in enumerate(zip(inputs, recovery.patterns, strict=True)):
        arrays[f"shape_{i}"] = np.array(spec.shape, dtype=np.int64)
        arrays[f"kind_{i}"] = np.array(spec.kind)
        arrays[f"dtype_{i}"] = np.array(spec.dtype)
        arrays[f"device_{i}"] = np.array(spec.device)
        if pattern.lists_all:
            arrays[f"full_{i}"] = np.array("given up" if pattern.dense else "found")
        else:
            arrays[f"indptr_{i}"] = pattern.indptr.numpy()
            arrays[f"indices_{i}"] = pattern.indices.numpy()
        arrays[f"local_{i}"] = np.array(pattern.is_local)
        arrays[f"operators_{i}"] = np.array(list(pattern.operators), dtype=np.str_)
        arrays[f"unknown_{i}"] = np.array(list(pattern.unknown), dtype=np.str_)
    file = io.BytesIO()  # what fails or is broken off while this is made leaves the file as it was
    np.savez_compressed(file, **arrays)
    with open(path, "wb") as stream:  # a path alone would get an ending
        stream.write(file.getbuffer())


def read(path: str | os.PathLike[str], kind: str) -> Contents:
    """Read a plan of this kind; ``ValueError`` with the reason for anything else."""
    name = os.fspath(path)
    if not os.path.isfile(name) and os.path.isfile(f"{name}.npz"):  # a folder of that name may be beside it
        name = f"{name}.npz"
    with open(name, "rb") as stream:
        try:
            if not zipfile.is_zipfile(stream):
                raise ValueError("it is no .npz file, or only a part of one")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as file:
                return _read(file, kind)
        except _BROKEN as error:
            raise ValueError(f"{name}: expected a {kind} saved by torchzygote, but {error}") from None


def _read(file: Any, kind: str) -> Contents:
    if _word(file, "format") != _FORMAT:
        raise ValueError("its format is another one")
    if _number(file, "version") not in _VERSIONS:
        known = " and ".join(map(str, _VERSIONS))
        raise ValueError(f"its version is {_number(file, 'version')}, and this torchzygote reads {known}")
    if _word(file, "kind") != kind:
        raise ValueError(f"it holds a {_word(file, 'kind')}")
    mode = _word(file, "mode")
    if mode not in _MODES[kind]:
        raise ValueError(f"its mode is {mode!r}")
    rows, count = _number(file, "rows"), _number(file, "count")
    if rows < 0 or not 1 <= count <= 10_000:
        raise ValueError(f"it has {rows} rows and {count} inputs")
    inputs: list[InputSpec] = []
    patterns: list[Pattern] = []
    for i in range(count):
        inputs.append(_spec(file, i))
        patterns.append(_pattern(file, i, rows, inputs[i]))
    if len({spec.device for spec in inputs}) > 1:
        raise ValueError("its inputs are on several devices")
    colors = _vector(file, "colors")
    columns = sum(pattern.shape[1] for pattern in patterns)
    expected = rows if mode == "reverse" else columns
    if colors.numel() != expected or (colors.numel() > 0 and int(colors.min()) < 0):
        raise ValueError(f"it has {colors.numel()} colors for {expected}, or negative ones")
    ncolors = int(colors.max()) + 1 if colors.numel() > 0 else 0
    if ncolors > expected:
        raise ValueError(f"it numbers {ncolors} colors for {expected}")
    recovery = Recovery(mode, patterns, Coloring(colors, ncolors, _MODES[kind][mode], _word(file, "order")))
    if not recovery.is_valid():
        raise ValueError("its coloring doesn't separate the entries")
    return Contents(tuple(inputs), recovery, _argnums(file))


def _argnums(file: Any) -> int | tuple[int, ...] | None:
    """None where the field is missing: older files don't have it."""
    if "argnums" not in file.files:
        return None
    array = _field(file, "argnums")
    if array.dtype != np.int64 or array.ndim > 1:
        raise ValueError("its argnums are neither a number nor a vector of 64-bit integers")
    return tuple(array.tolist()) if array.ndim else int(array)


def _spec(file: Any, i: int) -> InputSpec:
    shape = tuple(_vector(file, f"shape_{i}").tolist())
    spec = InputSpec(shape, *(_word(file, f"{field}_{i}") for field in ("kind", "device", "dtype")))
    known = isinstance(getattr(torch, spec.dtype, None), torch.dtype) and spec.device in _DEVICES
    if any(n < 0 for n in shape) or math.prod(shape) >= 1 << 63 or spec.kind not in _KINDS or not known:
        raise ValueError(
            f"input {i} has shape {shape}, kind {spec.kind!r}, dtype {spec.dtype!r}, device {spec.device!r}"
        )
    return spec


def _pattern(file: Any, i: int, rows: int, spec: InputSpec) -> Pattern:
    columns = math.prod(spec.shape)
    if f"full_{i}" in file.files:
        full = _word(file, f"full_{i}")
        if full not in ("given up", "found") or rows * columns >= 1 << 63:
            raise ValueError(f"pattern {i} is full, {full!r}, of {rows} rows and {columns} columns")
        return Pattern.full((rows, columns), given_up=full == "given up", **_told(file, i))
    indptr, indices = _vector(file, f"indptr_{i}"), _vector(file, f"indices_{i}")
    counts = indptr.diff()
    if (
        indptr.numel() != rows + 1
        or int(indptr[0]) != 0
        or int(indptr[-1]) != indices.numel()
        or (counts.numel() > 0 and int(counts.min()) < 0)
    ):
        raise ValueError(f"the row pointers of pattern {i} don't ascend from 0 to its entries")
    if indices.numel() > 0 and (int(indices.min()) < 0 or int(indices.max()) >= columns):
        raise ValueError(f"a column of pattern {i} is outside 0 to {columns - 1}")
    starts = torch.zeros(indices.numel() + 1, dtype=torch.bool, device="cpu")
    starts[indptr] = True
    if indices.numel() > 1 and bool(((indices.diff() <= 0) & ~starts[1:-1]).any()):
        raise ValueError(f"the columns of pattern {i} don't ascend within a row")
    return Pattern(
        (rows, columns),
        indptr,
        indices,
        **_told(file, i),
    )


def _told(file: Any, i: int) -> dict[str, Any]:
    """How a pattern was found."""
    return {
        "is_local": bool(_field(file, f"local_{i}")),
        "operators": tuple(str(name) for name in _field(file, f"operators_{i}")),
        "unknown": tuple(str(name) for name in _field(file, f"unknown_{i}")),
    }


def _field(file: Any, field: str) -> Any:
    if field not in file.files:
        raise ValueError(f"the field {field} is missing")
    array = file[field]
    if not isinstance(array, np.ndarray):
        raise ValueError(f"the field {field} is no array")
    return array


def _word(file: Any, field: str) -> str:
    array = _field(file, field)
    if array.dtype.kind != "U" or array.ndim != 0:
        raise ValueError(f"the field {field} is no text")
    return str(array)


def _number(file: Any, field: str) -> int:
    array = _field(file, field)
    if array.dtype.kind not in "iu" or array.ndim != 0:
        raise ValueError(f"the field {field} is no integer")
    return int(array)


def _vector(file: Any, field: str) -> Tensor:
    array = _field(file, field)
    if array.dtype != np.int64 or array.ndim != 1:
        raise ValueError(f"the field {field} is no vector of 64-bit integers")
    return torch.from_numpy(np.ascontiguousarray(array))
