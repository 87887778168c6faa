"""Jacobians: the public functions and the worker that gives value and matrices.

Decides with ``_cost_model``, multiplies with ``_products``, puts together with ``_assembly``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, overload

import torch
from torch import Tensor

from . import _compressed, _cost_model, _engine, _layer_rows, _state, _stencil_sums
from ._arguments import Prepared
from ._assembly import Rows, as_result, result_dtype
from ._call_arguments import prepare_call
from ._call_options import check_callable, check_flags
from ._cotangents import own
from ._crosscheck import Probe, is_confirmed, is_plainly_confirmed, refuse_unpushable, warn_disagreement
from ._dense_jacobians import are_finite, by_rows, forward, traced_columns
from ._first_order import FirstOrder, must_be_pulled, record
from ._flags import held
from ._numbers import show_numbers
from ._other_ways import another_may_do
from ._pulling import Options, chunk_for
from ._row_cost import is_plain, row_cost
from .grads import Grads
from .params import Params

__all__ = ["WithJacobian", "jacobian", "withjacobian"]


class WithJacobian(NamedTuple):
    """What :func:`withjacobian` returns: ``val``, what the function returned, and ``grad``."""

    val: Any
    grad: Any


class _JacobianOptions(NamedTuple):
    """What one call asks for."""

    mode: str
    products: Options
    sparse: bool = False
    verify: bool = True


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
    sparse: bool,
    verify: bool,
) -> tuple[Any, Any]:
    """The worker: value and Jacobians."""
    check_callable(caller, f)
    _cost_model.check_mode(mode, _cost_model.JACOBIAN_MODES)
    check_flags(progress=progress, sparse=sparse, verify=verify)
    if sparse:
        _compressed.refuse_nested(caller)
    params, prepared, keep = prepare_call(caller, args, argnums, create_graph, arrays_only=True)
    products = Options(_cost_model.check_chunk_size(chunk_size), keep, progress)
    options = _JacobianOptions(mode, products, sparse, verify)
    with held(params), _state.differentiation():
        value, matrices = matrices_of(caller, f, prepared, options)
    if not (_engine.compiling() or _engine.in_transform()):
        own(matrices)
    if params is not None:
        return value, Grads(params, [_result(x, J) for x, J in zip(params, matrices, strict=True)])
    flat = [_result(x, J) for x, J in zip(prepared.inputs, matrices, strict=True)]
    return value, prepared.results(flat)


def _result(x: Tensor, matrix: Tensor) -> Tensor:
    if x.dim() == 0 and matrix.layout == torch.sparse_csr:
        matrix = matrix.to_dense()
    return as_result(matrix, x.dim() == 0)


def matrices_of(
    caller: str, f: Callable[..., Any], prepared: Prepared, options: _JacobianOptions
) -> tuple[Any, list[Tensor]]:
    """Value and one matrix per input, dense or sparse as ``options`` say."""
    first = record(caller, f, prepared, options.products.keep, options.mode == "forward")
    value, y = first.lin.y, first.y
    rows, columns = y.numel(), sum(x.numel() for x in prepared.inputs)
    complex_input = any(x.dtype.is_complex for x in prepared.inputs)
    if options.mode == "forward" and complex_input:
        raise ValueError(
            f"{caller}: mode 'forward' gives no Jacobian by a complex argument, because f is real-valued; "
            "use mode 'reverse' or 'auto'"
        )
    if not first.lin.roots or rows == 0 or columns == 0:
        zeros = [Rows(rows, x, result_dtype(x, y), options.products.keep).matrix() for x in prepared.inputs]
        return value, [_compressed.no_entries(J) for J in zeros] if options.sparse else zeros
    if options.mode == "auto" and not (options.sparse or _engine.compiling() or _engine.in_transform()):
        matrix = _stencil_sums.jacobian(first, options.products, verify=options.verify)
        if matrix is not None:
            return value, [matrix]
    cost = _cost_model.FREE if rows == 1 or _engine.compiling() else row_cost(first.lin)
    mode = _mode_for(first, options)
    known = None
    if mode != "forward" and not options.sparse:
        dense = rows if mode == "reverse" else min(rows, columns)
        known = _layer_rows.jacobians(first, cost, options.products, dense, options.verify)
        if None not in known:
            return value, [J for J in known if J is not None]
    found = _compressed.jacobian(
        first, cost, mode, options.products, sparse=options.sparse, verify=options.verify
    )
    if found is not None:
        if found.forward:
            # nothing is pulled back: what hooks wait for never comes
            _state.forget_since(first.position, but_inner=True)
        return value, found.matrices
    if _cost_model.choose_mode(mode, rows, columns, complex_input) == "forward":
        if _engine.compiling():
            return traced_columns(first, options.products.keep)
        matrices = _tall(first, cost, mode, options, known)
    else:
        matrices = by_rows(first, cost, options.products, known)
    return value, [_compressed.full_csr(J) for J in matrices] if options.sparse else matrices


def _tall(
    first: FirstOrder,
    cost: _cost_model.RowCost,
    mode: str,
    options: _JacobianOptions,
    known: list[Tensor | None] | None,
) -> list[Tensor]:
    """Dense matrices with far more rows than columns."""
    matrices = None
    if mode == "auto" and _pulled_at_once(first, cost, options):
        matrices = by_rows(first, cost, options.products, known)
        if are_finite(matrices):
            return matrices
        # reverse mode spoils whole columns where a row isn't finite
    return _forward(first, options) or matrices or by_rows(first, cost, options.products, known)


def _pulled_at_once(first: FirstOrder, cost: _cost_model.RowCost, options: _JacobianOptions) -> bool:
    """Whether one batched pullback is cheaper than columns are, as in a long graph of few numbers."""
    lin, rows = first.lin, first.y.numel()
    return (
        _cost_model.costs_calls_alone(rows, cost)
        and chunk_for(options.products, rows, cost, first.y.device) >= rows
        and not (cost.misbatched or cost.looped)
        and is_plain(lin)
        and not lin.survey().nonlinear
        and show_numbers([first.y])
    )


def _mode_for(first: FirstOrder, options: _JacobianOptions) -> str:
    """The mode asked for; ``"auto"`` is reverse where forward mode would leave something out."""
    mode = options.mode
    if mode == "reverse" or _engine.compiling():
        return mode
    if mode == "forward":
        refuse_unpushable(first.caller, first.lin)
        return mode
    if first.y.numel() <= 1:
        return mode
    return "reverse" if must_be_pulled(first) else mode


def _forward(first: FirstOrder, options: _JacobianOptions) -> list[Tensor] | None:
    """By columns; ``None`` where reverse mode is to be taken."""
    taped = _state.mark()
    # Hooks are for reverse mode: a pullback would tell something else, and they would see it.
    numbers = show_numbers([first.y])
    verify, confirmed = options.verify and numbers and not first.hooked, False

    def sound(matrices: Sequence[Tensor], probe: Probe | None) -> bool:
        nonlocal confirmed
        confirmed = verify and is_plainly_confirmed(first.lin, first.y, matrices, probe)
        return confirmed or not numbers or are_finite(matrices)

    try:
        matrices = forward(first, options.products, verify, sound)
    except Exception as error:
        if options.mode == "forward" or not another_may_do(error):
            raise
        _state.forget_since(taped)
        return None
    if verify and not (confirmed or is_confirmed(first.lin, first.y, matrices)):
        _state.forget_since(taped)
        warn_disagreement(first.caller)
        return None
    _state.forget_since(first.position, but_inner=True)
    return matrices


# The first is for what a lambda without annotations has as its argument, which fits every type.
@overload
def jacobian(
    f: Callable[..., Any],
    x: NoReturn,
    /,
    *,
    argnums: Any = None,
    mode: str = "auto",
    chunk_size: Any = None,
    create_graph: Any = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
) -> Any: ...
@overload
def jacobian(
    f: Callable[..., Any],
    params: Params,
    /,
    *,
    argnums: None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
) -> Grads: ...
@overload
def jacobian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
) -> tuple[Any, ...]: ...
def jacobian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
) -> Any:
    """Jacobian matrices of ``f`` by each of its array and number arguments.

    Parameters
    ----------
    f : callable
        Returns an array or a number, real-valued. Called once; in forward mode once more for each chunk of
        columns where the recorded pullback can't stand in for dual numbers (as for custom functions).
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
    sparse : bool
        Give ``torch.sparse_csr`` matrices, with an entry wherever the structure allows a nonzero, and
        computed with one product for each color of a coloring of it. Without it, that is done where it is
        estimated to be cheaper, and the result is dense.
    verify : bool
        Check a result that took fewer products than the dense way (by colors, blocks or layers), or forward
        mode, against one product with a random vector. A mismatch gives another way's answer and a warning.

    Returns
    -------
    tuple or Grads
        For an array ``a`` a matrix of shape ``(y.numel(), a.numel())`` with ``J[k, i] = dy[k]/da[i]``, both
        flattened row by row; for a number or 0-dim array a vector of shape ``(y.numel(),)``; ``None`` for
        anything else. The dtype is the promotion of the argument's and ``y``'s, the device the argument's.

    Raises
    ------
    ValueError
        ``f`` returns neither an array nor a number, or complex values; ``mode`` is none of the words above,
        or ``"forward"`` for a complex argument; ``chunk_size`` is below 1; ``argnums`` are out of range or
        repeated.
    TypeError
        ``f`` is no function; ``chunk_size`` or ``argnums`` are no ints; ``create_graph``, ``progress``,
        ``sparse`` or ``verify`` is neither ``True`` nor ``False``; ``argnums`` come with :class:`Params`, or
        ``Params`` among others.
    RuntimeError
        ``sparse=True`` inside a ``torch.func`` transform or ``torch.compile``.

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
    >>> jacobian(lambda a: a[1:] - a[:-1], torch.zeros(1001), sparse=True)[0].values().numel()
    2000

    References
    ----------
    ``jacobian`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    options = (argnums, create_graph, mode, chunk_size, progress, sparse, verify)
    return _value_and_jacobian("jacobian", f, args, *options)[1]


def withjacobian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
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
    options = (argnums, create_graph, mode, chunk_size, progress, sparse, verify)
    return WithJacobian(*_value_and_jacobian("withjacobian", f, args, *options))
