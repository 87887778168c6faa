"""Operators below and beside autograd, and who listens to them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DispatchMode",
    "OpOverload",
    "below_autograd",
    "dynamo_is_loaded",
    "in_tensor_constructor",
    "is_jit_tracing",
    "is_tracing",
    "register_autograd_kernel",
    "schema_of",
    "trace_time",
    "traced_value_of",
    "unchecked_select",
    "uncompiled",
]


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sees every operator below autograd, whoever calls it.

    PyTorch keeps Dynamo out of modes by default, which imports all of Dynamo at the first operator and takes
    more than a second; ``skipped_by_dynamo`` is for when it is there anyway.

    By default Dynamo also marks all code that it meets under a mode as never to be compiled, in later calls
    either. Here it compiles what it meets, out of the mode's sight; :func:`uncompiled` is against that.
    """

    skipped_by_dynamo = False
    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return cls.skipped_by_dynamo

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


def dynamo_is_loaded() -> bool:
    """Whether anything can have been compiled; doesn't import Dynamo, which takes seconds."""
    return "torch._dynamo" in sys.modules


_stance_lock = threading.Lock()
_stances: list[Any] = []  # one entry for each that is inside; the first one knows what was before


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Around calls of a function that others may have compiled: it runs operator by operator, as written.

    The public stance is the whole process's: of several threads the first sets it and the last puts it back.
    Nothing public tells whether Dynamo is about to look at this very frame, where it can't be set.
    """
    if not dynamo_is_loaded() or get_eval_frame_callback() not in (None, False):
        yield
        return
    with _stance_lock:
        _stances.append(_stances[0] if _stances else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _stance_lock:
            stance = _stances.pop()
            if not _stances:
                stance.__exit__(None, None, None)


# One overload of an operator, such as ``aten.add.Tensor``; the class has no public name.
OpOverload: Any = torch._ops.OpOverload


def schema_of(overload: Any) -> Any:
    """The arguments and results of an operator, and which of them it writes into; nothing public tells."""
    return overload._schema


# Whether torch.jit.trace is recording; the public name asks a second question first.
is_jit_tracing: Callable[[], bool] = torch._C._is_tracing


def is_tracing() -> bool:
    """Whether ``make_fx`` (or what is built on it) is tracing: hooks of autograd would be traced away."""
    # Dynamo, which can't trace the question, is no such thing.
    return not torch.compiler.is_dynamo_compiling() and get_proxy_mode() is not None


def trace_time() -> Any:
    """Dynamo's ``comptime``: calls a function while it traces. Imports Dynamo, which takes seconds."""
    from torch._dynamo.comptime import comptime

    return comptime


def traced_value_of(context: Any, name: str) -> Any:
    """The fake tensor that stands for a local variable, in a function called by Dynamo's ``comptime``.

    Dynamo takes ``requires_grad`` of what ``torch.func`` tracks for ``False``; the fake tensor knows better.
    """
    return context.get_local(name).as_fake()


# Around calling an operator whose arguments are known not to be differentiated: it skips the kernels of
# autograd. Operators from outside PyTorch have no public way past them.
below_autograd = torch._C._AutoDispatchBelowAutograd
_libraries: list[Any] = []  # registrations last as long as their library object


def register_autograd_kernel(name: str, check: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Call ``check(name, args)`` before our operator of that name runs where autograd may see it.

    ``torch.library.register_autograd`` refuses operators that write to their arguments. What the operator
    writes to first counts as written.
    """
    overload = getattr(torch.ops.torchzygote, name).default
    library: Any = torch.library.Library("torchzygote", "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)

    def kernel(keyset: Any, *args: Any) -> Any:
        check(name, args)
        with below_autograd():
            result = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        written = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])
        return result

    library.impl(name, kernel, "Autograd", with_keyset=True)


_excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
_PYTHON = torch._C.DispatchKey.Python
_TRANSFORMS = torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode


def in_tensor_constructor() -> bool:
    """Whether ``torch.tensor`` or the like calls this, to fill a tensor with the elements of a sequence.

    They take a sequence apart without asking whether it minds. What tells them from everybody else who reads
    it are the keys that they exclude meanwhile: those of modes, and of transforms.
    """
    return _excluded(_PYTHON) and _excluded(_TRANSFORMS)


def unchecked_select(flat: Any, where: Any) -> Any:
    """``flat[where]`` without a test of each position, which takes compiled code longer than reading it."""
    return torch.ops.aten._unsafe_index.Tensor(flat, [where])
