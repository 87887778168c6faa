"""Jacobians, Hessians and their diagonals by fewer products, where structure allows it.

Decides whether structure is worth looking for, evaluates by color, checks, and hands back matrices; ``None``
means that the dense way is to be taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _engine, _products, _structure
from ._arguments import Prepared
from ._assembly import result_dtype
from ._certificate import agreement, precision, probe_rows, warn_mismatch
from ._colored import chunk_of, collect, color_seeds, hessian_products, jacobian_products
from ._engine import Linearization
from ._random import RandomState
from ._second_order import Options, SecondOrder
from ._separable import find_layout
from .coloring.recovery import Recovery, jacobian_recovery, symmetric_recovery, symmetrized
from .sparsity.pattern import Pattern

__all__ = ["csr", "dense", "diagonals", "full_csr", "hessian", "jacobian", "refuse_nested"]

# Bytes that the dense products must move before anybody looks for structure: detection of a small graph
# takes about 30 ms, and a core moves some 4 GB in a second.
_WORTH_LOOKING = 1 << 29
# Structure pays if it saves at least this factor of products.
_GAIN = 2


def refuse_nested(caller: str) -> None:
    """Sparse results exist outside ``torch.func`` and ``torch.compile`` only."""
    if _engine.compiling() or _engine.in_functorch():
        raise RuntimeError(
            f"{caller}: sparse=True can't be had inside a torch.func transform or torch.compile, which know "
            "no CSR tensors; make a plan outside (plan_jacobian, plan_hessian) and use its values(...)"
        )


def _is_worth_looking(products: int, row_bytes: int) -> bool:
    return products * row_bytes >= _WORTH_LOOKING


def _has_batch_axis(lin: Linearization, size: int, same_axes: bool = False) -> bool:
    """Whether the graph alone shows a block-diagonal structure, which the dense way makes use of."""
    root = lin.roots[0]
    return all(find_layout(root, x, size, same_axes=same_axes) is not None for x in lin.inputs)


def _make_seeds(recovery: Recovery, colors: Tensor, probes: Tensor | None) -> Callable[..., Any]:
    def make(dtype: torch.dtype, device: torch.device) -> Any:
        return color_seeds(colors, recovery.ncolors, probes, dtype, device)

    return make


def certified(
    caller: str,
    recovery: Recovery,
    values: Sequence[Tensor],
    probes: Tensor | None,
    probed: Sequence[Tensor],
    eps: float,
) -> bool:
    """Whether the values agree with the plain products; a warning says so if not."""
    if probes is None:
        return True
    with torch.no_grad():
        detached = [v.detach() for v in values]
        found = agreement(recovery, detached, probes, [p.detach() for p in probed], eps)
    if all(bool(fine.all()) for fine in found):
        return True
    warn_mismatch(caller, recovery)
    return False


# ---------------------------------------------------------------------------------------------------------
# Jacobians


class Found(NamedTuple):
    """One matrix per input, and whether forward mode gave them."""

    matrices: list[Tensor]
    forward: bool


def jacobian(
    caller: str,
    f: Callable[..., Any],
    prepared: Prepared,
    lin: Linearization,
    y: Tensor,
    mode: str,
    options: Options,
    random: RandomState | None,
    *,
    hooked: bool,
    sparse: bool,
    verify: bool,
) -> Found | None:
    """One matrix per input, CSR or dense; ``None`` where the dense way is to be taken."""
    if _engine.compiling() or _engine.in_functorch():
        return None
    rows, columns = y.numel(), sum(x.numel() for x in prepared.inputs)
    if any(x.dtype.is_complex for x in prepared.inputs):
        mode = "reverse"
    products = {"reverse": rows, "forward": columns}.get(mode, min(rows, columns))
    size = _products.row_bytes(lin)
    if not sparse and (not _is_worth_looking(products, size) or _has_batch_axis(lin, size)):
        return None
    limit = None if sparse else products * size
    patterns = _structure.jacobian_patterns(f, prepared, rows, limit)
    if patterns is None or all(pattern.dense for pattern in patterns):
        return None
    most = products if sparse else products / _GAIN
    recovery = jacobian_recovery(patterns, mode, most)
    if recovery is None:
        return None
    try:
        values = _jacobian_values(caller, f, prepared, lin, y, recovery, options, random, hooked, verify)
    except Exception:
        if mode != "auto" or recovery.mode != "forward":
            raise
        recovery = jacobian_recovery(patterns, "reverse", most)  # an operation has no forward derivative
        if recovery is None:
            return None
        values = _jacobian_values(caller, f, prepared, lin, y, recovery, options, random, hooked, verify)
    if values is None:
        return None
    build = csr if sparse else dense
    matrices = [
        build(pattern, v, x.device) if x.dim() > 0 else dense(pattern, v, x.device)
        for pattern, v, x in zip(patterns, values, prepared.inputs, strict=True)
    ]
    return Found(matrices, recovery.mode == "forward")


def _jacobian_values(
    caller: str,
    f: Callable[..., Any],
    prepared: Prepared,
    lin: Linearization,
    y: Tensor,
    recovery: Recovery,
    options: Options,
    random: RandomState | None,
    hooked: bool,
    verify: bool,
) -> list[Tensor] | None:
    """Values of each input's entries; ``None`` if the check fails."""
    probes = probe_rows(recovery) if verify else None
    size = _products.row_bytes(lin)

    chunk = chunk_of(options, size, recovery, y)
    products = jacobian_products(
        f,
        prepared,
        lin,
        y,
        recovery,
        _make_seeds(recovery, recovery.coloring.colors, probes),
        chunk,
        options,
        random,
        hooked,
    )
    dtypes = [result_dtype(x, y) for x in prepared.inputs]
    values, probed, _ = collect(recovery, products, dtypes, y.device, options.keep)
    eps = precision(prepared.inputs, y)
    return values if certified(caller, recovery, values, probes, probed, eps) else None


# ---------------------------------------------------------------------------------------------------------
# Hessians


def hessian(
    caller: str,
    f: Callable[..., Any],
    second: SecondOrder,
    mode: str,
    options: Options,
    random: RandomState | None,
    *,
    sparse: bool,
    verify: bool,
) -> Tensor | None:
    """The Hessian by the only input, CSR or dense; ``None`` where the dense way is to be taken."""
    if _engine.compiling() or _engine.in_functorch():
        return None
    x = second.prepared.inputs[0]
    n = x.numel()
    size = second.row_bytes()
    if x.dim() == 0 or n == 0 or (not sparse and not _is_worth_looking(n, size)):
        return None
    if not sparse and mode != "forward_over_reverse":
        second.differentiate()
        lin = second.by_input(0)
        if lin is None or _has_batch_axis(lin, size, same_axes=True):
            return None
    patterns = _structure.hessian_patterns(f, second.prepared, None if sparse else n * size)
    if patterns is None or patterns[0].dense:
        return None
    pattern = symmetrized(patterns[0])
    if pattern.nnz * (1 if sparse else _GAIN) > n * n:
        return None
    recovery = symmetric_recovery(pattern)
    values = _hessian_values(caller, f, second, 0, mode, recovery, options, random, verify)
    if values is None:
        return None
    return (csr if sparse else dense)(pattern, values, x.device)


def _hessian_values(
    caller: str,
    f: Callable[..., Any],
    second: SecondOrder,
    which: int,
    mode: str,
    recovery: Recovery,
    options: Options,
    random: RandomState | None,
    verify: bool,
) -> Tensor | None:
    x = second.prepared.inputs[which]
    probes = probe_rows(recovery) if verify else None
    size = second.row_bytes()

    chunk = chunk_of(options, size, recovery, x)
    seeds = _make_seeds(recovery, recovery.coloring.colors, probes)
    failed: Exception | None = None
    for way in ("reverse_over_reverse", "forward_over_reverse") if mode == "auto" else (mode,):
        try:
            if way == "reverse_over_reverse":
                second.differentiate()
                if second.by_input(which) is None:  # linear
                    return torch.zeros(recovery.slots[0][0].numel(), dtype=x.dtype, device=x.device)
            else:
                second.take_gradient()
            products = hessian_products(f, second, which, way, seeds, chunk, options, random)
            values, probed, _ = collect(recovery, products, [x.dtype], x.device, options.keep)
            break
        except Exception as error:  # an operation lacks a derivative that this way needs
            failed = failed or error
    else:
        assert failed is not None
        raise failed
    eps = precision([x], x)
    return values[0] if certified(caller, recovery, values, probes, probed, eps) else None


def diagonals(
    caller: str, f: Callable[..., Any], second: SecondOrder, options: Options, random: RandomState | None
) -> list[Tensor | None]:
    """The Hessian's diagonal by each input, ``None`` where the dense way is to be taken."""
    inputs = second.prepared.inputs
    found: list[Tensor | None] = [None] * len(inputs)
    if _engine.compiling() or _engine.in_functorch():
        return found
    size = second.row_bytes()
    worth = []
    for i, x in enumerate(inputs):
        lin = second.by_input(i)
        if lin is not None and _is_worth_looking(x.numel(), size) and not _has_batch_axis(lin, size, True):
            worth.append(i)
    if not worth:
        return found
    limit = sum(inputs[i].numel() for i in worth) * size
    patterns = _structure.hessian_patterns(f, second.prepared, limit)
    if patterns is None:
        return found
    for i in worth:
        n = inputs[i].numel()
        if patterns[i].dense or _GAIN * patterns[i].nnz > n * n:
            continue
        recovery = symmetric_recovery(symmetrized(patterns[i]), diagonal=True)
        if 2 * recovery.ncolors * _GAIN > n:
            continue
        mode = "reverse_over_reverse"
        values = _hessian_values(caller, f, second, i, mode, recovery, options, random, True)
        if values is not None:
            found[i] = values.reshape(inputs[i].shape)
    return found


# ---------------------------------------------------------------------------------------------------------
# results


def csr(pattern: Pattern, values: Tensor, device: torch.device) -> Tensor:
    """A ``torch.sparse_csr`` matrix, differentiable if its values are."""
    values = values.to(device)
    return csr_tensor(pattern.indptr.to(device), pattern.indices.to(device), values, pattern.shape)


def csr_tensor(indptr: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A ``torch.sparse_csr`` tensor without PyTorch's warning that these are in beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        return torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)


def dense(pattern: Pattern, values: Tensor, device: torch.device) -> Tensor:
    """The same entries in a dense matrix."""
    values = values.to(device)
    where = (pattern.rows().to(device), pattern.indices.to(device))
    return torch.zeros(pattern.shape, dtype=values.dtype, device=device).index_put_(where, values)


def no_entries(zeros: Tensor) -> Tensor:
    """A matrix of zeros as CSR that lists nothing."""
    rows, columns = zeros.shape
    nothing = torch.empty(0, dtype=torch.int64, device=zeros.device)
    indptr = torch.zeros(rows + 1, dtype=torch.int64, device=zeros.device)
    return csr_tensor(indptr, nothing, zeros.new_empty(0), (rows, columns))


def full_csr(matrix: Tensor) -> Tensor:
    """A dense matrix as CSR that lists every entry: nothing is known of its structure."""
    pattern = Pattern.full((matrix.shape[0], matrix.shape[1]))
    return csr(pattern, matrix.reshape(-1), matrix.device)
