"""Hessians and their diagonals: the public functions and their worker.

A Hessian is the Jacobian of a gradient; the worker records the gradient once and pulls (or pushes) seeds
through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _engine, _plan, _products, _separable, _state
from ._arguments import ARRAY, NUMBER, Prepared, kind_of, prepare, type_name
from ._assembly import Columns, Rows
from ._attention import unfused_attention
from ._engine import Linearization
from ._random import RandomState
from ._second_order import Options, SecondOrder, run
from .gradients import implicit, prepare_implicit
from .grads import Grads

__all__ = [
    "WithHessian",
    "diaghessian",
    "hessian",
    "hessian_dual",
    "hessian_reverse",
    "withhessian",
]


class WithHessian(NamedTuple):
    """What :func:`withhessian` returns: ``val``, ``grad`` (a tensor) and ``hess``."""

    val: Any
    grad: Tensor
    hess: Tensor


def _prepare_one(caller: str, x: Any) -> Prepared:
    kind = kind_of(x)
    if kind is not ARRAY and kind is not NUMBER:
        raise TypeError(
            f"{caller}: expected x to be a number or an array, got {kind} x of type {type_name(x)}; "
            "for several arguments or a module, write f as a function of one flat tensor"
        )
    prepared = prepare((x,), arrays_only=True)
    _refuse_complex(caller, prepared)
    return prepared


def _refuse_complex(caller: str, prepared: Prepared) -> None:
    for x in prepared.inputs:
        if x.dtype.is_complex:
            raise ValueError(
                f"{caller}: expected real arguments, got {type_name(x)}; "
                "write f as a function of the real and imaginary parts (torch.view_as_real)"
            )


@_engine.entry_point
def _value_gradient_hessian(
    caller: str,
    f: Callable[..., Any],
    x: Any,
    mode: str,
    chunk_size: int | None,
    create_graph: bool | None,
    progress: bool,
) -> tuple[Any, Tensor, Tensor]:
    """The worker: value, gradient and Hessian by one argument."""
    _plan.check_mode(mode, _plan.HESSIAN_MODES)
    options = Options(_plan.check_chunk_size(chunk_size), _engine.keeps_graph(create_graph), progress)
    prepared = _prepare_one(caller, x)
    with _state.differentiation(), unfused_attention():
        random = None if _engine.compiling() else RandomState()
        second = run(caller, f, prepared, options.keep, recorded=mode != "forward_over_reverse")
        matrix = _hessian_matrix(f, second, mode, options, random)
    by = prepared.inputs[0]
    grad = second.grads[0]
    if grad is None:
        grad = torch.zeros_like(by)
    return second.value, grad, matrix.reshape(()) if by.dim() == 0 else matrix


def _hessian_matrix(
    f: Callable[..., Any], second: SecondOrder, mode: str, options: Options, random: RandomState | None
) -> Tensor:
    if second.is_constant:
        return _zeros(second, options)
    if mode == "forward_over_reverse":
        second.take_gradient()
        return _by_columns(f, second, options, random)
    failed: Exception | None = None
    try:
        second.differentiate()
        lin = second.by_input(0)
        if lin is None:  # linear: the gradient depends on nothing
            return _zeros(second, options)
        size = 0 if _engine.compiling() else second.row_bytes()
        if mode == "reverse_over_reverse" or not _plan.exceeds_budget(size, lin.inputs[0].device):
            return _by_rows(second, lin, options, size)
    except Exception as error:  # an operation without a second backward may have a forward derivative
        if mode == "reverse_over_reverse":
            raise
        failed = error
        second.take_gradient()
    try:
        return _by_columns(f, second, options, random)
    except Exception:
        if failed is not None:
            raise failed from None
        raise


def _zeros(second: SecondOrder, options: Options) -> Tensor:
    x = second.prepared.inputs[0]
    return Rows(x.numel(), x, x.dtype, options.keep).matrix()


def _chunk(rows: int, options: Options, size: int, device: torch.device) -> int:
    if options.chunk_size is not None or rows <= 1 or _engine.compiling():
        return options.chunk_size or max(rows, 1)
    return _plan.choose_chunk(None, rows, size, device)


def _by_rows(second: SecondOrder, lin: Linearization, options: Options, size: int) -> Tensor:
    """Reverse over reverse: the recorded gradient is pulled back."""
    x = second.prepared.inputs[0]
    n = x.numel()
    blocks = _blocks(lin, options, size)
    if blocks is not None:
        return blocks.dense(n, n, x.dtype)
    block = Rows(n, x, x.dtype, options.keep)
    seeds = _products.identity_seeds(n, lin.roots[0].dtype, x.device)
    chunk = _chunk(n, options, size, x.device)
    for lo, hi, (product,) in _products.vjps(
        lin, 0, seeds, n, chunk, create_graph=options.keep, progress=options.progress
    ):
        block.add(lo, hi, product)
    return block.matrix()


def _blocks(lin: Linearization, options: Options, size: int) -> _separable.Blocks | None:
    """The Hessian as blocks along a batch axis; ``None`` where it isn't known to be so."""
    layout = _separable.find_layout(lin.roots[0], lin.inputs[0], size, same_axes=True)
    if layout is None:
        return None
    return _separable.block_products(
        lin,
        layout,
        size,
        chunk_size=options.chunk_size,
        create_graph=options.keep,
        progress=options.progress,
    )


def _by_columns(
    f: Callable[..., Any], second: SecondOrder, options: Options, random: RandomState | None
) -> Tensor:
    """Forward over reverse: the gradient is pushed forward, and recorded anew in every chunk."""
    prepared = second.prepared
    x = prepared.inputs[0]
    n = x.numel()
    source = _engine.separate(x if options.keep else x.detach())

    def gradient_of(primal: Tensor) -> tuple[Tensor]:
        inner = run(second.caller, f, prepared.at([primal]), True, recorded=False)
        inner.take_gradient()
        (grad,) = inner.grads
        return (torch.zeros_like(primal) if grad is None else grad,)

    block = Columns(n, x, x.dtype, options.keep)
    after = None if random is None else RandomState()
    size = 0 if _engine.compiling() else second.row_bytes()
    chunk = _chunk(n, options, size, x.device)
    seeds = _products.identity_seeds(n, x.dtype, x.device)
    try:
        for lo, hi, products in _products.jvps(
            gradient_of, [source], 0, seeds, n, chunk, random=random, progress=options.progress
        ):
            block.add(lo, hi, products if options.keep else products.detach())
    finally:
        if after is not None:
            after.restore()
    return block.matrix()


def hessian(
    f: Callable[..., Any],
    x: Any,
    *,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> Tensor:
    """Hessian matrix of a scalar function of one number or array.

    Parameters
    ----------
    f : callable
        ``f(x)`` is a real scalar (a number or a 0-dim tensor).
    x : number or array
        A real one, of any shape.
    mode : {"auto", "forward_over_reverse", "reverse_over_reverse"}
        How the gradient is differentiated: the cheaper way by default, and the other one where an operation
        lacks a derivative that the first needs.
    chunk_size : int, optional
        Rows at a time; by default as many as fit the memory budget (:func:`set_memory_budget`).
    create_graph : bool, optional
        As for :func:`gradient`.
    progress : bool
        Show a progress bar over the chunks.

    Returns
    -------
    torch.Tensor
        Shape ``(x.numel(), x.numel())``, ``x`` flattened row by row; 0-dim for a number or 0-dim array.

    Raises
    ------
    ValueError
        ``x`` is complex, or ``f(x)`` is complex or no scalar.
    TypeError
        ``x`` is a structure, a module or opaque.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import hessian
    >>> hessian(lambda x: x[0] * x[1], torch.randn(2))
    tensor([[0., 1.],
            [1., 0.]])
    >>> hessian(torch.sin, torch.pi / 2)
    tensor(-1.)

    References
    ----------
    ``hessian`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    return _value_gradient_hessian("hessian", f, x, mode, chunk_size, create_graph, progress)[2]


def hessian_dual(
    f: Callable[..., Any],
    x: Any,
    *,
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> Tensor:
    """:func:`hessian` by forward over reverse: dual numbers pushed through the gradient.

    Parameters, result and errors are those of :func:`hessian`, which takes this way by
    ``mode="forward_over_reverse"``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import hessian_dual
    >>> hessian_dual(lambda x: (x**3).sum(), torch.tensor([1., 2.]))
    tensor([[ 6.,  0.],
            [ 0., 12.]])

    References
    ----------
    ``hessian_dual`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    mode = "forward_over_reverse"
    return _value_gradient_hessian("hessian_dual", f, x, mode, chunk_size, create_graph, progress)[2]


def hessian_reverse(
    f: Callable[..., Any],
    x: Any,
    *,
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> Tensor:
    """:func:`hessian` by reverse over reverse: the recorded gradient is pulled back.

    Parameters, result and errors are those of :func:`hessian`, which takes this way by
    ``mode="reverse_over_reverse"``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import hessian_reverse
    >>> hessian_reverse(lambda x: (x**3).sum(), torch.tensor([1., 2.]))
    tensor([[ 6.,  0.],
            [ 0., 12.]])

    References
    ----------
    ``hessian_reverse`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    mode = "reverse_over_reverse"
    return _value_gradient_hessian("hessian_reverse", f, x, mode, chunk_size, create_graph, progress)[2]


def withhessian(
    f: Callable[..., Any],
    x: Any,
    *,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> WithHessian:
    """Value, gradient and Hessian, with nothing computed twice.

    Parameters and errors are those of :func:`hessian`.

    Returns
    -------
    WithHessian
        A named tuple ``(val, grad, hess)``: what ``f`` returned, a tensor of the shape of ``x``, and what
        :func:`hessian` gives.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import withhessian
    >>> withhessian(lambda x: (x**2).sum(), torch.tensor([1., 3.]))
    WithHessian(val=tensor(10.), grad=tensor([2., 6.]), hess=tensor([[2., 0.],
            [0., 2.]]))
    """
    return WithHessian(
        *_value_gradient_hessian("withhessian", f, x, mode, chunk_size, create_graph, progress)
    )


def diaghessian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> Any:
    """Diagonal of the Hessian by each argument; exact, never an estimate.

    Parameters
    ----------
    f : callable
        ``f(*args)`` is a real scalar.
    *args
        Real numbers and arrays are differentiated, anything else gets ``None``. Or one :class:`Params`; then
        ``f`` takes no arguments.
    argnums, chunk_size, create_graph, progress
        As for :func:`jacobian`. Never more than a chunk of products is in memory.

    Returns
    -------
    tuple or Grads
        For each argument a tensor of its shape, ``h[i] = d2y/dx[i]2`` (zeros where ``f`` is linear or
        constant); ``None`` for what is no number or array.

    Raises
    ------
    ValueError
        An argument is complex, or ``f`` returns a complex value or no scalar.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import diaghessian
    >>> diaghessian(torch.atan2, 1, 2)
    (tensor(-0.1600), tensor(0.1600))
    >>> diaghessian(lambda x: (x**3).sum(), torch.tensor([1., 2.]))
    (tensor([ 6., 12.]),)

    References
    ----------
    ``diaghessian`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    return _diagonals("diaghessian", f, args, argnums, chunk_size, create_graph, progress)


@_engine.entry_point
def _diagonals(
    caller: str,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | Sequence[int] | None,
    chunk_size: int | None,
    create_graph: bool | None,
    progress: bool,
) -> Any:
    """The worker: diagonals by each argument."""
    options = Options(_plan.check_chunk_size(chunk_size), _engine.keeps_graph(create_graph), progress)
    params = implicit(args)
    if params is None:
        prepared = prepare(args, argnums, arrays_only=True)
    else:
        prepared = prepare_implicit(caller, params, argnums)
    _refuse_complex(caller, prepared)
    release = None if params is None or _engine.in_functorch() else _engine.held_flags(prepared.inputs)
    try:
        with _state.differentiation(), unfused_attention():
            second = run(caller, f, prepared, options.keep)
            second.differentiate()
            diagonals = [_diagonal(second, i, options) for i in range(len(prepared.inputs))]
    finally:
        if release is not None:
            release()
    return prepared.results(diagonals) if params is None else Grads(params, diagonals)


def _diagonal(second: SecondOrder, i: int, options: Options) -> Tensor:
    """The diagonal by input ``i``, gathered from each chunk of Hessian rows."""
    x = second.prepared.inputs[i]
    lin = second.by_input(i)
    n = x.numel()
    if lin is None or n == 0:
        return torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    size = 0 if _engine.compiling() else second.row_bytes()
    blocks = _blocks(lin, options, size)
    if blocks is not None:
        return blocks.diagonal().to(x.dtype)
    parts = []
    chunk = _chunk(n, options, size, x.device)
    seeds = _products.identity_seeds(n, lin.roots[0].dtype, x.device)
    for lo, hi, (product,) in _products.vjps(
        lin, 0, seeds, n, chunk, create_graph=options.keep, progress=options.progress
    ):
        if product is None:
            parts.append(torch.zeros(hi - lo, dtype=x.dtype, device=x.device))
        else:
            diagonal = product.reshape(hi - lo, n).diagonal(lo)
            parts.append(diagonal if hi - lo == n else diagonal.clone())  # a view would keep the chunk alive
    return torch.cat(parts).reshape(x.shape)
