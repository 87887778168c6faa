"""Structure to look at, and plans: found and colored once, evaluated for new values as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, overload

from torch import Tensor

from . import _cost_model, _engine, _state
from ._arguments import Prepared, kind_of, type_name
from ._call_arguments import is_implicit, prepared_by
from ._call_options import check_callable
from ._crosscheck import unpushable, warn_disagreement
from ._flags import held
from ._outputs import output_tensor, real_scalar
from ._plans.hessian import HessianPlan
from ._plans.jacobian import JacobianPlan, by_mode
from ._plans.signature import numbers_beside_arrays, specs_of
from ._random import OneRun
from ._real_arguments import prepare_one
from ._torch_private import survey
from .coloring.recovery import symmetric_recovery, symmetrized
from .grads import Grads
from .params import Params
from .sparsity.detect import DEFAULT_BUDGET, hessian_patterns, jacobian_patterns, refuse_transforms
from .sparsity.pattern import Pattern
from .sparsity.varying import varying_of

__all__ = ["HessianPlan", "JacobianPlan", "jacobian_sparsity", "plan_hessian", "plan_jacobian"]


# The first is for what a lambda without annotations has as its argument, which fits every type.
@overload
def jacobian_sparsity(
    f: Callable[..., Any], x: NoReturn, /, *, argnums: int | Sequence[int] | None = None
) -> Any: ...
@overload
def jacobian_sparsity(
    f: Callable[..., Any], params: Params, /, *, argnums: int | Sequence[int] | None = None
) -> Grads: ...
@overload
def jacobian_sparsity(
    f: Callable[..., Any], *args: Any, argnums: int | Sequence[int] | None = None
) -> tuple[Tensor | None, ...]: ...
def jacobian_sparsity(f: Callable[..., Any], *args: Any, argnums: int | Sequence[int] | None = None) -> Any:
    """Structure of the Jacobian: which entries can be nonzero.

    Parameters
    ----------
    f : callable
        ``f(*args)`` is an array or a number. It is run once.
    *args
        As for :func:`jacobian`: numbers and arrays, anything else reaches ``f`` untouched. Or one
        :class:`Params`; then ``f`` takes no arguments.
    argnums : int or sequence of int, optional
        The structure by these arguments only, ``None`` for the others; negative numbers count from the end.

    Returns
    -------
    tuple or Grads
        For each number or array ``a`` a ``torch.sparse_csr`` tensor of dtype bool and shape
        ``(y.numel(), a.numel())``, ``None`` for anything else. An entry that isn't listed is zero; one that
        is may turn out zero. Its attribute ``is_local`` says whether the structure is that of these arguments
        alone (``f`` sorts, takes a maximum, or branches on values): at other ones it may differ then. For
        :class:`Params` a :class:`Grads` of such tensors, one per member.

    Raises
    ------
    ValueError
        ``f`` returns neither an array nor a number, or ``argnums`` are out of range or repeated.
    TypeError
        ``f`` is no function, or ``argnums`` are no ints.
    RuntimeError
        Inside a ``torch.func`` transform or ``torch.compile``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import Params, jacobian_sparsity
    >>> pattern = jacobian_sparsity(lambda x: x[1:] * x[:-1], torch.rand(4))[0]
    >>> pattern.to_dense().int()
    tensor([[1, 1, 0, 0],
            [0, 1, 1, 0],
            [0, 0, 1, 1]], dtype=torch.int32)
    >>> pattern.is_local
    False
    >>> w, b = torch.rand(3), torch.rand(1)
    >>> jacobian_sparsity(lambda: w[1:] * b, Params([w, b]))[w].to_dense().int()
    tensor([[0, 1, 0],
            [0, 0, 1]], dtype=torch.int32)

    References
    ----------
    Gebremedhin, Manne and Pothen, "What color is your Jacobian?", SIAM Review 47 (2005).
    """
    caller = "jacobian_sparsity"
    check_callable(caller, f)
    refuse_transforms(caller)
    params, prepared = prepared_by(caller, args, argnums, arrays_only=True)
    y, patterns, _ = _detected(f, params, prepared)
    if kind_of(y) not in ("array", "number"):
        raise ValueError(f"{caller}: expected f to return an array or a number, got {type_name(y)}")
    found = [p.to_csr(x.device) for p, x in zip(patterns, prepared.inputs, strict=True)]
    return prepared.results(found) if params is None else Grads(params, found)


def _detected(
    f: Callable[..., Any], params: Params | None, prepared: Prepared
) -> tuple[Any, list[Pattern], bool]:
    """What ``f`` returns, the pattern of its Jacobian by each input, and whether ``f`` has hooks."""
    hooked = False

    def watched(*xs: Tensor) -> Any:
        nonlocal hooked
        position = _state.mark()
        y = _engine.call(f, prepared, xs)
        hooked = _state.mark() > position
        return y

    flat = OneRun(watched)
    with _engine.finding(), held(params):
        y, patterns = jacobian_patterns(
            flat, prepared.inputs, prepared.owned, DEFAULT_BUDGET, varying_of(prepared)
        )
    flat.settle()
    return y, patterns, hooked


@_engine.entry_point
def plan_jacobian(
    f: Callable[..., Any],
    *example_args: Any,
    argnums: int | Sequence[int] | None = None,
    mode: str = "auto",
    sparsity: Any = None,
    chunk_size: int | None = None,
    verify: bool = True,
) -> JacobianPlan:
    """Structure of a Jacobian, found and colored once, for evaluations at many points.

    Parameters
    ----------
    f : callable
        As for :func:`jacobian`. Run once, unless ``sparsity`` is given.
    *example_args
        Arguments of the shapes, kinds of dtype and devices that the plan will be called with. Or one
        :class:`Params`; then ``f`` takes no arguments, and the plan is called with these ``Params`` again
        when their values have changed. Arrays are on one device; numbers, and what a plan gives by them, go
        to it.
    argnums : int or sequence of int, optional
        Differentiate these arguments only. The structure doesn't depend on the values of other tensors and
        arrays, unless ``.patterns[0].is_local`` says so; what becomes of a Python number can't be followed.
    mode : {"auto", "reverse", "forward"}
        Color rows or columns, or whichever takes fewer products. With ``"auto"``, a plan that colors columns
        goes over to rows where forward mode turns out not to be had.
    sparsity : optional
        The structure where you know it: a tensor (dense or sparse), an array or a SciPy matrix whose nonzero
        entries are listed; a sequence of them for several arguments.
    chunk_size : int, optional
        Products at a time.
    verify : bool
        Check each evaluation against one product with a random vector; where it fails, the plan gives the
        dense way's answer and a warning. Where ``sparsity`` isn't given, forward mode is compared with a
        pullback once, here; ``f`` runs a second time for it.

    Returns
    -------
    JacobianPlan
        Call it with new arguments: a tuple of matrices, :class:`Grads` for :class:`Params`.

    Raises
    ------
    ValueError
        ``f`` returns neither an array nor a number, or complex values; there is nothing to differentiate by,
        or it lies on several devices; ``mode`` is none of the words above, or ``"forward"`` for a complex
        argument; ``sparsity`` has another shape; ``chunk_size`` is below 1; ``argnums`` are out of range or
        repeated.
    TypeError
        ``f`` is no function, ``sparsity`` no matrix, ``verify`` neither ``True`` nor ``False``, or
        ``chunk_size`` or ``argnums`` no ints.
    RuntimeError
        Inside a ``torch.func`` transform or ``torch.compile``, or for arguments on the meta device.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import plan_jacobian
    >>> plan = plan_jacobian(lambda x: x[1:] * x[:-1], torch.rand(1000))
    >>> plan.ncolors
    2
    >>> J = plan(torch.ones(1000))[0]
    >>> J.values().sum()
    tensor(1998.)

    References
    ----------
    Gebremedhin, Manne and Pothen, "What color is your Jacobian?", SIAM Review 47 (2005).
    """
    caller = "plan_jacobian"
    check_callable(caller, f)
    refuse_transforms(caller)
    _cost_model.check_mode(mode, _cost_model.JACOBIAN_MODES)
    params, prepared = prepared_by(caller, example_args, argnums, arrays_only=True)
    numbers_beside_arrays(prepared)
    inputs = prepared.inputs
    if not inputs:
        raise ValueError(f"{caller}: expected an array or a number to differentiate by, got none")
    if any(x.dtype.is_complex for x in inputs):
        if mode == "forward":
            raise ValueError(
                f"{caller}: mode 'forward' gives no Jacobian by a complex argument; use 'reverse'"
            )
        mode = "reverse"
    if sparsity is not None:
        patterns = _given_patterns(caller, sparsity, [x.numel() for x in inputs])
    else:
        y, patterns, hooked = _detected(f, params, prepared)
        mode = _possible_mode(caller, y, hooked, mode)

    plan = JacobianPlan(
        f,
        specs_of(prepared),
        by_mode(patterns, mode),
        argnums=argnums,
        mode=mode,
        chunk_size=chunk_size,
        verify=verify,
        detected=sparsity is None,
        device=prepared.inputs[0].device,
    )
    plan._made_for = 0 if is_implicit(example_args) else len(example_args)
    asked = verify and sparsity is None and plan.mode == "forward"
    if asked and not plan._agrees_with_reverse(example_args):
        warn_disagreement(caller)
        plan._color_rows()
    return plan


@_engine.entry_point
def plan_hessian(
    f: Callable[..., Any],
    x: Any,
    *,
    mode: str = "auto",
    sparsity: Any = None,
    chunk_size: int | None = None,
    verify: bool = True,
) -> HessianPlan:
    """Structure of a Hessian, found and colored once, for evaluations at many points.

    Parameters
    ----------
    f : callable
        As for :func:`hessian`. Run once, unless ``sparsity`` is given.
    x : number or array
        Of the shape, kind of dtype and device that the plan will be called with.
    mode : {"auto", "forward_over_reverse", "reverse_over_reverse"}
        As for :func:`hessian`.
    sparsity : optional
        The structure where you know it, as for :func:`plan_jacobian`; half of a symmetric one is completed.
    chunk_size, verify
        As for :func:`plan_jacobian`.

    Returns
    -------
    HessianPlan
        Call it with a new ``x``; ``plan.diagonal(x)`` gives the diagonal alone.

    Raises
    ------
    ValueError
        ``x`` or ``f(x)`` is complex, ``f(x)`` is no scalar, ``mode`` is none of the words above,
        ``sparsity`` has another shape, or ``chunk_size`` is below 1.
    TypeError
        ``f`` is no function; ``x`` is a structure, a module or opaque; ``sparsity`` is no matrix, ``verify``
        neither ``True`` nor ``False``, or ``chunk_size`` no int.
    RuntimeError
        Inside a ``torch.func`` transform or ``torch.compile``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import plan_hessian
    >>> plan = plan_hessian(lambda x: ((x[1:] - x[:-1]) ** 2).sum(), torch.rand(1000))
    >>> plan.ncolors
    3
    >>> plan(torch.zeros(1000)).values().sum()
    tensor(0.)
    >>> plan.diagonal(torch.zeros(1000))[:3]
    tensor([2., 4., 4.])

    References
    ----------
    Gebremedhin, Tarafdar, Pothen and Walther, "Efficient computation of sparse Hessians using coloring and
    automatic differentiation", INFORMS Journal on Computing 21 (2009).
    """
    caller = "plan_hessian"
    check_callable(caller, f)
    refuse_transforms(caller)
    _cost_model.check_mode(mode, _cost_model.HESSIAN_MODES)
    prepared = prepare_one(caller, x)
    n = prepared.inputs[0].numel()
    if sparsity is not None:
        pattern = _given_pattern(f"{caller}: sparsity", sparsity)
        if pattern.shape != (n, n):
            raise ValueError(f"{caller}: sparsity: expected the shape {(n, n)}, got {pattern.shape}")
    else:
        flat = OneRun(lambda *xs: _engine.call(f, prepared, xs))
        y, (pattern,) = hessian_patterns(flat, prepared.inputs, prepared.owned, DEFAULT_BUDGET)
        flat.settle()
        real_scalar(caller, y)
    recovery = symmetric_recovery(symmetrized(pattern), refine=True)
    return HessianPlan(
        f,
        specs_of(prepared),
        recovery,
        mode=mode,
        chunk_size=chunk_size,
        verify=verify,
        detected=sparsity is None,
        device=prepared.inputs[0].device,
    )


def _possible_mode(caller: str, y: Any, hooked: bool, mode: str) -> str:
    """The mode; where forward mode would leave something out reverse."""
    names = survey([output_tensor(caller, y)]).unpushable
    if names and mode == "forward":
        raise unpushable(caller, names)
    return "reverse" if names or (hooked and mode == "auto") else mode


def _given_pattern(what: str, given: Any) -> Pattern:
    try:
        return Pattern.of(given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


def _given_patterns(caller: str, sparsity: Any, widths: Sequence[int]) -> list[Pattern]:
    """The patterns that the caller gave, one per array, as wide as the arguments are."""
    given = list(sparsity) if isinstance(sparsity, (tuple, list)) else [sparsity]
    if len(given) != len(widths):
        raise ValueError(
            f"{caller}: sparsity: expected a pattern for each of the {len(widths)} differentiated arguments, "
            f"got {len(given)}"
        )
    patterns = [_given_pattern(f"{caller}: sparsity of argument {i}", one) for i, one in enumerate(given)]
    for i, (pattern, width) in enumerate(zip(patterns, widths, strict=True)):
        if pattern.shape != (patterns[0].shape[0], width):
            raise ValueError(
                f"{caller}: sparsity of argument {i}: expected {patterns[0].shape[0]} rows and {width} "
                f"columns, got the shape {tuple(pattern.shape)}"
            )
    return patterns
