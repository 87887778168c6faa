"""Which ``torch.func`` transforms are running, and how one is entered and left."""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C_functorch
from torch._functorch import eager_transforms as _eager_transforms
from torch._functorch import pyfunctorch as _pyfunctorch
from torch._functorch import vmap as _vmap
from torch.autograd import forward_ad as _forward_ad

__all__ = [
    "create_grad_input",
    "functorch_depth",
    "grad_level",
    "in_function_mode",
    "in_functorch",
    "in_functorch_compiled",
    "in_functorch_derivative",
    "in_functorch_forward",
    "innermost_level",
    "innermost_transform",
    "jvp_flat",
    "leave_grad_level",
    "load_decompositions",
    "only_pushed",
    "outside_functorch",
    "plain_tensors",
    "transform_stack",
    "vmap_flat",
]

_TRANSFORM_NAMES = {
    _C_functorch.TransformType.Grad: "grad",
    _C_functorch.TransformType.Jvp: "jvp",
    _C_functorch.TransformType.Vmap: "vmap",
    _C_functorch.TransformType.Functionalize: "functionalize",
}
# ``None`` if no ``torch.func`` transform is running: :func:`in_functorch` where each nanosecond is felt.
innermost_level: Callable[[], Any] = _C_functorch.peek_interpreter_stack
# What the public ones of forward_ad call, after they have looked around for what isn't there.
_make_dual: Callable[..., Tensor] = torch._VF._make_dual
_unpack_dual: Callable[..., tuple[Tensor, Tensor | None]] = torch._VF._unpack_dual
_enter_dual_level: Callable[[], int] = torch._C._enter_dual_level
_NO_ARGUMENTS: tuple[tuple[()]] = ((),)


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform (``vmap`` included) is running in this thread.

    PyTorch has no public question for this; the answer decides between the autograd tape and ``torch.func``.
    """
    return _C_functorch.peek_interpreter_stack() is not None


def in_functorch_compiled() -> bool:
    """:func:`in_functorch` as Dynamo can trace it; it takes the other question for a constant."""
    return torch._C._are_functorch_transforms_active()


def in_function_mode() -> bool:
    """Whether anything overrides PyTorch's functions, as a default device does.

    To ask for that device takes 15 microseconds.
    """
    return torch._C._len_torch_function_stack() > 0


def transform_stack() -> list[str]:
    """Names of the running ``torch.func`` transforms, outermost first."""
    stack = _C_functorch.get_interpreter_stack()
    return [] if stack is None else [_TRANSFORM_NAMES.get(level.key(), "other") for level in stack]


def innermost_transform() -> str | None:
    """Name of the innermost running ``torch.func`` transform, or ``None``."""
    level = _C_functorch.peek_interpreter_stack()
    return None if level is None else _TRANSFORM_NAMES.get(level.key(), "other")


def in_functorch_derivative() -> bool:
    """Whether one of the running ``torch.func`` transforms differentiates (``vmap`` alone does not)."""
    return in_functorch() and any(name in ("grad", "jvp") for name in transform_stack())


def in_functorch_forward() -> bool:
    """Whether one of the running ``torch.func`` transforms is forward mode."""
    return in_functorch() and "jvp" in transform_stack()


def only_pushed() -> bool:
    """Whether the running ``torch.func`` transforms differentiate in forward mode only, if at all."""
    stack = transform_stack() if in_functorch() else ()
    return "jvp" in stack and "grad" not in stack


def functorch_depth() -> int:
    """How many ``torch.func`` levels are open: tensors of a higher level were made inside of them."""
    return _C_functorch.maybe_current_level() or 0


@contextlib.contextmanager
def outside_functorch() -> Iterator[None]:
    """Around code that must run as it did at top level, though ``torch.func`` transforms are running.

    A backward pass under ``vmap`` or inside ``torch.func.grad`` recomputes what the tape recorded outside.
    """
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if refused is None and not in_functorch():
        yield
        return
    with _pyfunctorch.temporarily_clear_interpreter_stack():
        if refused is not None:
            torch._C._autograd._saved_tensors_hooks_enable()
        try:
            yield
        finally:
            if refused is not None:
                torch._C._autograd._saved_tensors_hooks_disable(refused, False)


@contextlib.contextmanager
def plain_tensors() -> Iterator[None]:
    """Around making tensors that are kept for later calls, which run elsewhere.

    They are not wrapped by ``torch.func``, nor fake or traced, nor do they refuse to be recorded.
    """
    with outside_functorch(), torch.inference_mode(False), torch._C._DisableTorchDispatch():
        yield


# The phrase by which a checkpoint on the tape knows both refusals.
_NO_HOOKS = (
    "torch.func.{grad, vjp, jacrev, hessian} don't yet support saved tensor hooks, and neither do "
    "derivatives of torchzygote inside a torch.func transform or forward mode: leave out what sets them "
    "around f or inside of it (torch.utils.checkpoint, save_on_cpu); torchzygote.checkpointed works there"
)


@contextlib.contextmanager
def grad_level() -> Iterator[int]:
    """A new ``torch.func`` reverse-mode level.

    ``torch.func.vjp`` is this, but it turns "does not depend on" into zeros; the contract wants ``None``. As
    there, hooks on saved tensors are refused: they get them without their levels, and derivatives are lost.
    """
    with (
        torch.autograd.graph.disable_saved_tensors_hooks(_NO_HOOKS),
        _eager_transforms.grad_increment_nesting() as level,
    ):
        yield level


def create_grad_input(x: Tensor, level: int) -> Tensor:
    """``x`` wrapped for ``level``, requiring grad there."""
    wrapped: Any = _eager_transforms._create_differentiable(_C_functorch._wrap_for_grad(x, level), level)
    return wrapped  # type: ignore[no-any-return]


def leave_grad_level(x: Tensor, level: int) -> Tensor:
    """``x`` as the levels outside ``level`` see it."""
    unwrapped: Any = _eager_transforms._undo_create_differentiable(x, level)
    return unwrapped  # type: ignore[no-any-return]


@functools.cache
def load_decompositions() -> None:
    """What ``torch.func.vmap`` and ``jvp`` load first; PyTorch deprecates a part of itself that this uses.

    Loaded here, once, so that the caller of a derivative doesn't get PyTorch's warning about PyTorch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)  # what it is from 2.14 on
        _vmap.lazy_load_decompositions()  # type: ignore[attr-defined]
        importlib.import_module("torch._decomp.decompositions_for_jvp")


# Below, a level is entered and noted in one call, and left before anything else is called: after each call a
# signal may be handled, whose handler may raise. PyTorch's own functions take several steps.


def vmap_flat(f: Callable[[Tensor], Sequence[Tensor]], rows: Tensor) -> list[Tensor]:
    """``torch.func.vmap(f, randomness="same")(rows)`` for one batched tensor in and a flat sequence out.

    The public function spends 70 microseconds on flattening arguments it doesn't need to flatten here, which
    is a third of a small Jacobian.
    """
    size = rows.shape[0]
    load_decompositions()
    entered: list[int] = []
    try:
        entered.extend(map(_C_functorch._vmap_increment_nesting, (size,), ("same",)))
        level = entered[0]
        outputs = f(_C_functorch._add_batch_dim(rows, 0, level))
        return [_C_functorch._remove_batch_dim(output, level, size, 0) for output in outputs]
    finally:
        if entered:
            _C_functorch._vmap_decrement_nesting()


def jvp_flat(
    f: Callable[..., Sequence[Tensor]], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``torch.func.jvp(f, primals, tangents)`` for tensors in and a flat sequence of tensors out.

    The public function flattens nine times, which is half of what a small function takes.
    """
    entered: list[int] = []
    _eager_transforms.JVP_NESTING += 1
    try:
        entered.extend(itertools.starmap(_C_functorch._jvp_increment_nesting, _NO_ARGUMENTS))
        enabled = torch._C._is_fwd_grad_enabled()
        try:
            torch._C._set_fwd_grad_enabled(True)
            return _jvp_inside(f, primals, tangents, entered[0])
        finally:
            torch._C._set_fwd_grad_enabled(enabled)
    finally:
        _eager_transforms.JVP_NESTING -= 1
        if entered:
            _C_functorch._jvp_decrement_nesting()


def _jvp_inside(
    f: Callable[..., Sequence[Tensor]], primals: Sequence[Tensor], tangents: Sequence[Tensor], level: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """:func:`jvp_flat` inside of its ``torch.func`` level, of which the outermost has a dual level."""
    entered: list[int] = []
    try:
        if _eager_transforms.JVP_NESTING == 1:  # levels inside of it share its dual level
            entered.extend(itertools.starmap(_enter_dual_level, _NO_ARGUMENTS))
            _forward_ad._current_level = entered[0]
        at = _forward_ad._current_level
        duals = [_make_dual(x, xdot, level=at) for x, xdot in zip(primals, tangents, strict=True)]
        pushed = [_unpack_dual(y, level=at) for y in f(*duals)]
        ydots = [torch.zeros_like(y) if ydot is None else ydot for y, ydot in pushed]
        return (
            tuple(_C_functorch._unwrap_for_grad(y, level) for y, _ in pushed),
            tuple(_C_functorch._unwrap_for_grad(ydot, level) for ydot in ydots),
        )
    finally:
        if entered:
            _forward_ad._current_level = entered[0] - 1
            torch._C._exit_dual_level(entered[0])
