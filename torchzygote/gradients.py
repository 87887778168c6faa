"""Pullbacks, pushforwards and gradients: the public first-order functions.

Thin functions over one worker each; how a function is recorded is the engine's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, overload

import torch
from torch import Tensor

from . import _engine, _state, _updates
from ._arguments import type_name
from ._call_arguments import is_implicit, prepare_call
from ._call_options import check_callable
from ._cotangents import laid_out, own, unfold_cotangent
from ._dropped_graphs import Held, Owner
from ._flags import flags_on, held
from ._outputs import differentiated_part, hint, scalar_root
from ._pushing import Push
from .grads import Grads
from .params import Params

__all__ = ["WithGradient", "gradient", "pullback", "pushforward", "withgradient"]


class WithGradient(NamedTuple):
    """What :func:`withgradient` returns: ``val``, what the function returned, and ``grad``."""

    val: Any
    grad: Any


@_engine.entry_point
def _value_and_results(
    caller: str,
    f: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | Sequence[int] | None,
    create_graph: bool | None,
    aux: bool,
) -> tuple[Any, Any]:
    """The worker: value and gradient of ``f``, which is called once."""
    check_callable(caller, f)
    params, prepared, keep = prepare_call(caller, args, argnums, create_graph)
    with held(params), _state.differentiation():
        lin = _engine.linearize(f, prepared, keep=keep, scalar_aux=aux)
        if lin.y_spec is not None:
            _refuse_structure(caller, lin, aux)
        root = scalar_root(caller, lin.y_leaves[0], _expected(lin, aux))
        if root is None:
            flat: list[Tensor | None] = [None] * len(prepared.inputs)
        else:
            flat = _updates.pull(lin, [torch.ones_like(root)], params is not None, retain=keep, keep=keep)
        if not _engine.in_transform() and not _engine.compiling():
            flat = own(flat) if params is None else laid_out(own(flat), prepared.inputs, keep)
        value = lin.y if aux else None
    return value, prepared.results(flat) if params is None else Grads(params, flat)


def _expected(lin: _engine.Linearization, aux: bool) -> str:
    first = aux and differentiated_part(lin.y) is not lin.y
    return "the first field of what f returns to be" if first else "f to return"


def _refuse_structure(caller: str, lin: _engine.Linearization, aux: bool) -> NoReturn:
    y = differentiated_part(lin.y) if aux else lin.y
    raise TypeError(
        f"{caller}: expected {_expected(lin, aux)} a real scalar, got {type_name(y)}{hint(caller, y)}"
    )


# The first is for what a lambda without annotations has as its argument, which fits every type.
@overload
def gradient(
    f: Callable[..., Any], x: NoReturn, /, *, argnums: Any = None, create_graph: Any = None
) -> Any: ...
@overload
def gradient(
    f: Callable[..., Any], params: Params, /, *, argnums: None = None, create_graph: bool | None = None
) -> Grads: ...
@overload
def gradient(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    create_graph: bool | None = None,
) -> tuple[Any, ...]: ...
def gradient(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    create_graph: bool | None = None,
) -> Any:
    """Gradient of a scalar function with respect to each of its arguments.

    Parameters
    ----------
    f : callable
        Called once, as ``f(*args)`` with tensors for numbers and arrays; returns a real scalar (a number or a
        0-dim tensor).
    *args
        Numbers, arrays (tensors or NumPy arrays of any shape), structures of them, modules; anything else is
        passed to ``f`` untouched. Or one :class:`Params`; then ``f`` takes no arguments.
    argnums : int or sequence of int, optional
        Differentiate these arguments only; the others reach ``f`` exactly as given.
    create_graph : bool, optional
        Make the results part of the autograd graph around the call. By default they are differentiable
        only inside another differentiation by this package or by ``torch.func``.

    Returns
    -------
    tuple or Grads
        One entry per argument: a tensor of the argument's shape (0-dim for a number), the same structure for
        a structure, a dict from qualified name to gradient for a module, ``None`` for anything else and for
        what ``f`` doesn't depend on. A :class:`Grads` for :class:`Params`.

    Raises
    ------
    ValueError
        ``f`` returns an array (perhaps you wanted :func:`jacobian`) or a complex number; ``argnums`` are out
        of range or repeated.
    TypeError
        ``f`` is no function, or returns anything else; ``argnums`` are no ints, come with :class:`Params`, or
        ``Params`` come among others; ``create_graph`` is neither ``True`` nor ``False``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import gradient
    >>> gradient(torch.mul, 2, 3)
    (tensor(3.), tensor(2.))
    >>> gradient(lambda a, t: (a * t[0]).sum() + t[1], torch.tensor([1., 2., 3.]), (4, 5))
    (tensor([4., 4., 4.]), (tensor(6.), tensor(1.)))

    References
    ----------
    ``gradient`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    return _value_and_results("gradient", f, args, argnums, create_graph, False)[1]


def withgradient(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    create_graph: bool | None = None,
) -> WithGradient:
    """Value and gradient, with one call of ``f``.

    Parameters
    ----------
    f : callable
        As for :func:`gradient`. It may return a tuple or named tuple: the first field, a real scalar, is
        differentiated, the others are auxiliary output.
    *args, argnums, create_graph
        As for :func:`gradient`.

    Returns
    -------
    WithGradient
        A named tuple ``(val, grad)``: all that ``f`` returned, and what :func:`gradient` gives.

    Raises
    ------
    ValueError, TypeError
        As :func:`gradient`.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import withgradient
    >>> withgradient(torch.div, 1, 2)
    WithGradient(val=tensor(0.5000), grad=(tensor(0.5000), tensor(-0.2500)))
    >>> withgradient(lambda x: (x.sum(), x.max()), torch.tensor([1., 2.])).val
    (tensor(3.), tensor(2.))

    References
    ----------
    ``withgradient`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    return WithGradient(*_value_and_results("withgradient", f, args, argnums, create_graph, True))


class _Back:
    """The pullback of one call, kept until it is dropped; ``held`` is what is released then."""

    def __init__(
        self, lin: _engine.Linearization, params: Params | None, keep: bool, held: Held | None
    ) -> None:
        self._lin = lin
        self._params = params
        self._keep = keep
        self._held = held
        self._owner = None if held is None or not held.is_dropped else Owner(held)
        # What the tape knows by identity. Flags are left to the caller between f and here.
        given = zip(lin.prepared.inputs, lin.prepared.owned, lin.inputs, strict=True)
        self._found = [x for x, owned, tracked in given if not owned and x is tracked]

    def __call__(self, ybar: Any) -> Any:
        if all(self._lin.prepared.owned) or _engine.compiling():
            return self._pull(ybar)
        with _engine.finding():
            if ybar is None or not self._found:
                return self._pull(ybar)
            with flags_on(self._found):
                return self._pull(ybar)

    def _pull(self, ybar: Any) -> Any:
        lin = self._lin
        if ybar is None:
            flat: list[Tensor | None] = [None] * len(lin.prepared.inputs)
        else:
            cotangents = unfold_cotangent(lin, ybar)
            # Tangents pass without a graph; one would lead to the call that was recorded outside.
            keep = self._keep or (_engine.keeps_graph(None) and not _state.is_only_pushed())
            if keep and self._held is not None:
                self._held.is_dropped = False  # the results hold the graph
            with _state.differentiation(lin.waiting):
                flat = _updates.pull(lin, cotangents, self._params is not None, retain=True, keep=keep)
            if not _engine.in_transform() and not _engine.compiling():
                flat = own(flat)  # cotangents are still held: none is handed out
                flat = flat if self._params is None else laid_out(flat, lin.prepared.inputs, keep)
        return lin.prepared.results(flat) if self._params is None else Grads(self._params, flat)

    def __repr__(self) -> str:
        return f"<pullback by {len(self._lin.prepared.inputs)} tensors>"


@overload
def pullback(
    f: Callable[..., Any], x: NoReturn, /, *, argnums: Any = None, create_graph: Any = None
) -> tuple[Any, Callable[[Any], Any]]: ...
@overload
def pullback(
    f: Callable[..., Any], params: Params, /, *, argnums: None = None, create_graph: bool | None = None
) -> tuple[Any, Callable[[Any], Grads]]: ...
@overload
def pullback(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    create_graph: bool | None = None,
) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]: ...
def pullback(
    f: Callable[..., Any],
    *args: Any,
    argnums: int | Sequence[int] | None = None,
    create_graph: bool | None = None,
) -> tuple[Any, Callable[[Any], Any]]:
    """Value of ``f`` and the function that pulls a cotangent back through it (vector-Jacobian product).

    Parameters
    ----------
    f : callable
        Called once, as for :func:`gradient`; it may return a number, an array or a structure of them.
    *args, argnums, create_graph
        As for :func:`gradient`.

    Returns
    -------
    y
        What ``f`` returned.
    back : callable
        ``back(ybar)`` gives one entry per argument, as :func:`gradient` does, any number of times. ``ybar``
        has the shape and structure of ``y``, ``None`` standing for zero. ``back(None)`` gives all ``None``.
        The record of the call lives as long as ``back``.

    Raises
    ------
    ValueError
        ``argnums`` are out of range or repeated. By ``back``: ``ybar`` doesn't fit ``y`` in shape, structure
        or kind of dtype.
    TypeError
        As :func:`gradient`, whatever ``f`` returns.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import pullback
    >>> y, back = pullback(lambda a, b: a * b, torch.tensor([1., 2.]), 3)
    >>> y
    tensor([3., 6.])
    >>> back(torch.tensor([1., 10.]))
    (tensor([ 3., 30.]), tensor(21.))

    References
    ----------
    ``pullback`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/adjoints/
    """
    return _pullback(f, args, argnums, create_graph)


@_engine.entry_point
def _pullback(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    argnums: int | Sequence[int] | None,
    create_graph: bool | None,
) -> tuple[Any, Callable[[Any], Any]]:
    check_callable("pullback", f)
    params, prepared, keep = prepare_call("pullback", args, argnums, create_graph)
    if not keep:  # else it has
        prepared.copy_arrays()
    waiting = _state.Session()
    with _state.kept_aside(), held(params), _state.differentiation(waiting, defer=True):
        lin = _engine.linearize(f, prepared, keep=keep)
    lin.waiting = waiting
    return lin.y, _Back(lin, params, keep, waiting.held)


def pushforward(f: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """The function that pushes tangents forward through ``f`` (Jacobian-vector product).

    Parameters
    ----------
    f : callable
        Called once per push, with tensors for numbers and arrays; random numbers are the same in all of them.
    *args
        As for :func:`gradient`, but every argument takes part, and there is no implicit form.

    Returns
    -------
    push : callable
        ``push(*xdots)``, a tangent per argument in that argument's shape and structure (a dict by qualified
        name for a module; ``None`` is zero, and what opaque arguments get), gives the tangent of what ``f``
        returns, in its structure. Tangents of a parameter that two modules share are added.

    Raises
    ------
    TypeError
        ``f`` is no function, or the argument is :class:`Params`.
    ValueError
        By ``push``: a tangent doesn't fit its argument, or there are more or fewer than arguments.
    RuntimeError
        By ``push``: a tensor among the arguments has been written to since (a NumPy array may be; a module is
        taken as it is at each push).

    Examples
    --------
    >>> import torch
    >>> from torchzygote import pushforward
    >>> pushforward(lambda a, b: a * b, torch.tensor([1., 2.]), 3)(torch.tensor([1., 0.]), 1)
    tensor([4., 2.])

    References
    ----------
    ``pushforward`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    check_callable("pushforward", f)
    if is_implicit(args):
        raise TypeError("pushforward: expected arguments, got Params; pass the tensors as arguments of f")

    pushed = Push(f, args)

    def push(*xdots: Any) -> Any:
        if len(xdots) != len(args):
            raise ValueError(f"push: expected {len(args)} tangents, one per argument, got {len(xdots)}")
        return pushed(xdots)

    return push
