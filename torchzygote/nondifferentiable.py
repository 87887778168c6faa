"""Leaving differentiation out, and asking for it: ``ignore_derivatives`` and ``isderiving``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from . import _hidden_derivatives, _state
from ._arguments import type_name
from ._torch_private import pytree
from .buffer import Buffer
from .graddict import GradDict
from .params import finds_parameters

__all__ = ["ignore_derivatives", "isderiving"]

T = TypeVar("T")


@overload
def ignore_derivatives(x_or_fn: Tensor) -> Tensor: ...
@overload
def ignore_derivatives(x_or_fn: Callable[[], T]) -> T: ...
@overload
def ignore_derivatives(x_or_fn: Any) -> Any: ...
def ignore_derivatives(x_or_fn: Any) -> Any:
    """The value of something, with no derivative.

    Parameters
    ----------
    x_or_fn : tensor, structure, or callable
        A value: its tensors are detached, leaf by leaf, and the values of a :class:`GradDict`. Or a function
        without arguments: it is called, with :func:`isderiving` ``False`` inside, and what it returns is
        detached. What it writes elsewhere, into a list or a :class:`Buffer`, isn't: return it instead.

    Returns
    -------
    object
        The same value; all derivatives that run, in any mode and by whatever means, take it for a constant.
        Detached tensors share their memory with the given ones, except in the run that finds a structure.

    Raises
    ------
    TypeError
        A :class:`Buffer`, which can't be detached: copy it first. A module with parameters, or
        :class:`Params`: write ``ignore_derivatives(lambda: m(x))``.

    Examples
    --------
    >>> from torchzygote import gradient, ignore_derivatives, jacobian
    >>> gradient(lambda a: a * ignore_derivatives(a), 3)
    (tensor(3.),)
    >>> jacobian(lambda a: a * ignore_derivatives(lambda: a.round()), 3.2, mode="forward")
    (tensor([3.]),)

    References
    ----------
    ``ignore_derivatives`` in ChainRulesCore.jl, https://juliadiff.org/ChainRulesCore.jl/stable/; ``dropgrad``
    and ``ignore`` in Zygote.jl.
    """
    # Containers first: callable(dict) is what Dynamo can't trace.
    if isinstance(x_or_fn, (Tensor, tuple, list, dict)) or not callable(x_or_fn) or finds_parameters(x_or_fn):
        return _detached(x_or_fn)
    if torch.compiler.is_compiling():
        from ._deriving_traced import ignored

        with ignored():
            return _detached(x_or_fn())
    with _state.ignoring():
        return _detached(x_or_fn())


def _detached(x: Any) -> Any:
    if isinstance(x, Tensor):
        return _cut(x)
    return pytree.tree_map(_detached_leaf, x)


def _cut(x: Tensor) -> Tensor:
    # Dynamo can't follow thread-local state; nobody reads operators while it traces.
    return x.detach() if torch.compiler.is_compiling() else _hidden_derivatives.cut(x)


def _detached_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return _cut(leaf)
    if isinstance(leaf, GradDict):
        return leaf._like([_detached(value) for value in leaf.values()])
    if isinstance(leaf, Buffer):
        raise TypeError(
            f"ignore_derivatives: expected a tensor, a structure of tensors or a function, got a "
            f"{type_name(leaf)}, whose elements keep their derivatives; give its copy()"
        )
    if finds_parameters(leaf):
        raise TypeError(
            f"ignore_derivatives: expected a tensor, a structure of tensors or a function, got a "
            f"{type_name(leaf)}, whose parameters keep their derivatives; ignore what is computed with "
            "them: ignore_derivatives(lambda: m(x))"
        )
    return leaf


def isderiving() -> bool:
    """Whether this call is being differentiated, in any mode.

    Returns
    -------
    bool
        ``True`` inside a function that this package or ``torch.func`` differentiates; ``False`` inside
        :func:`ignore_derivatives`, under ``torch.func.vmap`` alone, and under plain autograd alone, which
        records without knowing what for. While ``torch.compile`` traces it is asked once, and the answer
        compiled in.

    Examples
    --------
    >>> from torchzygote import gradient, ignore_derivatives, isderiving
    >>> isderiving()
    False
    >>> gradient(lambda a: 2 * a if isderiving() else a, 1)
    (tensor(2.),)
    >>> gradient(lambda a: 2 * a if ignore_derivatives(isderiving) else a, 1)
    (tensor(1.),)

    References
    ----------
    ``isderiving`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/utils/
    """
    if torch.compiler.is_compiling():
        from ._deriving_traced import is_deriving

        return is_deriving()
    return _state.differentiated()
