"""Every private PyTorch API that torchzygote uses, each with the reason why nothing public does.

The rest of the package imports from here, so that a new PyTorch release has one file to be checked against.
This module knows nothing of gradients, arguments or results.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C_functorch
from torch._functorch import eager_transforms as _eager_transforms
from torch._functorch import vmap as _vmap
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad as _forward_ad
from torch.multiprocessing.reductions import StorageWeakRef as WeakStorage  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree  # the registry that torch.func itself flattens with
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode


@functools.cache
def load_decompositions() -> None:
    """What ``torch.func.vmap`` and ``jvp`` load first; PyTorch deprecates a part of itself that this uses.

    Loaded here, once, so that the caller of a derivative doesn't get PyTorch's warning about PyTorch.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _vmap.lazy_load_decompositions()  # type: ignore[attr-defined]
        importlib.import_module("torch._decomp.decompositions_for_jvp")


__all__ = [
    "DispatchMode",
    "WeakStorage",
    "backward_bytes",
    "create_grad_input",
    "custom_nodes",
    "grad_level",
    "in_forward_ad",
    "in_functorch",
    "in_functorch_derivative",
    "innermost_transform",
    "is_wrapped",
    "leave_grad_level",
    "load_decompositions",
    "node_attribute",
    "node_shape",
    "pytree",
    "source_of",
    "storage_key",
    "swap_tensors",
    "transform_stack",
    "vmap_flat",
]

_TRANSFORM_NAMES = {
    _C_functorch.TransformType.Grad: "grad",
    _C_functorch.TransformType.Jvp: "jvp",
    _C_functorch.TransformType.Vmap: "vmap",
    _C_functorch.TransformType.Functionalize: "functionalize",
}


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform (``vmap`` included) is running in this thread.

    PyTorch has no public question for this; the answer decides between the autograd tape and ``torch.func``.
    """
    return _C_functorch.peek_interpreter_stack() is not None


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


def in_forward_ad() -> bool:
    """Whether a level of ``torch.autograd.forward_ad`` is open: dual tensors may be about."""
    return _forward_ad._current_level >= 0


def is_wrapped(x: Tensor) -> bool:
    """Whether ``x`` is a wrapper of a ``torch.func`` transform (batched, grad-tracking or functional)."""
    return bool(_C_functorch.is_functorch_wrapped_tensor(x))


@contextlib.contextmanager
def grad_level() -> Iterator[int]:
    """A new ``torch.func`` reverse-mode level.

    ``torch.func.vjp`` is this, but it turns "does not depend on" into zeros; the contract wants ``None``.
    """
    with _eager_transforms.grad_increment_nesting() as level:
        yield level


def create_grad_input(x: Tensor, level: int) -> Tensor:
    """``x`` wrapped for ``level``, requiring grad there."""
    wrapped: Any = _eager_transforms._create_differentiable(_C_functorch._wrap_for_grad(x, level), level)
    return wrapped  # type: ignore[no-any-return]


def leave_grad_level(x: Tensor, level: int) -> Tensor:
    """``x`` as the levels outside ``level`` see it."""
    unwrapped: Any = _eager_transforms._undo_create_differentiable(x, level)
    return unwrapped  # type: ignore[no-any-return]


def vmap_flat(f: Callable[[Tensor], Sequence[Tensor]], rows: Tensor) -> list[Tensor]:
    """``torch.func.vmap(f, randomness="same")(rows)`` for one batched tensor in and a flat sequence out.

    The public function spends 70 microseconds on flattening arguments it doesn't need to flatten here, which
    is a third of a small Jacobian.
    """
    size = rows.shape[0]
    load_decompositions()
    level = _C_functorch._vmap_increment_nesting(size, "same")
    try:
        outputs = f(_C_functorch._add_batch_dim(rows, 0, level))
        return [_C_functorch._remove_batch_dim(output, level, size, 0) for output in outputs]
    finally:
        _C_functorch._vmap_decrement_nesting()


def forward_mode_active() -> bool:
    """Whether a forward-AD level is open, so that any tensor may have a tangent; nothing public tells."""
    return _forward_ad._current_level >= 0


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is a dual number of the running forward mode, ``torch.func.jvp`` included.

    ``torch.autograd.forward_ad.unpack_dual`` answers only where it opened the level itself.
    """
    if isinstance(x, FakeTensor):
        return False
    return torch._VF._unpack_dual(x, level=0)[1] is not None


# Around calling an operator whose arguments are known not to be differentiated: it skips the kernels of
# autograd. Operators from outside PyTorch have no public way past them.
below_autograd = torch._C._AutoDispatchBelowAutograd


def register_autograd_kernel(
    namespace: str, name: str, check: Callable[[str, tuple[Any, ...]], None]
) -> None:
    """Call ``check(name, args)`` before the operator runs where autograd may see it.

    ``torch.library.register_autograd`` refuses operators that write to their arguments. What the operator
    writes to first counts as written.
    """
    overload = getattr(getattr(torch.ops, namespace), name).default
    library: Any = torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]
    _libraries.append(library)

    def kernel(keyset: Any, *args: Any) -> Any:
        check(name, args)
        with below_autograd():
            result = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        written = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        torch.autograd.graph.increment_version([x for x in written if not x.is_inference()])
        return result

    library.impl(name, kernel, "Autograd", with_keyset=True)


_libraries: list[Any] = []  # registrations last as long as their library object


def swap_tensors(a: Tensor, b: Tensor) -> None:
    """Exchange what two tensor objects hold, so that every holder of ``a`` sees what ``b`` was.

    The only way to differentiate by a tensor that ``f`` closes over inside a ``torch.func`` transform: a mode
    that replaces it misses ``autograd.Function.apply`` and ``vmap(f)(w)``. ``torch.utils.swap_tensors``
    refuses tensors that somebody else holds, which is the very case here.
    """
    torch._C._swap_tensor_impl(a, b)


def custom_nodes(roots: list[Tensor]) -> list[Any]:
    """The nodes below ``roots`` that are not PyTorch's own: Python and C++ autograd functions.

    Their backward need not be differentiable by its cotangent, and may say so by silence.
    """
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    found: list[Any] = []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction) or "CppNode" in node.name():
            found.append(node)
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return found


def source_of(x: Tensor) -> tuple[Any, int]:
    """The node of the graph that stands for ``x``, and which of its outputs ``x`` is."""
    edge = torch.autograd.graph.get_gradient_edge(x)
    return edge.node, edge.output_nr


def node_shape(node: Any, output: int) -> tuple[int, ...]:
    """Shape of an output of a node of the recorded graph; nothing public tells it."""
    return tuple(node._input_metadata[output].shape)


def node_attribute(node: Any, name: str) -> Any:
    """What a node saved besides tensors (a ``dim``, a shape); ``None`` where it has no such thing."""
    return getattr(node, name, None)


def backward_bytes(roots: list[Tensor], most_nodes: int = 20_000) -> int:
    """Bytes of all gradients that one backward pass from ``roots`` makes.

    Read off the recorded graph (``_input_metadata``), without running it: an upper bound of what one row of a
    Jacobian needs while its rows are batched.
    """
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    total = 0
    while stack and len(seen) < most_nodes:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for meta in node._input_metadata:
            total += math.prod(meta.shape) * meta.dtype.itemsize
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return total


def storage_key(x: Tensor) -> int:
    """A number that names the memory of ``x`` as long as somebody holds it; 0 where there is none.

    No public name tells whether two tensors share memory when one of them has no elements, or has been freed.
    """
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts, wrappers
        return 0
