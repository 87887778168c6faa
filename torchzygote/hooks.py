"""Watching and bending gradients: ``hook`` and ``showgrad``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from ._argument_text import argument_text
from ._arguments import type_name
from ._cotangent_hook import attach
from ._torch_private import outside_functorch, plain_value, pytree

__all__ = ["hook", "showgrad"]


@overload
def hook(fn: Callable[[Any], Any], x: Tensor) -> Tensor: ...
@overload
def hook(fn: Callable[[Any], Any], x: Any) -> Any: ...
def hook(fn: Callable[[Any], Any], x: Any) -> Any:
    """The identity, whose gradient on the way back goes through a function.

    Parameters
    ----------
    fn : callable
        Called with the gradient that arrives at this copy of ``x``. What it returns replaces it: a tensor of
        the same shape, or ``None`` (as from ``print``) to leave it as it is. It gets a copy of its own: what
        it writes there in place (``g.clamp_(-1, 1)``) counts only if it returns it.
    x : tensor or structure of tensors
        Returned as it is. A structure's gradients reach ``fn`` whole, in one call, with ``None`` for leaves
        that are no tensors or got no gradient; a leaf of what ``fn`` returns that is ``None`` leaves that
        gradient as it is. Anything else without gradients passes untouched.

    Returns
    -------
    object
        ``x``; its tensors are views (copies inside ``torch.func``), so that only gradients through this copy
        are meant. Writing into a view in place raises: ``clone()`` it first.

    Raises
    ------
    TypeError
        ``fn`` is not callable; ``x`` is or contains a :class:`Buffer`, a module with parameters,
        :class:`Params` or :class:`Grads`, whose tensors have gradients of their own; or,
        in the backward pass, returns something else than a tensor or ``None``.
    ValueError
        In the backward pass: ``fn`` returns another shape or structure.

    Notes
    -----
    If no gradient reaches this copy at all, ``fn(None)`` is called once, as the outermost differentiation by
    this package ends; what it returns is ignored, and so is a ``TypeError`` or ``AttributeError``.

    Where rows are batched (a Jacobian in reverse mode), ``fn`` sees ordinary tensors with one more axis in
    front, the rows. Inside a function that ``vmap`` maps, it works on one example, like everything there.

    In forward mode it is the identity. What ``fn`` does is differentiated in second derivatives, and each
    backward pass through the copy calls it: reverse over reverse mode bends twice, forward over reverse once.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import gradient, hook
    >>> gradient(lambda a, b: hook(torch.neg, a) * b, 2, 3)
    (tensor(-3.), tensor(2.))
    >>> gradient(lambda a, b: hook(print, a * b) ** 2, 2, 3)
    tensor(12.)
    (tensor(36.), tensor(24.))

    References
    ----------
    ``hook`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    if not callable(fn):
        raise TypeError(
            f"hook: fn: expected a function of the gradient, got {type_name(fn)}; write hook(fn, x), "
            "the function first"
        )
    if torch.compiler.is_compiling():
        if fn is print:
            return x  # nothing is printed while tracing
        from ._cotangent_hook_traced import attach_traced

        return attach_traced(fn, x)
    return attach("hook", fn, x)


@overload
def showgrad(x: Tensor, name: str | None = None) -> Tensor: ...
@overload
def showgrad(x: Any, name: str | None = None) -> Any: ...
def showgrad(x: Any, name: str | None = None) -> Any:
    """The identity, whose gradient is printed on the way back.

    Parameters
    ----------
    x : tensor or structure of tensors
        Returned as it is, as by :func:`hook`.
    name : str, optional
        What to call it. By default the source text of the argument, or ``x`` where there is no source.

    Returns
    -------
    object
        ``x``, as by :func:`hook`.

    Raises
    ------
    TypeError
        ``x`` is or contains a :class:`Buffer`, a module with parameters, :class:`Params` or :class:`Grads`,
        whose tensors have gradients of their own.

    Notes
    -----
    Values are printed without graphs, and whole where they are batched, rows and examples in front. Where no
    gradient arrives, ``∂(name) = None`` is printed once, as the outermost differentiation by this package
    ends. In forward mode and under ``torch.compile`` nothing is printed.

    Examples
    --------
    >>> from torchzygote import gradient, showgrad
    >>> gradient(lambda a, b: showgrad(a) * b, 2, 3)
    ∂(a) = tensor(3.)
    (tensor(3.), tensor(2.))
    >>> gradient(lambda a, b: showgrad(a * b, name="product") * b, 2, 3)
    ∂(product) = tensor(3.)
    (tensor(9.), tensor(12.))

    References
    ----------
    ``@showgrad`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    if torch.compiler.is_compiling():
        return x
    if name is None:
        name = argument_text(sys._getframe(1), showgrad, 0, "x") or "x"
    return attach("showgrad", _Show(name), x, looks=True)


class _Show:
    """Prints a gradient under a name."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, gradient: Any) -> None:
        shown = pytree.tree_map(lambda g: plain_value(g) if isinstance(g, Tensor) else g, gradient)
        with outside_functorch():
            print(f"∂({self.name}) = {shown!r}")
