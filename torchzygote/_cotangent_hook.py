"""An identity whose backward pass calls a function: on the tape, in ``torch.func`` transforms, on structures.

Knows nothing of what the function is for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _state
from ._arguments import STRUCTURE, is_inexact, kind_of, name_of, type_name
from ._buffer.refusal import NotATensor
from ._hidden_derivatives import out_of_sight
from ._structure_matching import parts_for
from ._torch_private import (
    functorch_depth,
    innermost_level,
    is_recorded,
    only_pushed,
    outside_functorch,
    plain_value,
    put_rows_back,
    pytree,
    rebuilt,
    refuse_writes,
    take_rows_off,
    unwrapped_if_ended,
)
from .graddict import GradDict
from .params import finds_parameters

__all__ = ["attach", "fitted", "leaves_of", "refuse_holders"]

Gradients = Sequence["Tensor | None"]


class GradientSpec(NamedTuple):
    """What a gradient must be like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def fitted(fn: Callable[..., Any], out: Any, like: Tensor | GradientSpec, shape: torch.Size) -> Tensor:
    """What ``fn`` returned, if it can stand for a gradient like ``like`` of this shape."""
    if not isinstance(out, Tensor):
        raise TypeError(
            f"hook: expected {name_of(fn)} to return a tensor, or None to leave the gradient as it is, "
            f"got {type_name(out)}"
        )
    if out.shape != shape:
        raise ValueError(
            f"hook: expected {name_of(fn)} to return a gradient of the shape that it got, {tuple(shape)}, "
            f"got shape {tuple(out.shape)}"
        )
    if out.device != like.device:
        raise ValueError(
            f"hook: expected {name_of(fn)} to return a gradient on {like.device}, got one on {out.device}"
        )
    if out.dtype == like.dtype:
        return out
    if out.dtype.is_complex and not like.dtype.is_complex:
        raise ValueError(
            f"hook: expected {name_of(fn)} to return a real gradient of dtype {like.dtype}, got {out.dtype}"
        )
    return out.to(like.dtype)


def leaves_of(fn: Callable[..., Any], out: Any, like: Any) -> list[Any]:
    """The leaves of what ``fn`` returned, in the order of the spec ``like``, whose structure it must have."""
    leaves, spec = pytree.tree_flatten(out)
    if spec == like:
        return leaves
    if not torch.compiler.is_compiling():
        with contextlib.suppress(ValueError):  # a dict may have its keys in another order
            return parts_for(rebuilt(range(like.num_leaves), like), out, "")
    raise ValueError(
        f"hook: expected {name_of(fn)} to return the structure that it got, {_shown(like)}, got "
        f"{_shown(spec)}"
    )


def _shown(spec: Any) -> str:
    """A structure as one writes it, with stars for its leaves."""
    if not torch.compiler.is_compiling():
        with contextlib.suppress(Exception):  # a type of the user's may want tensors
            return repr(rebuilt([_STAR] * spec.num_leaves, spec))
    return " ".join(str(spec).split())


class _Star:
    def __repr__(self) -> str:
        return "*"


_STAR = _Star()


class _InTransforms(TorchFunctionMode):
    """Inside ``torch.func`` transforms tensors print their values, without wrappers.

    What ``fn`` closes over may come from several transforms that have ended meanwhile.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__repr__ or func is Tensor.__format__:
            with outside_functorch():
                return func(plain_value(args[0]), *args[1:], **(kwargs or {}))
        args, kwargs = pytree.tree_map_only(Tensor, unwrapped_if_ended, (args, kwargs or {}))
        return func(*args, **kwargs)


def _of_no_graph(gradient: Any) -> NoReturn:
    raise RuntimeError(
        "hook: the derivative that this copy was made in is over, and has kept no graph to pull back "
        "through; create_graph=True keeps it"
    )


class Bend:
    """One call of :func:`attach`: what happens to the gradients of its copy.

    Called by autograd with the gradients of one tensor, as a pre-hook of the node that copied it.
    """

    __slots__ = ("__weakref__", "arrived", "fn", "held", "like", "looks", "session", "slots", "spec")

    def __init__(self, fn: Callable[..., Any], looks: bool) -> None:
        self.fn = fn
        self.looks = looks
        self.arrived = False
        self.session = _state.session()
        self.held = None if self.session is None else self.session.held
        # Of a structure; where its tensors are among the leaves, and what those are like.
        self.spec: Any = None
        self.slots: list[int] = []
        self.like: list[GradientSpec] = []

    def arrive(self) -> None:
        """A gradient is here."""
        if not self.arrived:
            self.arrived = True
            if self.held is not None:
                self.held.add(self)

    def release(self) -> None:
        """The graph that this is part of is dropped; ``fn`` may hold it."""
        self.fn = _of_no_graph

    def report(self) -> None:
        """Called as the outermost differentiation ends."""
        if not self.arrived:
            with contextlib.suppress(TypeError, AttributeError):  # fn expects a gradient, and there was none
                self.fn(None)

    def given(self, g: Tensor) -> Tensor:
        """What ``fn`` gets: a copy, unless it only looks, as others' gradients may be the same tensor."""
        return g if self.looks else g.clone()

    def __call__(self, gradients: tuple[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        g = gradients[0]
        if g is None:
            return None
        if innermost_level() is not None or (self.session is not None and self.session.forward):
            bent = self.bend(gradients, 0)
            return None if bent is None else tuple(bent)
        self.arrive()
        out = self.fn(self.given(g))
        if out is None:
            return None
        return (fitted(self.fn, out, g, g.shape),)

    def bend(self, gradients: Gradients, depth: int) -> list[Tensor | None] | None:
        """What ``fn`` makes of the gradients; ``None`` leaves them as they are.

        ``depth``: how many ``torch.func`` levels are outside of the graph that is pulled back. A ``vmap``
        beyond them holds rows, which ``fn`` sees as an axis.
        """
        if self.session is not None and self.session.forward:
            return None
        if any(g is not None for g in gradients):
            self.arrive()
        found, taken = take_rows_off(gradients, depth)
        bent: list[Tensor | None] | None = None
        sizes = tuple(size for _, _, size in reversed(taken))
        try:
            if innermost_level() is None:
                bent = self.apply(found, sizes)
            else:
                with _InTransforms():
                    bent = self.apply(found, sizes)
        finally:
            back = put_rows_back(bent or [], taken)
        return None if bent is None else back

    def apply(self, gradients: Gradients, rows: tuple[int, ...] = ()) -> list[Tensor | None] | None:
        """Call ``fn`` with the gradients as a whole, whose first axes count ``rows``."""
        if self.spec is None:
            (g,) = gradients
            if g is None:
                return None
            out = self.fn(self.given(g))
            return None if out is None else [fitted(self.fn, out, g, g.shape)]
        whole: list[Any] = [None] * self.spec.num_leaves
        for slot, g in zip(self.slots, gradients, strict=True):
            whole[slot] = None if g is None else self.given(g)
        out = self.fn(rebuilt(whole, self.spec))
        if out is None:
            return None
        leaves = leaves_of(self.fn, out, self.spec)
        bent: list[Tensor | None] = []
        for slot, g, like in zip(self.slots, gradients, self.like, strict=True):
            new = leaves[slot]
            shape = torch.Size([*rows, *like.shape])
            bent.append(g if new is None else fitted(self.fn, new, like, shape))
        return bent

    def waits(self, tensors: Sequence[Tensor]) -> None:
        """Have it reported if nothing arrives; forward mode alone brings nothing, and reports nothing."""
        if not _state.deriving():
            return
        if only_pushed() and not any(map(is_recorded, tensors)):
            return
        _state.at_end(self.report)


class _OfExample(Bend):
    """Stands for a :class:`Bend` outside a ``vmap`` that it was in: ``fn`` gets one example at a time."""

    __slots__ = ("inner", "randomness")

    def __init__(self, inner: Bend, randomness: str) -> None:
        super().__init__(inner.fn, inner.looks)
        self.inner = inner
        self.randomness = randomness
        self.session = inner.session

    def bend(self, gradients: Gradients, depth: int) -> list[Tensor | None] | None:
        if any(g is not None for g in gradients):
            self.inner.arrive()
        return super().bend(gradients, depth)

    def apply(self, gradients: Gradients, rows: tuple[int, ...] = ()) -> list[Tensor | None] | None:
        present = [i for i, g in enumerate(gradients) if g is not None]
        kept: list[int] = []
        # The batch axis of the examples comes after those of the rows.
        axis = len(rows)

        def of_one(*parts: Tensor) -> tuple[Tensor, ...]:
            whole: list[Tensor | None] = [None] * len(gradients)
            for i, part in zip(present, parts, strict=True):
                whole[i] = part
            bent = whole if (out := self.inner.apply(whole, rows)) is None else out
            kept[:] = [i for i, g in enumerate(bent) if g is not None]
            return tuple(g for g in bent if g is not None)

        if not present:
            return None
        with _InTransforms():
            outputs = torch.func.vmap(of_one, in_dims=axis, out_dims=axis, randomness=self.randomness)(
                *[g for g in gradients if g is not None]
            )
        found: list[Tensor | None] = [None] * len(gradients)
        for i, output in zip(kept, outputs, strict=True):
            found[i] = output
        return found


class _Bent(torch.autograd.Function):
    """The identity of several tensors; their gradients are bent together."""

    torchzygote_composes = True

    @staticmethod
    def forward(bend: Bend, *tensors: Tensor) -> Any:
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.bend = inputs[0]
        ctx.depth = max(0, functorch_depth() - 1)
        ctx.specs = [GradientSpec(x.shape, x.dtype, x.device) for x in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        bent = ctx.bend.bend(gradients, ctx.depth)
        return (None, *(gradients if bent is None else bent))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        # Views only: PyTorch drops the derivative of anything else that is made here, in nested forward mode.
        # It takes no None; the derivative of zeros is no loss.
        return tuple(
            torch.zeros(spec.shape, dtype=spec.dtype, device=spec.device) if t is None else t.view_as(t)
            for t, spec in zip(tangents, ctx.specs, strict=True)
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], bend: Bend, *tensors: Tensor) -> Any:
        # Copies: forward mode refuses elements that share memory.
        examples = [
            x.expand(info.batch_size, *x.shape).clone() if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        outside = _OfExample(bend, info.randomness)
        copies = _Bent.apply(outside, *examples)  # type: ignore[no-untyped-call]
        return copies, (0,) * len(tensors)


def _copy(x: Tensor) -> Tensor:
    if x.layout is not torch.strided:
        return x.clone()
    y = x.view_as(x)
    refuse_writes(y)
    return y


def attach(caller: str, fn: Callable[..., Any], x: Any, *, looks: bool = False) -> Any:
    """A copy of ``x`` (the memory is shared) whose gradient goes through ``fn``.

    ``looks``: ``fn`` writes into no gradient and keeps none, and may have it without a copy.
    """
    out_of_sight(caller)
    if isinstance(x, Tensor):
        bend = Bend(fn, looks)
        if innermost_level() is None:
            if _state.deriving():
                _state.at_end(bend.report)
            if not x.requires_grad or not torch.is_grad_enabled():
                return x
            y = _copy(x)
            y.grad_fn.register_prehook(bend)  # type: ignore[union-attr]
            return y
        return _attach_all(bend, [x])[0]
    leaves: list[Any] = []
    bend = Bend(fn, looks)
    if kind_of(x) is STRUCTURE:
        leaves, bend.spec = pytree.tree_flatten(x)
    refuse_holders(caller, [x, *leaves])
    bend.slots = [i for i, leaf in enumerate(leaves) if is_inexact(leaf)]
    if not bend.slots:
        bend.waits([])
        return x
    tensors = [leaves[i] for i in bend.slots]
    for i, y in zip(bend.slots, _attach_all(bend, tensors), strict=True):
        leaves[i] = y
    return rebuilt(leaves, bend.spec)


def refuse_holders(caller: str, leaves: list[Any]) -> None:
    """What holds tensors without being a structure would pass untouched, their gradients as they are."""
    for leaf in leaves:
        if isinstance(leaf, NotATensor):
            held, advice = "elements", "its copy(), or what is written into it"
        elif isinstance(leaf, GradDict):
            held, advice = "values", "list(gs.values())"
        elif finds_parameters(leaf):
            held, advice = "parameters", "what is computed with them, or their gradients to fn afterwards"
        else:
            continue
        raise TypeError(
            f"{caller}: x: expected a tensor or a structure of tensors, got a {type_name(leaf)}, whose "
            f"{held} have gradients of their own; give {advice}"
        )


def _attach_all(bend: Bend, tensors: list[Tensor]) -> Sequence[Tensor]:
    bend.waits(tensors)
    if innermost_level() is None and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return tensors
    if not all(is_inexact(x) for x in tensors):
        return tensors
    # A level of torch.func doesn't see that its tensor is a view: a write into the other would go unnoticed.
    if innermost_level() is not None:
        tensors = [x.clone() for x in tensors]
    bend.like = [GradientSpec(x.shape, x.dtype, x.device) for x in tensors]
    copies: Sequence[Tensor] = _Bent.apply(bend, *tensors)  # type: ignore[no-untyped-call]
    return copies
