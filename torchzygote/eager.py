"""Updates inside the backward pass: ``eager_update``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import _updates
from ._arguments import type_name
from ._distributed import refuse_reduced
from ._flags import held_flags, requires_grad
from ._members import qualified
from ._overlap import span_of
from ._torch_private import is_wrapped, memory_holders, outside_functorch
from .params import Params

__all__ = ["EagerUpdate", "eager_update"]


class EagerUpdate:
    """The handle of :func:`~torchzygote.eager_update`; as a context manager it is removed at the end.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import eager_update
    >>> w = torch.tensor([1., 2.], requires_grad=True)
    >>> with eager_update(lambda param, grad: param.sub_(grad), [w]) as handle:
    ...     (w**2).sum().backward()
    >>> handle, w.detach()
    (<eager update of 0 parameters>, tensor([-1., -2.]))
    """

    def __init__(self, update: Callable[[Tensor, Tensor], Any], params: list[Tensor]) -> None:
        self._params = params
        self._handles: list[Any] = []
        try:
            for p in params:
                _updates.enroll(p, update)
                _add_hook(p, update, self._handles)
        except BaseException:  # an interrupt, too
            self.remove()
            raise

    def remove(self) -> None:
        """Stop updating; a second call does nothing.

        Examples
        --------
        >>> import torch
        >>> from torchzygote import eager_update
        >>> w = torch.tensor([1., 2.], requires_grad=True)
        >>> handle = eager_update(lambda param, grad: param.sub_(grad), [w])
        >>> handle.remove()
        >>> w.sum().backward()
        >>> w.grad
        tensor([1., 1.])
        """
        for handle in self._handles:
            handle.remove()
        for p in self._params:
            _updates.withdraw(p)
        self._handles, self._params = [], []

    def __enter__(self) -> EagerUpdate:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"<eager update of {len(self._params)} parameters>"


def _add_hook(p: Tensor, update: Callable[[Tensor, Tensor], Any], handles: list[Any]) -> None:
    """Update ``p`` in ``backward()``, now or once it requires grad; ``handles`` gets what ends that."""

    def hook(p: Tensor) -> None:
        if _updates.updating():
            return
        gradient, p.grad = p.grad, None
        if gradient is not None:
            # Autograd may have handed on the memory of another tensor, as the caller's cotangent.
            shared = gradient.layout is torch.strided and memory_holders(gradient) > 1
            _updates.run(update, p, gradient.clone() if shared else gradient)

    if p.requires_grad:
        handles.append(p.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        return
    if p.is_inference() or is_wrapped(p):
        return  # it never gets one
    with outside_functorch():
        release = held_flags([p])  # PyTorch keeps hooks of what doesn't require grad, but takes none
        try:
            handles.append(p.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        finally:
            release()


def eager_update(
    update: Callable[[Tensor, Tensor], Any], model_or_params: nn.Module | Params | Iterable[Any]
) -> EagerUpdate:
    """Updates of parameters inside the backward pass, each as soon as its gradient is complete.

    The gradient is freed right after its update, so that the gradients of a model are never in memory
    together: for models whose gradients don't fit beside their parameters.

    Parameters
    ----------
    update : callable
        Called as ``update(param, grad)`` without recording, once per backward pass for each parameter that
        the pass reaches, when all contributions to its gradient are summed. It writes into ``param``, and may
        write into ``grad``, which is nobody else's.
    model_or_params : Module, Params or iterable of tensors
        A module stands for the parameters that are trainable now; iterables and mappings for what
        :class:`Params` finds in them. Leaf tensors only; a tensor that requires no gradient yet is updated
        from the first ``backward()`` on that brings it one.

    Returns
    -------
    EagerUpdate
        A handle with ``remove()``, which also is a context manager.

    Raises
    ------
    TypeError
        ``update`` is not a function, or ``model_or_params`` holds no tensors.
    ValueError
        A parameter is shared (a module has it under two names, or two parameters share memory), is no leaf,
        or has an eager update already.
    RuntimeError
        By :func:`gradient` and the like: the gradient must be differentiable itself (``create_graph=True``,
        or a call inside another differentiation).

    Notes
    -----
    It takes part in ``backward()``, where a gradient that was in ``.grad`` before is part of ``grad``, and in
    :func:`gradient`, :func:`withgradient` and :func:`pullback` with :class:`Params`: the :class:`Grads` then
    hold ``None`` for what was updated. Jacobians and second derivatives are no gradients, and update nothing.
    An ``update`` that differentiates in its turn gets gradients as usual, and updates nothing by that.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import Params, eager_update, gradient
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> def sgd(param, grad):
    ...     param -= 0.1 * grad
    >>> with eager_update(sgd, model):
    ...     model(torch.tensor([1., 2.])).sum().backward()
    >>> model.weight, model.weight.grad
    (Parameter containing:
    tensor([[0.9000, 0.8000]], requires_grad=True), None)
    >>> with eager_update(sgd, model):
    ...     grads = gradient(lambda: model(torch.tensor([1., 2.])).sum(), Params(model))
    >>> grads[model.weight] is None, model.weight.detach()
    (True, tensor([[0.8000, 0.6000]]))
    """
    if not callable(update) or isinstance(update, nn.Module):
        raise TypeError(
            f"eager_update: update: expected a function update(param, grad), got {type_name(update)}; the "
            "function comes first"
        )
    names = _named(model_or_params)
    _check(names)
    return EagerUpdate(update, [p for _, p in names])


def _named(source: nn.Module | Params | Iterable[Any]) -> list[tuple[str, Tensor]]:
    if isinstance(source, Tensor):
        raise TypeError(
            "eager_update: expected a module, Params or an iterable of tensors, got a bare tensor; "
            "write [tensor]"
        )
    if not isinstance(source, (nn.Module, Iterable)):
        raise TypeError(
            f"eager_update: expected a module, Params or an iterable of tensors, got {type_name(source)}"
        )
    members = list(_members(source, ""))
    Params([p for _, p in members])  # refuses what can't be a parameter
    return [(name or f"parameter {i}", p) for i, (name, p) in enumerate(members)]


def _members(source: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What ``Params`` would find, with its name if it has one; unlike there, as often as it is there."""
    if isinstance(source, nn.Module):
        refuse_reduced(source)
        for own, p in source.named_parameters(remove_duplicate=False):
            if requires_grad(p):
                yield qualified(name, own), p
    elif isinstance(source, Mapping):
        for key, value in source.items():
            yield from _members(value, qualified(name, key)) if isinstance(key, str) else _members(key, name)
    elif isinstance(source, Iterable) and not isinstance(source, (Tensor, str, bytes, np.ndarray)):
        for i, member in enumerate(source):
            bare = isinstance(member, Tensor) and not name
            yield from _members(member, "" if bare else qualified(name, str(i)))
    else:
        yield name, source


def _check(named: list[tuple[str, Tensor]]) -> None:
    first: dict[int, str] = {}
    for name, p in named:
        if id(p) in first:
            raise ValueError(
                f"eager_update: {first[id(p)]} and {name} are the same tensor; a shared parameter can't be "
                "updated eagerly, leave it out"
            )
        first[id(p)] = name
        if is_lazy(p):
            raise ValueError(
                f"eager_update: expected parameters that have a shape, got {name}, which has none before its "
                "lazy module is called; run the module once first"
            )
        if not p.is_leaf:
            raise ValueError(
                f"eager_update: {name}: expected a leaf tensor, got the result of an operation, which "
                "can't be updated in place"
            )
        if _updates.is_enrolled(p):
            raise ValueError(
                f"eager_update: {name} has an eager update already; call remove() on its handle first"
            )
    _check_memory(named)


def _check_memory(named: list[tuple[str, Tensor]]) -> None:
    spans = []
    for name, p in named:
        start, end = span_of(p)
        if start < end:  # a wrapper has no memory
            spans.append((str(p.device), start, end, name))
    spans.sort()
    for (device, _, end, name), (other_device, start, _, other) in itertools.pairwise(spans):
        if device == other_device and start < end and device != "meta":
            raise ValueError(
                f"eager_update: {name} and {other} share memory; a shared parameter can't be updated "
                "eagerly, leave both out"
            )
