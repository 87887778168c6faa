"""Forward mode inside a reverse pass: ``forwarddiff``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import _cost_model, _engine, _products, _state
from ._arguments import (
    ARRAY,
    MODULE,
    NUMBER,
    OPAQUE,
    is_inexact,
    is_size,
    kind_of,
    name_of,
    number_to_tensor,
    numpy_to_tensor,
    type_name,
)
from ._call_options import check_callable
from ._checkpoint.surroundings import Surroundings
from ._dropping import follows_others
from ._linear_node import known_derivative, recomputed_derivative
from ._packing import Packing, common_device
from ._random import RandomState
from ._stop_iteration import released
from ._structure_matching import parts_for
from ._torch_private import (
    in_functorch,
    is_tracing,
    layers,
    pytree,
    sequence_number,
    transform_stack,
    version_of,
)
from ._warning import warn

__all__ = ["DroppedGradientWarning", "forwarddiff"]

R = TypeVar("R")


class DroppedGradientWarning(UserWarning):
    """A function given to :func:`forwarddiff` depends on more than its argument.

    Gradients to the rest are dropped. Where that is meant, the warning is silenced by its class.

    Examples
    --------
    >>> import warnings
    >>> from torchzygote import DroppedGradientWarning, forwarddiff, gradient
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", DroppedGradientWarning)
    ...     gradient(lambda a, b: forwarddiff(lambda a: a * b, a), 2, 3)
    (tensor(3.), None)
    """


def forwarddiff(f: Callable[[Any], R], x: Any, *, chunk_threshold: int | None = None) -> R:
    """The value of ``f(x)``, differentiated in forward mode inside a reverse pass.

    Instead of what the inside of ``f`` needs for its backward pass, the Jacobian of ``f`` is stored: for few
    inputs and a long computation that is much less.

    Parameters
    ----------
    f : callable
        Called as ``f(x)``: once for the value, and once for each chunk of directions. Random numbers are the
        same in all these calls. It returns a number, an array or a structure of them.
    x : number, array or structure
        ``f`` sees tensors in place of numbers and NumPy arrays. All floating-point and complex ones are
        differentiated by; tensors and arrays of integers stay as they are, they may be indices.
    chunk_threshold : int, optional
        Directions that are pushed forward at a time; by default as many as fit the memory budget
        (:func:`set_memory_budget`).

    Returns
    -------
    object
        What ``f`` returns. Outside of a differentiation, ``f(x)`` is all that is computed.

    Raises
    ------
    TypeError
        ``f`` is no function, ``x`` is a module or opaque, or ``chunk_threshold`` is no int.
    ValueError
        ``chunk_threshold`` is below 1.
    OverflowError
        ``x`` is or contains a number too large for the default dtype.
    RuntimeError
        ``f`` writes into its argument in place, which is noticed where it is differentiated.

    Warns
    -----
    DroppedGradientWarning
        ``f`` closes over tensors that are being differentiated by. It is a function of ``x`` alone here:
        gradients to what it closes over are dropped.

    Notes
    -----
    Differentiable to any order, in every mode; a recorded backward pass runs ``f`` again. Inside
    ``torch.func`` transforms and ``torch.compile`` the Jacobian is recorded instead, with what its derivative
    needs. Second derivatives that mix ``x`` with what ``f`` closes over are not dropped.

    Examples
    --------
    >>> from torchzygote import forwarddiff, gradient
    >>> gradient(lambda a, b: forwarddiff(lambda ab: ab[0] * ab[1], [a, b]), 2, 3)
    (tensor(3.), tensor(2.))

    What ``f`` closes over is a constant, and a warning says so:

    >>> gradient(lambda a, b: forwarddiff(lambda a: a * b, a), 2, 3)
    (tensor(3.), None)

    References
    ----------
    ``forwarddiff`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/adjoints/
    """
    check_callable("forwarddiff", f)
    kind = kind_of(x)
    if kind is MODULE or kind is OPAQUE:
        raise TypeError(
            f"forwarddiff: x: expected a number, an array or a structure of them, got {type_name(x)}; pass "
            "the parameters of a module as a dict, and call it with torch.func.functional_call"
        )
    chunk = _check_chunk(chunk_threshold)
    leaves, spec = pytree.tree_flatten(x, is_leaf=is_size)
    if not isinstance(x, Tensor):
        leaves = [_as_tensor(leaf) for leaf in leaves]
        x = pytree.tree_unflatten(leaves, spec)
    if not _engine.compiling() and _state.in_outer_forward_mode() and "jvp" not in transform_stack():
        return f(x)  # plain torch.autograd.forward_ad: it runs forward, and allows no level within another
    slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _is_followed(leaf)]
    run = _FunctionOfTensors(f, leaves, spec, slots, chunk)
    y: R = run.value_only(x) if not slots else run.differentiable()
    return y


def _check_chunk(chunk_threshold: object) -> int | None:
    try:
        return _cost_model.check_chunk_size(chunk_threshold)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("chunk_size", "forwarddiff: chunk_threshold")) from None


def _as_tensor(leaf: Any) -> Any:
    """Numbers and NumPy arrays as ``f`` sees them."""
    kind = kind_of(leaf)
    try:
        if kind is NUMBER:
            return number_to_tensor(leaf)
        return (
            numpy_to_tensor(leaf, promote=False) if kind is ARRAY and not isinstance(leaf, Tensor) else leaf
        )
    except (TypeError, OverflowError) as error:
        raise type(error)(f"forwarddiff: x: {error}") from None


def _is_followed(x: Tensor) -> bool:
    """Whether some differentiation may ask for a derivative by ``x``."""
    if not is_inexact(x):
        return False
    if _engine.compiling():
        return True
    if in_functorch():
        return "jvp" in transform_stack() or any(layer.requires_grad for _, layer in layers(x))
    return x.requires_grad and torch.is_grad_enabled()


class _FunctionOfTensors:
    """``f`` as a function of the tensors in ``x``."""

    def __init__(
        self, f: Callable[[Any], Any], leaves: list[Any], spec: Any, slots: list[int], chunk: int | None
    ) -> None:
        self.f = f
        self.leaves = [leaf.detach() if i in slots else leaf for i, leaf in enumerate(leaves)]
        self.inputs = [leaves[i] for i in slots]
        self.spec = spec
        self.slots = slots
        self.chunk = chunk

    def call(self, tensors: list[Tensor], *, again: bool = False) -> Any:
        leaves = list(self.leaves)
        for i, tensor in zip(self.slots, tensors, strict=True):
            leaves[i] = tensor
        position = _state.mark()
        try:
            return self.f(pytree.tree_unflatten(leaves, self.spec))
        finally:
            # Hooks are the identity in forward mode; those of a derivative inside report from the first run.
            _state.forget_since(position, but_inner=not again)

    def value_only(self, x: Any) -> Any:
        """``f(x)`` where ``x`` is followed by nobody; what ``f`` closes over may be."""
        start = 0 if _engine.compiling() else sequence_number()
        y = self.f(x)
        leaves, spec = pytree.tree_flatten(y)
        if _engine.compiling():
            self.warn_traced([leaf for leaf in leaves if is_inexact(leaf)])
            return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, y)
        recorded = [follows_others(leaf, start) for leaf in leaves]
        if not any(recorded):
            return y
        self.warn()
        return pytree.tree_unflatten(
            [leaf.detach() if cut else leaf for leaf, cut in zip(leaves, recorded, strict=True)], spec
        )

    def differentiable(self) -> Any:
        """``f(x)`` with its derivative by ``x``."""
        plain = not (_engine.compiling() or in_functorch() or is_tracing())
        surroundings = None if _engine.compiling() else Surroundings()
        start = 0 if _engine.compiling() else sequence_number()
        y = self._first_call()
        outputs, y_spec = pytree.tree_flatten(y)
        places = [i for i, leaf in enumerate(outputs) if is_inexact(leaf)]
        if not places:
            return y
        values = [outputs[i] for i in places]
        if _engine.compiling():
            self.warn_traced(values)
        elif any(follows_others(value, start) for value in values):
            self.warn()
        device = common_device([*self.inputs, *values])
        x_packing, y_packing = Packing(self.inputs, device), Packing(values, device)
        x_flat, y_flat = x_packing.pack(self.inputs), y_packing.pack(values).detach()
        if _engine.compiling():
            x_flat = x_flat.clone()  # forward mode of a view of a view fails there, now and then (2.13)

        def flat(packed: Tensor) -> tuple[Tensor]:
            returned = self.call(x_packing.unpack(packed), again=True)
            found, spec = pytree.tree_flatten(returned)
            if spec != y_spec:  # a dict may have its keys in another order
                found = parts_for(y, returned, "forwarddiff: what f returned as it ran again")
            return (y_packing.pack([found[i] for i in places]),)

        def columns(at: Tensor) -> tuple[Tensor, Tensor]:
            if surroundings is None:
                return self.jacobian(flat, at, y_flat)
            with surroundings.restored():
                return self.jacobian(flat, at, y_flat)

        # The value is that of the run that is differentiated: generators of f's own draw anew in each.
        if plain:
            with torch.no_grad():
                known, value = columns(x_flat.detach())
            result = recomputed_derivative(x_flat, value, known, lambda at: columns(at)[0])
        elif _engine.compiling():
            from ._linear_node_traced import known_derivative_in_graph

            known, value = columns(x_flat)
            result = known_derivative_in_graph(x_flat, value, known)
        else:
            known, value = columns(x_flat)
            result = known_derivative(x_flat, value, known)
        for i, tensor in zip(places, y_packing.unpack_writable(result), strict=True):
            outputs[i] = tensor
        return pytree.tree_unflatten(outputs, y_spec)

    def _first_call(self) -> Any:
        """``f(x)`` on copies, which it must not write into: the derivative would be at another point."""
        copies = [tensor.detach().clone() for tensor in self.inputs]
        if _engine.compiling():
            return self.call(copies)
        before = [version_of(copy) for copy in copies]
        y = self.call(copies)
        if [version_of(copy) for copy in copies] != before:
            raise RuntimeError(
                f"forwarddiff: expected {name_of(self.f)} to leave its argument as it is, but it writes into "
                "it in place; let it write into a copy, x.clone()"
            )
        return y

    @released
    def jacobian(
        self, flat: Callable[[Tensor], tuple[Tensor]], at: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The derivative of ``flat`` by each element of ``at``, (at.numel(), y.numel()), and its value.

        ``y``: what another run has given, in that shape and dtype.
        """
        n = at.numel()
        if n == 0:
            return at.new_zeros(0, y.numel()), y
        random = None if _engine.compiling() else RandomState()
        # A direction needs what f makes inside, which isn't known: a few times its input and output.
        cost = _cost_model.RowCost(8 * (n + y.numel()) * y.element_size(), 0)
        chunk = n if _engine.compiling() else _cost_model.choose_chunk(self.chunk, n, cost, at.device)
        seeds = _products.identity_seeds(n, at.dtype, at.device)
        keep = not _engine.compiling() and (torch.is_grad_enabled() or in_functorch())
        values: list[Tensor] = []
        pushed = _products.jvps(
            flat,
            [_engine.separate(at)],
            0,
            seeds,
            n,
            chunk,
            keep=keep,
            random=random,
            what="direction",
            values=values,
        )
        blocks = [products.reshape(hi - lo, y.numel()) for lo, hi, products in pushed]
        return torch.cat(blocks).to(y.dtype), values[0].detach().to(y.dtype)

    def warn_traced(self, values: list[Tensor]) -> None:
        from ._dropping_traced import warn_if_dropped

        warn_if_dropped(values, _warn_of, getattr(self.f, "__name__", "f"))

    def warn(self) -> None:
        """Say once per differentiation, for each ``f``, that gradients are dropped."""
        session = _state.session()
        key = getattr(self.f, "__code__", self.f)
        if session is not None:
            if key in session.warned:
                return
            session.warned += (key,)
        _warn_of(name_of(self.f))


def _warn_of(name: str) -> None:
    warn(
        f"forwarddiff: {name} depends on tensors besides its argument; their gradients are "
        "dropped. Make them part of x to differentiate by them.",
        DroppedGradientWarning,
    )
