"""Jacobians, Hessians and their diagonals by fewer products, where structure allows it.

Decides whether structure is worth looking for, evaluates by color, checks, and hands back matrices; ``None``
means that the dense way is to be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import _engine, _structure
from ._assembly import result_dtype
from ._certificate import agreement, precision, probe_rows, warn_mismatch
from ._colored import (
    Collected,
    MakeSeeds,
    Products,
    are_linear,
    chunk_of,
    collect,
    color_seeds,
    hessian_products,
    jacobian_products,
)
from ._cost_model import RowCost
from ._crosscheck import explains_pullback
from ._first_order import FirstOrder
from ._numbers import show_numbers
from ._other_ways import another_may_do, first_that_does, suppressed
from ._products import Seeds
from ._pulling import Options
from ._random import RandomState
from ._repetition import settle_colored
from ._second_order import SecondOrder
from ._separable import find_hessian_layouts
from ._structure_heuristics import has_batch_axis, looking_limit, read_stencil
from ._warning import making_sparse
from .coloring.recovery import Recovery, jacobian_recovery, symmetric_recovery, symmetrized
from .sparsity.pattern import Pattern

__all__ = ["add_diagonals", "csr", "dense", "full_csr", "hessian", "jacobian", "refuse_nested"]

# Structure pays if it saves at least this factor of products.
_GAIN = 2


def refuse_nested(caller: str) -> None:
    """Sparse results exist outside ``torch.func``, forward mode and ``torch.compile`` only."""
    if _engine.compiling() or _engine.in_transform():
        raise RuntimeError(
            f"{caller}: sparse=True can't be had inside a torch.func transform, forward mode or "
            "torch.compile, which know no CSR tensors; make a plan outside (plan_jacobian, plan_hessian) and "
            "use its values(...)"
        )


def _refuse_without_numbers(caller: str) -> NoReturn:
    raise RuntimeError(
        f"{caller}: sparse=True finds structure by numbers, and is checked by them: expected arguments that "
        "have some, got tensors on the meta device, fake ones, or what make_fx traces; use sparse=False"
    )


def _make_seeds(recovery: Recovery, colors: Tensor, probes: Tensor | None) -> MakeSeeds:
    def make(dtype: torch.dtype, device: torch.device) -> tuple[Seeds, int]:
        return color_seeds(colors, recovery.ncolors, probes, dtype, device)

    return make


def certified(
    caller: str,
    recovery: Recovery,
    values: Sequence[Tensor],
    probes: Tensor | None,
    probed: Sequence[Tensor],
    eps: float,
    multiply: Callable[[Callable[..., Any]], Products],
    linear: Callable[[], bool],
) -> bool:
    """Whether the values agree with the plain products; a warning says so if not.

    ``multiply``: the products of other seeds. ``linear()``: as for :func:`settle_colored`.
    """
    if probes is None:
        return True
    plain = [p.detach() for p in probed]
    with torch.no_grad():
        found = agreement(recovery, [v.detach() for v in values], probes, plain, eps, True)

    if settle_colored(found, recovery, probes, plain, multiply, linear):
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
    first: FirstOrder, cost: RowCost, mode: str, options: Options, *, sparse: bool, verify: bool
) -> Found | None:
    """One matrix per input, CSR or dense; ``None`` where the dense way is to be taken."""
    if not show_numbers([first.y]):
        if sparse:
            _refuse_without_numbers(first.caller)
        return None
    lin, inputs = first.lin, first.prepared.inputs
    rows, columns = first.y.numel(), sum(x.numel() for x in inputs)
    if any(x.dtype.is_complex for x in inputs):
        mode = "reverse"
    products = {"reverse": rows, "forward": columns}.get(mode, min(rows, columns))
    patterns: Sequence[Pattern] | None = None
    limit: int | None = None
    if not sparse:
        patterns = read_stencil(lin, cost, products)
        limit = looking_limit(products, cost, lin) if patterns is None else None
        if limit == 0 or has_batch_axis(lin, cost):
            return None
    if len({x.device for x in (first.y, *inputs)}) > 1:
        return None
    if patterns is None:
        patterns = _structure.jacobian_patterns(
            first.caller, first.f, first.prepared, rows, limit, first.random
        )
    if patterns is None or all(pattern.lists_all for pattern in patterns):
        return None
    most = products if sparse else products / _GAIN
    for way in ("auto", "reverse") if mode == "auto" else (mode,):
        recovery = jacobian_recovery(patterns, way, most)
        if recovery is None:
            return None
        forward = recovery.mode == "forward"
        try:
            values = _jacobian_values(first, cost, recovery, options, verify)
            break
        except Exception as error:  # an operation has no forward derivative
            if way != "auto" or not forward or not another_may_do(error):
                raise
    if values is None:
        return None
    build = csr if sparse else dense
    matrices = [
        build(pattern, v, x.device) if x.dim() > 0 else dense(pattern, v, x.device)
        for pattern, v, x in zip(patterns, values, inputs, strict=True)
    ]
    return Found(matrices, forward)


def _jacobian_values(
    first: FirstOrder,
    cost: RowCost,
    recovery: Recovery,
    options: Options,
    verify: bool,
    *,
    has_pullback: bool = True,
) -> list[Tensor] | None:
    """Values of each input's entries; ``None`` if the check fails."""
    lin, y, inputs = first.lin, first.y, first.prepared.inputs
    # A pushforward would make the same mistakes that the products make; hooks are for reverse mode, though.
    by_pullback = verify and has_pullback and recovery.mode == "forward" and not first.hooked
    probes = probe_rows(recovery) if verify and not by_pullback else None
    chunk = chunk_of(options, cost, recovery, y)

    def multiply(seeds: MakeSeeds, options: Options = options.once) -> Products:
        return jacobian_products(first, recovery, seeds, chunk, options)

    products = multiply(_make_seeds(recovery, recovery.coloring.colors, probes), options)
    dtypes = [result_dtype(x, y) for x in inputs]
    values, probed, _ = collect(recovery, products, dtypes, y.device, options.keep)
    eps = precision(inputs, y, lin.coarsest())
    if by_pullback:
        right = explains_pullback(lin, y, recovery, values)
        if right is None:
            return _jacobian_values(first, cost, recovery, options, verify, has_pullback=False)
        if not right:
            warn_mismatch(first.caller, recovery)
    else:
        linear = lambda: are_linear(first, recovery, probed)
        right = certified(first.caller, recovery, values, probes, probed, eps, multiply, linear)
    return values if right else None


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
    x = second.prepared.inputs[0]
    if not show_numbers([x]):
        if sparse:
            _refuse_without_numbers(caller)
        return None
    n = x.numel()
    if x.dim() == 0 or n == 0:
        return None
    if second.is_constant:
        return no_entries(x.new_zeros(()).expand(n, n)) if sparse else None
    if mode != "forward_over_reverse":
        with suppressed():  # an operation may lack a second backward; forward mode is next
            second.differentiate()
    cost = second.row_cost()
    patterns: Sequence[Pattern] | None = None
    limit: int | None = None
    if not sparse:
        lin = second.by_input(0)
        patterns = None if lin is None else read_stencil(lin, cost, n)
        limit = looking_limit(n, cost, lin) if patterns is None else None
        if limit == 0:
            return None
        if mode != "forward_over_reverse" and (
            lin is None or find_hessian_layouts(lin, cost, second.scalar) is not None
        ):
            return None  # linear, or a sum over samples, which the dense way makes use of
    if patterns is None:
        patterns = _structure.hessian_patterns(caller, f, second.prepared, limit, random)
    if patterns is None or patterns[0].lists_all:
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
    chunk = chunk_of(options, second.row_cost(), recovery, x)

    def multiply(way: str, seeds: Callable[..., Any], options: Options) -> Products:
        return hessian_products(f, second, which, way, seeds, chunk, options, random)

    def collected(way: str) -> Collected | None:
        """``None`` where the gradient depends on nothing."""
        if way == "reverse_over_reverse":
            second.differentiate()
            if second.by_input(which) is None:
                return None
        else:
            second.take_gradient()
        products = multiply(way, _make_seeds(recovery, recovery.coloring.colors, probes), options)
        return collect(recovery, products, [x.dtype], x.device, options.keep)

    ways = ("reverse_over_reverse", "forward_over_reverse") if mode == "auto" else (mode,)
    way, found = first_that_does(collected, ways)
    if found is None:
        return torch.zeros(recovery.entries(0), dtype=x.dtype, device=x.device)
    eps = precision([x], x, second.coarsest())
    again = lambda seeds: multiply(way, seeds, options.once)
    linear = lambda: way == "reverse_over_reverse" and second.is_linear_again(which)
    right = certified(caller, recovery, found.values, probes, found.probed, eps, again, linear)
    return found.values[0] if right else None


def add_diagonals(
    caller: str,
    f: Callable[..., Any],
    second: SecondOrder,
    options: Options,
    random: RandomState | None,
    found: list[Tensor | None],
) -> None:
    """Write the Hessian's diagonal by each input into ``found``, where ``None`` stands and colors give it."""
    inputs = second.prepared.inputs
    if not show_numbers(inputs) or all(h is not None for h in found):
        return
    cost = second.row_cost()
    patterns: dict[int, Pattern] = {}
    limits: dict[int, int] = {}
    for i, x in enumerate(inputs):
        lin = second.by_input(i)
        if found[i] is not None or lin is None:
            continue
        read = read_stencil(lin, cost, x.numel())
        if read is not None:
            patterns[i] = read[0]
        elif limit := looking_limit(x.numel(), cost, lin):
            limits[i] = limit
    if limits:
        traced = _structure.hessian_patterns(caller, f, second.prepared, sum(limits.values()), random)
        patterns.update({i: traced[i] for i in limits} if traced is not None else {})
    for i, pattern in sorted(patterns.items()):
        n = inputs[i].numel()
        if pattern.lists_all or _GAIN * pattern.nnz > n * n:
            continue
        recovery = symmetric_recovery(symmetrized(pattern), diagonal=True)
        if 2 * recovery.ncolors * _GAIN > n:
            continue
        mode = "reverse_over_reverse"
        values = _hessian_values(caller, f, second, i, mode, recovery, options, random, True)
        if values is not None:
            found[i] = values.reshape(inputs[i].shape)


# ---------------------------------------------------------------------------------------------------------
# results


def csr(pattern: Pattern, values: Tensor, device: torch.device) -> Tensor:
    """A ``torch.sparse_csr`` matrix, differentiable if its values are."""
    values = values.to(device)
    return csr_tensor(pattern.indptr.to(device), pattern.indices.to(device), values, pattern.shape)


def csr_tensor(indptr: Tensor, indices: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A ``torch.sparse_csr`` tensor without PyTorch's warnings."""
    with making_sparse():
        return torch.sparse_csr_tensor(
            indptr, indices, values, shape, device=values.device, check_invariants=False
        )


def dense(pattern: Pattern, values: Tensor, device: torch.device) -> Tensor:
    """The same entries in a dense matrix."""
    values = values.to(device)
    if pattern.lists_all:
        return values.reshape(pattern.shape).clone()  # no view
    where = (pattern.rows().to(device), pattern.indices.to(device))
    # of values: under vmap, zeros made from nothing couldn't take batched ones
    return values.new_zeros(pattern.shape).index_put_(where, values)


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
