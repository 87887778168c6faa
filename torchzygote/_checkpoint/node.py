"""The node that stands for a checkpointed call in the graphs of ``torch.func`` transforms.

Its backward runs the call again, in the surroundings that it had, and pulls back through that. It must be
told everything that the call depends on; how that is found isn't known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._double_backward import pulled_inside
from .._flags import flags_on
from .._memory_layout import separate
from .._torch_private import (
    create_grad_input,
    forward_mode_enabled,
    grad_level,
    has_tangent,
    in_forward_ad,
    innermost_layer,
    innermost_transform,
    is_recorded,
    is_wrapped,
    outside_functorch,
    plain_layer,
    without_rows,
)
from .surroundings import outside_inference

__all__ = ["Rerun", "attach"]


class Rerun:
    """A function of tensors alone, with a tuple of tensors as its value, that does the same whenever it runs.

    ``natural``: position to tensor, of inputs that the function finds by itself, by identity. Whatever is
    given in their place is ignored.
    """

    natural: dict[int, Tensor]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError


def attach(again: Rerun, roots: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The values of ``roots``, which are ``again(*inputs)``, with nothing behind them but that call."""
    cut = _apply(_Cut, *map(separate, roots))  # forward mode can't give expanded tensors a tangent
    return _apply(_Attached, again, len(roots), *cut, *inputs)


def _apply(function: Any, *operands: Any) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = function.apply(*operands)
    return found


def _are_dual(xs: Sequence[Tensor]) -> bool:
    """Whether there are plain dual numbers among them; a custom function runs with forward mode off."""
    if not in_forward_ad():
        return False
    with forward_mode_enabled():
        return any(map(has_tangent, xs))


class _Cut(torch.autograd.Function):
    """The identity, without the graphs of reverse mode at any level, with the tangents of forward mode."""

    derivative_of_forward = True

    @staticmethod
    def forward(*ys: Tensor) -> tuple[Tensor, ...]:
        return ys

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        # Each level comes by here; one of forward mode records no graph, and would lose its tangents.
        transform = innermost_transform()
        if transform != "jvp" and not (transform is None and _are_dual(inputs)):
            ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (None,) * len(cotangents)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        # Views, as the values are: plain forward mode wants that.
        return tuple(None if t is None else t.view_as(t) for t in tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *ys: Tensor) -> Any:
        return _apply(_Cut, *map(separate, ys)), in_dims


class _Attached(torch.autograd.Function):
    """``_Attached.apply(again, count, *ys, *inputs)`` is ``ys``, of which there are ``count``.

    Backward runs ``ys = again(*inputs)`` once more. In forward mode the ``ys`` bring their own tangents.
    """

    derivative_of_forward = True
    torchzygote_composes = True

    @staticmethod
    def forward(again: Rerun, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Not the inputs themselves: what a custom function returns of its inputs can't be written in place.
        return tuple(y.clone() for y in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        again, count, *tensors = inputs
        ctx.again = again
        ctx.count = count
        ctx.forms = [(y.shape, y.dtype, y.device) for y in output]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])

    @staticmethod
    def jvp(ctx: Any, again: None, count: None, *tangents: Any) -> Any:
        # What doesn't depend on anything pushed has no tangent, and PyTorch wants one.
        one = next(tangent for tangent in tangents if tangent is not None)
        return tuple(
            one.new_zeros(shape, dtype=dtype, device=device) if tangent is None else tangent
            for tangent, (shape, dtype, device) in zip(tangents, ctx.forms, strict=False)
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        inputs = ctx.saved_tensors
        first = 2 + ctx.count
        needed = [i for i, need in enumerate(ctx.needs_input_grad[first:]) if need]
        present = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        results: list[Tensor | None] = [None] * (first + len(inputs))
        if needed and present:
            pullback = _Pullback(ctx.again, inputs, needed, present)
            grads = pullback.once(inputs, [cotangents[i] for i in present])
            for i, grad in zip(pullback.found, grads, strict=True):
                results[first + i] = grad
        return tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: Any, again: Rerun, count: int, *tensors: Tensor) -> Any:
        dims = in_dims[2:]
        batched = _Batched(again, info.batch_size, info.randomness, dims[count:], dims[:count])
        return _apply(_Attached, batched, count, *tensors), dims[:count]


class _Batched(Rerun):
    """A rerun under one level of ``vmap``, as a rerun itself."""

    def __init__(self, again: Rerun, size: int, randomness: str, in_dims: Any, out_dims: Any) -> None:
        self.natural = again.natural
        self._size = size
        # One more argument, because vmap wants something batched, and f may be batched by its random numbers.
        self._mapped = torch.func.vmap(
            lambda _, *tensors: again(*tensors),
            in_dims=(0, *in_dims),
            out_dims=tuple(out_dims),
            randomness=randomness,
        )

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        device = tensors[0].device if tensors else None
        results: tuple[Tensor, ...] = self._mapped(torch.empty(self._size, 0, device=device), *tensors)
        return results


class _Pullback(Rerun):
    """Inputs and cotangents to gradients: the backward pass of a rerun, as a rerun itself.

    So a backward pass that is differentiated in its turn stores nothing of its inside either.
    """

    def __init__(self, again: Rerun, inputs: Sequence[Tensor], needed: list[int], present: list[int]) -> None:
        self._again = again
        self._count = len(inputs)
        self._needed = needed
        self._present = present
        # What a level of torch.func records it has wrapped, and wrapped it stays as the level ends.
        self._taped = not any(is_wrapped(inputs[i]) for i in needed)
        self.natural = again.natural
        self.found: list[int] = []

    def once(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients by those inputs that need one and have one (``found``), differentiable in turn."""
        inputs = [innermost_layer(x) for x in inputs]
        keep = not self._taped or torch.is_grad_enabled()
        grads = self._pull([x.detach() for x in inputs] if self._taped else inputs, cotangents, keep)
        self.found = [i for i, grad in zip(self._needed, grads, strict=True) if grad is not None]
        found = [grad for grad in grads if grad is not None]
        if keep and any(is_recorded(grad) for grad in found):
            return attach(self, found, [*inputs, *cotangents])
        return found

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, cotangents = tensors[: self._count], tensors[self._count :]
        grads = self._pull(inputs, cotangents, True)
        by_input = dict(zip(self._needed, grads, strict=True))
        return tuple(
            torch.zeros_like(inputs[i]) if (grad := by_input[i]) is None else grad for i in self.found
        )

    def _pull(
        self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor | None]:
        """One more run, pulled back."""
        # An implicit call may have held the flags of what is found here, and be over.
        with flags_on(list(self.natural.values())):
            if self._taped:
                return self._on_tape(inputs, cotangents, keep)
            return self._in_level(inputs, cotangents)

    def _on_tape(
        self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor | None]:
        """By leaves without a past, lest a gradient by one input contain the way through another."""
        with outside_functorch(), outside_inference(), torch.enable_grad():
            # A level that differentiates by a cotangent has wrapped the inputs too; it doesn't record them.
            inputs = [plain_layer(x) for x in inputs]
            for i in self._needed:
                if not inputs[i].requires_grad:
                    inputs[i] = inputs[i].detach().requires_grad_()
            ys = self._again(*inputs)
        by = [self.natural.get(i, inputs[i]) for i in self._needed]
        return self._grad(ys, by, cotangents, keep)

    def _in_level(self, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        with torch.enable_grad():
            with without_rows(inputs), grad_level() as level:
                twins = list(inputs)
                for i in self._needed:
                    twins[i] = create_grad_input(inputs[i], level)
                ys = self._again(*twins)
            # create_graph, because no recording here would be no recording in the levels below
            return self._grad(ys, [twins[i] for i in self._needed], cotangents, True)

    def _grad(
        self, ys: Sequence[Tensor], by: Sequence[Tensor], cotangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor | None]:
        roots = [(ys[i], c) for i, c in zip(self._present, cotangents, strict=True) if ys[i].requires_grad]
        if not roots:
            return [None] * len(by)
        return pulled_inside([y for y, _ in roots], [c for _, c in roots], by, keep)
