"""Jacobians: the public functions and the worker that gives value and matrices.

Decides with ``_plan``, multiplies with ``_products``, puts together with ``_assembly``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _engine, _plan, _products, _separable, _state
from ._arguments import Prepared, kind_of, number_to_tensor, numpy_to_tensor, prepare, type_name
from ._assembly import Columns, Rows, as_result, result_dtype
from ._engine import Linearization
from ._random import RandomState
from ._torch_private import custom_nodes
from .gradients import implicit, prepare_implicit
from .grads import Grads

__all__ = ["WithJacobian", "jacobian", "withjacobian"]


class WithJacobian(NamedTuple):
    """What :func:`withjacobian` returns: ``val``, what the function returned, and ``grad``."""

    val: Any
    grad: Any


class _Options(NamedTuple):
    """How the products of one call are computed."""

    mode: str
    chunk_size: int | None
    keep: bool
    progress: bool


def output_tensor(caller: str, y: Any) -> Tensor:
    """``y`` as a tensor; what is no array or number, or complex, is refused."""
    kind = kind_of(y)
    if kind == "number":
        y = number_to_tensor(y)
    elif kind != "array":
        raise ValueError(f"{caller}: expected f to return an array or a number, got {type_name(y)}")
    elif isinstance(y, np.ndarray):
        y = numpy_to_tensor(y)
    tensor: Tensor = y
    if tensor.dtype.is_complex:
        raise ValueError(
            f"{caller}: expected f to return real values, got {type_name(tensor)}; "
            "differentiate its real and imaginary parts"
        )
    return tensor


@_engine.entry_point
def _value_and_jacobian(
    caller: str,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | Sequence[int] | None,
    create_graph: bool | None,
    mode: str,
    chunk_size: int | None,
    progress: bool,
) -> tuple[Any, Any]:
    """The worker: value and Jacobians."""
    _plan.check_mode(mode, _plan.JACOBIAN_MODES)
    params = implicit(args)
    if params is None:
        prepared = prepare(args, argnums, arrays_only=True)
    else:
        prepared = prepare_implicit(caller, params, argnums)
    options = _Options(mode, _plan.check_chunk_size(chunk_size), _engine.keeps_graph(create_graph), progress)
    release = None if params is None or _engine.in_functorch() else _engine.held_flags(prepared.inputs)
    try:
        with _state.differentiation():
            value, matrices = dense_jacobian(caller, f, prepared, options)
    finally:
        if release is not None:
            release()
    if params is not None:
        return value, Grads(params, [_result(x, J) for x, J in zip(params, matrices, strict=True)])
    flat = [_result(x, J) for x, J in zip(prepared.inputs, matrices, strict=True)]
    return value, prepared.results(flat)


def _result(x: Tensor, matrix: Tensor) -> Tensor:
    return as_result(matrix, x.dim() == 0)


def dense_jacobian(
    caller: str, f: Callable[..., Any], prepared: Prepared, options: _Options
) -> tuple[Any, list[Tensor]]:
    """Value and one dense matrix per input."""
    random = None if _engine.compiling() else RandomState()
    position = _state.mark()
    keep_tape = options.keep
    lin = _engine.linearize(f, prepared, keep=keep_tape)
    if lin.y_spec is not None:
        raise ValueError(f"{caller}: expected f to return an array or a number, got {type_name(lin.y)}")
    y = output_tensor(caller, lin.y_leaves[0])
    rows = y.numel()
    columns = sum(x.numel() for x in prepared.inputs)
    complex_input = any(x.dtype.is_complex for x in prepared.inputs)
    if options.mode == "forward" and complex_input:
        raise ValueError(
            f"{caller}: mode 'forward' gives no Jacobian by a complex argument, because f is real-valued; "
            "use mode 'reverse' or 'auto'"
        )
    taped = _state.mark()
    chosen = _plan.choose_mode(options.mode, rows, columns, complex_input)
    if not lin.roots or rows == 0 or columns == 0:
        return lin.y, [Rows(rows, x, result_dtype(x, y), options.keep).matrix() for x in prepared.inputs]
    if chosen == "forward":
        try:
            hooked = _state.mark() > position
            matrices = _forward(f, prepared, lin, y, options, random, hooked)
            _state.forget_since(position)  # nothing is pulled back: what hooks wait for never comes
            return lin.y, matrices
        except Exception:
            if options.mode == "forward":
                raise
            _state.forget_since(taped)
    return lin.y, _by_rows(prepared, lin, y, options)


def _by_rows(prepared: Prepared, lin: Linearization, y: Tensor, options: _Options) -> list[Tensor]:
    """Reverse mode: a pullback for each element of ``y``, or for each row of a block of the batch axis."""
    rows = y.numel()
    size = _row_bytes(lin, rows)
    found = [_by_blocks(lin.restricted(0, i), x, y, size, options) for i, x in enumerate(lin.inputs)]
    if None not in found:
        return [J for J in found if J is not None]
    blocks = [Rows(rows, x, result_dtype(x, y), options.keep) for x in prepared.inputs]
    chunk = _chunk(rows, size, options, y.device)
    seeds = _products.identity_seeds(rows, y.dtype, y.device)
    for lo, hi, products in _products.vjps(
        lin, 0, seeds, rows, chunk, create_graph=options.keep, progress=options.progress
    ):
        for block, product in zip(blocks, products, strict=True):
            block.add(lo, hi, product)
    return [block.matrix() for block in blocks]


def _by_blocks(
    lin: Linearization, x: Tensor, y: Tensor, size: int, options: _Options, transposed: bool = False
) -> Tensor | None:
    """The Jacobian of ``lin``, block diagonal along a batch axis; ``None`` where it isn't known to be so."""
    layout = _separable.find_layout(lin.roots[0], lin.inputs[0], size)
    if layout is None:
        return None
    blocks = _separable.block_products(
        lin, layout, size, chunk_size=options.chunk_size, create_graph=options.keep, progress=options.progress
    )
    if blocks is None:
        return None
    return blocks.dense(lin.roots[0].numel(), lin.inputs[0].numel(), result_dtype(x, y), transposed)


def _row_bytes(lin: Linearization, rows: int) -> int:
    """Bytes that a row may need while it is pulled back; 0 where nobody will ask."""
    return 0 if rows <= 1 or _engine.compiling() else _products.row_bytes(lin)


def _chunk(rows: int, size: int, options: _Options, device: torch.device) -> int:
    if options.chunk_size is not None or rows <= 1 or _engine.compiling():
        return options.chunk_size or rows
    return _plan.choose_chunk(None, rows, size, device)


def _forward(
    f: Callable[..., Any],
    prepared: Prepared,
    lin: Linearization,
    y: Tensor,
    options: _Options,
    random: RandomState | None,
    hooked: bool,
) -> list[Tensor]:
    """Forward mode, by the tape where that is known to be right, else by dual numbers.

    On the tape, ``f`` need not run again: 0.23 ms where dual numbers take 0.59 (3 to 10000). Custom functions
    are left to dual numbers: a backward that is not differentiable by its cotangent would give silent zeros.
    """
    identical = not all(prepared.owned)
    if identical or not (hooked or _engine.compiling() or _engine.in_functorch() or custom_nodes(lin.roots)):
        try:
            return _by_columns_on_tape(prepared, lin, y, options)
        except Exception:
            if identical:
                raise
    return _by_columns(f, prepared, lin, y, options, random)


def _by_columns(
    f: Callable[..., Any],
    prepared: Prepared,
    lin: Linearization,
    y: Tensor,
    options: _Options,
    random: RandomState | None,
) -> list[Tensor]:
    """A pushforward for each element of the arguments, by dual numbers."""

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (_engine.call(f, prepared, inputs),)

    sources = prepared.inputs if options.keep else [x.detach() for x in prepared.inputs]
    inputs = [_engine.separate(x) for x in sources]
    after = None if random is None else RandomState()
    matrices = []
    try:
        with _engine.recording_if(options.keep):
            for i, x in enumerate(inputs):
                block = Columns(y.numel(), prepared.inputs[i], result_dtype(x, y), options.keep)
                if x.numel() > 0:
                    seeds = _products.identity_seeds(x.numel(), x.dtype, x.device)
                    chunk = _chunk(x.numel(), _row_bytes(lin, x.numel()), options, x.device)
                    for lo, hi, products in _products.jvps(
                        flat, inputs, i, seeds, x.numel(), chunk, random=random, progress=options.progress
                    ):
                        block.add(lo, hi, products if options.keep else products.detach())
                matrices.append(block.matrix())
    finally:
        if after is not None:
            after.restore()
    return matrices


def _by_columns_on_tape(prepared: Prepared, lin: Linearization, y: Tensor, options: _Options) -> list[Tensor]:
    """Columns without running ``f`` again.

    The pullback is linear in its cotangent ``u``; pulling a seed back through *it* pushes the seed forward.
    It is the only way for tensors that ``f`` finds by identity, which no dual number can replace.
    """
    if not all(prepared.owned) and (custom := custom_nodes(lin.roots)):
        names = ", ".join(node.name().removesuffix("Backward") for node in custom)
        raise RuntimeError(
            "mode 'forward' with Params differentiates the pullback by its cotangent, which is not known to "
            f"be right for custom autograd functions, found {names}; use mode 'reverse'"
        )
    u = torch.zeros_like(lin.roots[0]).requires_grad_()
    pulled = lin.pull([u], retain=True, create_graph=True)
    matrices = []
    for x, g in zip(prepared.inputs, pulled, strict=True):
        block = Columns(y.numel(), x, result_dtype(x, y), options.keep)
        if g is None or not g.requires_grad or x.numel() == 0:
            matrices.append(Rows(y.numel(), x, result_dtype(x, y), options.keep).matrix())
            continue
        linear = Linearization(prepared, [g], [u])
        size = _row_bytes(linear, x.numel())
        if (matrix := _by_blocks(linear, x, y, size, options, transposed=True)) is not None:
            matrices.append(matrix)
            continue
        seeds = _products.identity_seeds(x.numel(), x.dtype, x.device)
        chunk = _chunk(x.numel(), size, options, x.device)
        for lo, hi, products in _products.vjps(
            linear, 0, seeds, x.numel(), chunk, create_graph=options.keep, progress=options.progress
        ):
            (product,) = products
            block.add(
                lo,
                hi,
                torch.zeros((hi - lo, y.numel()), dtype=y.dtype, device=y.device)
                if product is None
                else product,
            )
        matrices.append(block.matrix())
    return matrices


def jacobian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> Any:
    """Jacobian matrices of ``f`` by each of its array and number arguments.

    Parameters
    ----------
    f : callable
        Returns an array or a number, real-valued. Called once in reverse mode, once plus its pushforwards in
        forward mode.
    *args
        Numbers and arrays are differentiated; anything else, structures and modules included, reaches ``f``
        untouched and gets ``None``. Or one :class:`Params`; then ``f`` takes no arguments.
    argnums : int or sequence of int, optional
        Differentiate these arguments only.
    mode : {"auto", "reverse", "forward"}
        A pullback for each element of ``y``, a pushforward for each element of the arguments, or the
        cheaper of the two.
    chunk_size : int, optional
        Rows (columns) at a time; by default as many as fit the memory budget
        (:func:`set_memory_budget`).
    create_graph : bool, optional
        As for :func:`gradient`.
    progress : bool
        Show a progress bar over the chunks.

    Returns
    -------
    tuple or Grads
        For an array ``a`` a matrix of shape ``(y.numel(), a.numel())`` with ``J[k, i] = dy[k]/da[i]``, both
        flattened row by row; for a number or 0-dim array a vector of shape ``(y.numel(),)``; ``None`` for
        anything else. The dtype is the promotion of the argument's and ``y``'s, the device the argument's.

    Raises
    ------
    ValueError
        ``f`` returns neither an array nor a number, or complex values; ``mode`` or ``chunk_size`` is none.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import jacobian
    >>> jacobian(lambda a: 100 * a[:3] ** 2, torch.arange(1., 8.))[0]
    tensor([[200.,   0.,   0.,   0.,   0.,   0.,   0.],
            [  0., 400.,   0.,   0.,   0.,   0.,   0.],
            [  0.,   0., 600.,   0.,   0.,   0.,   0.]])
    >>> jacobian(lambda a, x: a**2 * x, torch.tensor([1., 2., 3.]), 1)[1]
    tensor([1., 4., 9.])

    References
    ----------
    ``jacobian`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    return _value_and_jacobian("jacobian", f, args, argnums, create_graph, mode, chunk_size, progress)[1]


def withjacobian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> WithJacobian:
    """Value and Jacobian matrices; parameters and errors are those of :func:`jacobian`.

    Returns
    -------
    WithJacobian
        A named tuple ``(val, grad)``: what ``f`` returned, in its own shape, and what :func:`jacobian` gives.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import withjacobian
    >>> withjacobian(lambda x: x**2, torch.tensor([1., 2.]))
    WithJacobian(val=tensor([1., 4.]), grad=(tensor([[2., 0.],
            [0., 4.]]),))

    References
    ----------
    ``withjacobian`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    return WithJacobian(
        *_value_and_jacobian("withjacobian", f, args, argnums, create_graph, mode, chunk_size, progress)
    )
