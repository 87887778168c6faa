"""Hessians and their diagonals: the public functions and their worker.

A Hessian is the Jacobian of a gradient; the worker records the gradient once and pulls (or pushes) seeds
through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, overload

import torch
from torch import Tensor

from . import _compressed, _cost_model, _dense_hessians, _engine, _factored, _state, _stencil_sums
from ._call_arguments import prepare_call
from ._call_options import check_callable, check_flags
from ._dense_hessians import Whole
from ._flags import held
from ._pulling import Options
from ._random import RandomState
from ._real_arguments import prepare_one, refuse_complex
from ._second_order import run
from ._torch_private import in_functorch_compiled
from ._unfused import unfused, unfused_but_norms
from ._whole_hessian import whole_hessian
from .grads import Grads
from .params import Params

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


@_engine.entry_point
def _value_gradient_hessian(
    caller: str,
    f: Callable[..., Any],
    x: Any,
    mode: str,
    chunk_size: int | None,
    create_graph: bool | None,
    progress: bool,
    sparse: bool,
    verify: bool,
    alone: bool,
) -> Whole:
    """The worker: the Hessian by one argument, and value and gradient unless it is wanted ``alone``."""
    check_callable(caller, f)
    _cost_model.check_mode(mode, _cost_model.HESSIAN_MODES)
    check_flags(progress=progress, sparse=sparse, verify=verify)
    if sparse:
        _compressed.refuse_nested(caller)
    options = Options(_cost_model.check_chunk_size(chunk_size), _engine.keeps_graph(create_graph), progress)
    prepared = prepare_one(caller, x)
    if options.keep:
        prepared.copy_arrays()
    if mode == "forward_over_reverse" and _engine.compiling() and in_functorch_compiled():
        mode = "reverse_over_reverse"  # PyTorch's compiled derivatives of that one fail, or crash (2.13)
    with _state.differentiation(), unfused() if options.keep else unfused_but_norms():
        random = None if _engine.compiling() else RandomState()
        whole = None
        if mode == "forward_over_reverse" and not sparse:
            whole = _dense_hessians.pushed(caller, f, prepared, options, random)
        if whole is None:
            whole = whole_hessian(caller, f, prepared, mode, options, random, sparse, verify, alone)
    by = prepared.inputs[0]
    value, grad, matrix = whole
    if alone:
        grad = None
    elif grad is None:
        grad = torch.zeros_like(by)
    elif not (grad.is_contiguous() or _engine.compiling() or _engine.in_transform()):
        grad = grad.contiguous()  # not expanded: the caller may write into it
    return Whole(value, grad, matrix.reshape(()) if by.dim() == 0 else matrix)


def hessian(
    f: Callable[..., Any],
    x: Any,
    *,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
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
    sparse : bool
        Give a ``torch.sparse_csr`` matrix, with an entry wherever the structure allows a nonzero, and
        computed with one product for each color of a star coloring of it. Without it, that is done where it
        is estimated to be cheaper, and the result is dense.
    verify : bool
        Check a result that took fewer products than the dense way against one product with a random vector.
        A mismatch gives the dense way's answer and a warning. (Sums over a grid are compared so the first
        time for functions that look the same, and with the gradient in each call.)

    Returns
    -------
    torch.Tensor
        Shape ``(x.numel(), x.numel())``, ``x`` flattened row by row; 0-dim for a number or 0-dim array. Dtype
        and device are those of ``x``, an integer's the default dtype.

    Raises
    ------
    ValueError
        ``x`` is complex, or ``f(x)`` is complex or no scalar; ``mode`` is none of the words above;
        ``chunk_size`` is below 1.
    TypeError
        ``f`` is no function; ``x`` is a structure, a module or opaque; ``chunk_size`` is no int;
        ``create_graph``, ``progress``, ``sparse`` or ``verify`` is neither ``True`` nor ``False``.
    RuntimeError
        ``sparse=True`` inside a ``torch.func`` transform or ``torch.compile``.

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
    options = (mode, chunk_size, create_graph, progress, sparse, verify)
    return _value_gradient_hessian("hessian", f, x, *options, True).matrix


def hessian_dual(
    f: Callable[..., Any],
    x: Any,
    *,
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
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
    options = (mode, chunk_size, create_graph, progress, sparse, verify)
    return _value_gradient_hessian("hessian_dual", f, x, *options, True).matrix


def hessian_reverse(
    f: Callable[..., Any],
    x: Any,
    *,
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
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
    options = (mode, chunk_size, create_graph, progress, sparse, verify)
    return _value_gradient_hessian("hessian_reverse", f, x, *options, True).matrix


def withhessian(
    f: Callable[..., Any],
    x: Any,
    *,
    mode: str = "auto",
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
    sparse: bool = False,
    verify: bool = True,
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
    options = (mode, chunk_size, create_graph, progress, sparse, verify)
    found = _value_gradient_hessian("withhessian", f, x, *options, False)
    assert found.gradient is not None
    return WithHessian(found.value, found.gradient, found.matrix)


# The first is for what a lambda without annotations has as its argument, which fits every type.
@overload
def diaghessian(
    f: Callable[..., Any],
    x: NoReturn,
    /,
    *,
    argnums: Any = None,
    chunk_size: Any = None,
    create_graph: Any = None,
    progress: bool = False,
) -> Any: ...
@overload
def diaghessian(
    f: Callable[..., Any],
    params: Params,
    /,
    *,
    argnums: None = None,
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> Grads: ...
@overload
def diaghessian(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    chunk_size: int | None = None,
    create_graph: bool | None = None,
    progress: bool = False,
) -> tuple[Any, ...]: ...
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
        An argument is complex, or ``f`` returns a complex value or no scalar; ``chunk_size`` is below 1;
        ``argnums`` are out of range or repeated.
    TypeError
        ``f`` is no function; ``chunk_size`` or ``argnums`` are no ints; ``create_graph`` or ``progress`` is
        neither ``True`` nor ``False``; ``argnums`` come with :class:`Params`, or ``Params`` among others.

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
    check_callable(caller, f)
    chunk_size = _cost_model.check_chunk_size(chunk_size)
    params, prepared, keep = prepare_call(caller, args, argnums, create_graph, arrays_only=True)
    refuse_complex(caller, prepared)
    check_flags(progress=progress)
    options = Options(chunk_size, keep, progress)
    with held(params), _state.differentiation(), unfused() if keep else unfused_but_norms():
        random = None if _engine.compiling() else RandomState()
        second = run(caller, f, prepared, options.keep, random=random)
        diagonals = _dense_hessians.diagonals_by_curvature(second, options)
        if diagonals is None:
            diagonals = _stencil_sums.diagonal(second, options)
        if diagonals is None:
            second.differentiate()
            found = _dense_hessians.diagonals_along_batch(second, options)
            _factored.add_diagonals(second, options, found)
            _compressed.add_diagonals(caller, f, second, options, random, found)
            diagonals = [
                _dense_hessians.diagonal(second, i, options) if h is None else h for i, h in enumerate(found)
            ]
    return prepared.results(diagonals) if params is None else Grads(params, diagonals)
