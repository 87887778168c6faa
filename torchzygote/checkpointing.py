"""Checkpointing: memory for time, in every mode of differentiation.

On the tape this is ``torch.utils.checkpoint`` (:mod:`._checkpoint.tape`); inside ``torch.func`` transforms,
which refuse it, a custom function of our own (:mod:`._checkpoint.transforms`). Which of them is decided here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch.utils.checkpoint import checkpoint

from ._call_options import check_callable
from ._checkpoint.tape import checkpoint_on_tape
from ._checkpoint.transforms import checkpoint_in_transforms
from ._state import in_outer_forward_mode
from ._torch_private import in_functorch, in_functorch_compiled, is_tracing

__all__ = ["checkpointed"]

P = ParamSpec("P")
R = TypeVar("R")


@overload
def checkpointed(f: Callable[P, R], /, *xs: P.args, **kwargs: P.kwargs) -> R: ...
@overload
def checkpointed(f: Callable[..., Any], /, *xs: Any, **kwargs: Any) -> Any: ...
def checkpointed(f: Callable[..., Any], /, *xs: Any, **kwargs: Any) -> Any:
    """The value of ``f(*xs, **kwargs)``, with nothing of its inside stored for the backward pass.

    The backward pass runs ``f`` once more to get back what it needs: once per backward pass, and once per
    chunk of Jacobian rows, never once per row. Time for memory.

    Parameters
    ----------
    f : callable
        A function, module or bound method that does the same when it runs again: random numbers of PyTorch's
        default generators (CPU and CUDA), autocast, the default device and dtype, containers among the
        arguments, variables that ``f`` closes over, and buffers of modules in training mode among what ``f``
        is, gets or closes over are restored, anything else that ``f`` changes is not.
        Tensors that it closes over, and the parameters of modules, get their gradients.
    *xs, **kwargs
        Passed to ``f``: tensors, structures of them, or anything else.

    Returns
    -------
    object
        What ``f`` returns.

    Raises
    ------
    TypeError
        ``f`` can't be called.
    RuntimeError
        In the backward pass, where ``f`` did something else when it ran again (saved tensors of other shapes
        or in another number, found something else in a global variable or an attribute), or wrote in place
        into what its own backward needs, or where a tensor that it uses has been written in place since.

    Notes
    -----
    Calls may be nested, and differentiated in any mode and to any order. In forward mode nothing is stored in
    any case, and ``f`` just runs. Under ``torch.compile`` the call is marked for recomputation; inside a
    derivative that is compiled with it, ``f`` just runs, and what to store is left to the compiler.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import checkpointed, gradient
    >>> w = torch.tensor(3.0)
    >>> gradient(lambda x: checkpointed(lambda x: torch.exp(x * w), x), torch.tensor(0.0))
    (tensor(3.),)

    Only the input of each layer is kept here, however much a layer computes inside:

    >>> layers = [torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))] * 5
    >>> def deep(x):
    ...     for layer in layers:
    ...         x = checkpointed(layer, x)
    ...     return x.sum()
    >>> gradient(deep, torch.ones(8))[0].shape
    torch.Size([8])

    References
    ----------
    ``checkpointed`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/adjoints/#Checkpointing; Griewank and
    Walther, *Evaluating Derivatives*, chapter 12.
    """
    check_callable("checkpointed", f)
    if torch.compiler.is_compiling():
        return f(*xs, **kwargs) if in_functorch_compiled() else _compiled(f, xs, kwargs)
    if in_functorch():
        return checkpoint_in_transforms(f, xs, kwargs)
    if not torch.is_grad_enabled() or in_outer_forward_mode() or is_tracing():
        return f(*xs, **kwargs)
    return checkpoint_on_tape(f, xs, kwargs)


def _compiled(f: Callable[..., Any], xs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(*xs: Any) -> Any:
        return f(*xs, **kwargs)

    return checkpoint(call, *xs, use_reentrant=False)
