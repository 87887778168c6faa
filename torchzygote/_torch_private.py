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
from torch._functorch import pyfunctorch as _pyfunctorch
from torch._functorch import vmap as _vmap
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad as _forward_ad
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _foreach_utils
from torch.utils import _pytree as pytree  # the registry that torch.func itself flattens with
from torch.utils._python_dispatch import TorchDispatchMode


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
    "backward_bytes",
    "backward_pass",
    "batched_everywhere",
    "concrete",
    "create_grad_input",
    "custom_nodes",
    "functorch_depth",
    "grad_level",
    "group_by_device_and_dtype",
    "in_forward_ad",
    "in_functorch",
    "in_functorch_compiled",
    "in_functorch_derivative",
    "in_plain_eager",
    "innermost_layer",
    "innermost_level",
    "innermost_transform",
    "is_tracing",
    "is_wrapped",
    "layer_below",
    "layers",
    "leave_grad_level",
    "load_decompositions",
    "maybe_batch_axis",
    "no_torch_function",
    "node_attribute",
    "node_names",
    "node_shape",
    "outside_functorch",
    "plain_layer",
    "plain_value",
    "put_rows_back",
    "pytree",
    "reaches",
    "saved_tensors_hooks",
    "sequence_number",
    "source_of",
    "storage_key",
    "swap_tensors",
    "take_rows_off",
    "trace_time",
    "traced_value_of",
    "transform_stack",
    "vmap_flat",
    "weak_storage",
]

_TRANSFORM_NAMES = {
    _C_functorch.TransformType.Grad: "grad",
    _C_functorch.TransformType.Jvp: "jvp",
    _C_functorch.TransformType.Vmap: "vmap",
    _C_functorch.TransformType.Functionalize: "functionalize",
}


# A subclass with this as its ``__torch_function__`` is a plain tensor to everything that is computed from it.
no_torch_function: Callable[..., Any] = torch._C._disabled_torch_function_impl
# ``None`` if no ``torch.func`` transform is running: :func:`in_functorch` where each nanosecond is felt.
innermost_level: Callable[[], Any] = _C_functorch.peek_interpreter_stack


def in_functorch() -> bool:
    """Whether a ``torch.func`` transform (``vmap`` included) is running in this thread.

    PyTorch has no public question for this; the answer decides between the autograd tape and ``torch.func``.
    """
    return _C_functorch.peek_interpreter_stack() is not None


def in_functorch_compiled() -> bool:
    """:func:`in_functorch` as Dynamo can trace it; it takes the other question for a constant."""
    return torch._C._are_functorch_transforms_active()


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


def functorch_depth() -> int:
    """How many ``torch.func`` levels are open: tensors of a higher level were made inside of them."""
    return _C_functorch.maybe_current_level() or 0


def layers(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """What each open ``torch.func`` level sees of ``x``, innermost first; level 0 is plain PyTorch.

    Each level records a graph of its own; nothing public shows but the innermost.
    """
    x = _C_functorch.unwrap_if_dead(x)
    while _C_functorch.is_functorch_wrapped_tensor(x):
        yield _C_functorch.maybe_get_level(x), x
        x = _C_functorch.unwrap_if_dead(_C_functorch.get_unwrapped(x))
    yield 0, x


def innermost_layer(x: Tensor) -> Tensor:
    """``x`` as the innermost level that is still open sees it."""
    return next(layers(x))[1]


def plain_layer(x: Tensor) -> Tensor:
    """``x`` as plain PyTorch sees it, outside of all ``torch.func`` levels."""
    return [layer for _, layer in layers(x)][-1]


def layer_below(x: Tensor) -> Tensor:
    """What the level below the one that made the wrapper ``x`` sees of it."""
    return _C_functorch.get_unwrapped(x)


def maybe_batch_axis(x: Tensor) -> int | None:
    """The axis of what ``x`` wraps that holds the examples; ``None`` if ``x`` is no batched tensor."""
    return _C_functorch.maybe_get_bdim(x) if _C_functorch.is_batchedtensor(x) else None


def trace_time() -> Any:
    """Dynamo's ``comptime``: calls a function while it traces. Imports Dynamo, which takes seconds."""
    from torch._dynamo.comptime import comptime

    return comptime


def traced_value_of(context: Any, name: str) -> Any:
    """The fake tensor that stands for a local variable, in a function called by Dynamo's ``comptime``.

    Dynamo takes ``requires_grad`` of what ``torch.func`` tracks for ``False``; the fake tensor knows better.
    """
    return context.get_local(name).as_fake()


def plain_value(x: Tensor) -> Tensor:
    """The values of ``x`` without graphs and wrappers, to be shown; batch axes first, outermost first."""
    x = _C_functorch.unwrap_if_dead(x)
    while _C_functorch.is_functorch_wrapped_tensor(x):
        inner = _C_functorch.get_unwrapped(x)
        if _C_functorch.is_batchedtensor(x):
            inner = inner.movedim(_C_functorch.maybe_get_bdim(x), 0)
        x = _C_functorch.unwrap_if_dead(inner)
    return x.detach()


def take_rows_off(
    tensors: Sequence[Tensor | None], depth: int
) -> tuple[list[Tensor | None], list[tuple[Any, int, int]]]:
    """Leave the ``vmap`` levels opened since there were ``depth``; their axes come first, outermost first.

    Nothing public shows a batched tensor whole. :func:`put_rows_back` enters the levels again.
    """
    found = list(tensors)
    taken: list[tuple[Any, int, int]] = []
    while True:
        top = _C_functorch.peek_interpreter_stack()
        if top is None or top.level() <= depth or top.key() != _C_functorch.TransformType.Vmap:
            return found, taken
        level, size = top.level(), _C_functorch.CVmapInterpreterPtr(top).batchSize()
        found = [None if x is None else _C_functorch._remove_batch_dim(x, level, size, 0) for x in found]
        taken.append((_C_functorch.pop_dynamic_layer_stack(), level, size))


def put_rows_back(tensors: Sequence[Tensor | None], taken: list[tuple[Any, int, int]]) -> list[Tensor | None]:
    """Enter the levels that :func:`take_rows_off` left; the first axis of each tensor becomes theirs."""
    found = list(tensors)
    for layer, level, _ in reversed(taken):
        _C_functorch.push_dynamic_layer_stack(layer)
        found = [None if x is None else _C_functorch._add_batch_dim(x, 0, level) for x in found]
    return found


def sequence_number() -> int:
    """The number of the next node that autograd records in this thread: what is older was there before."""
    return int(torch._C._autograd._get_sequence_nr())


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


def backward_pass() -> int:
    """A number for the backward pass that this thread is in; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def saved_tensors_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """The pack and unpack hooks in force; a pair that calls them can then be put on top of them.

    ``torch.utils.checkpoint`` keeps its own to itself.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks  # type: ignore[no-any-return]


def is_tracing() -> bool:
    """Whether ``make_fx`` (or what is built on it) is tracing: hooks of autograd would be traced away."""
    return get_proxy_mode() is not None


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


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is a dual number of the running forward mode, ``torch.func.jvp`` included.

    ``torch.autograd.forward_ad.unpack_dual`` answers only where it opened the level itself.
    """
    if isinstance(x, FakeTensor):
        return False
    return torch._VF._unpack_dual(x, level=0)[1] is not None


def primal(x: Tensor) -> Tensor:
    """``x`` without its tangent of the innermost forward mode; as in :func:`has_tangent`."""
    value: Tensor = torch._VF._unpack_dual(x, level=0)[0]
    return value


# Around the ``jvp`` of a custom function, which PyTorch runs with forward mode off, at all levels.
forward_mode_enabled = functools.partial(_forward_ad._set_fwd_grad_enabled, True)


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


def group_by_device_and_dtype(xs: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each device and dtype, in the order in which ``torch.nn.utils`` takes them.

    Its order of the groups, a hash map's, decides the last bits of a norm over several dtypes.
    """
    groups: Any = _foreach_utils._group_tensors_by_device_and_dtype([list(xs)])
    return [lists[0] for lists, _ in groups.values()]


def in_plain_eager() -> bool:
    """Whether PyTorch runs operations right away and on plain memory: no transform, mode or dual level.

    There are no public questions for these; the answer decides whether a Buffer may write in place.
    """
    return not in_functorch() and torch._C._len_torch_dispatch_stack() == 0 and not in_forward_ad()


def batched_everywhere(x: Tensor) -> bool:
    """Whether ``x`` has a batch axis in each running ``vmap``; writing in place into it is then allowed."""
    stack = _C_functorch.get_interpreter_stack() or []
    levels = {level.level() for level in stack if level.key() == _C_functorch.TransformType.Vmap}
    return not levels or levels <= {n for n, layer in layers(x) if _C_functorch.is_batchedtensor(layer)}


def concrete(x: Tensor) -> Tensor | None:
    """The plain tensor of indices in ``x``, the same for all examples; ``None`` where there is none.

    Indices carry no derivative, so that the wrappers of differentiating transforms can be taken off.
    """
    if torch._C._len_torch_dispatch_stack() != 0:
        return None  # a tracer records what is done with x
    for level, layer in layers(x):
        if level and not _C_functorch.is_gradtrackingtensor(layer):
            return None
        x = layer
    return x if type(x) in (Tensor, torch.nn.Parameter) else None


def swap_tensors(a: Tensor, b: Tensor) -> None:
    """Exchange what two tensor objects hold, so that every holder of ``a`` sees what ``b`` was.

    The only way to differentiate by a tensor that ``f`` closes over inside a ``torch.func`` transform: a mode
    that replaces it misses ``autograd.Function.apply`` and ``vmap(f)(w)``. ``torch.utils.swap_tensors``
    refuses tensors that somebody else holds, which is the very case here.
    """
    torch._C._swap_tensor_impl(a, b)


def custom_nodes(roots: list[Tensor]) -> list[Any]:
    """The nodes below ``roots`` that are not PyTorch's own: Python and C++ autograd functions.

    Their backward need not be differentiable by its cotangent, and may say so by silence. Those of this
    package, which are, say so by a class attribute ``torchzygote_composes``.
    """
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    found: list[Any] = []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            if not getattr(node._forward_cls, "torchzygote_composes", False):  # type: ignore[attr-defined]
                found.append(node)
        elif "CppNode" in node.name():
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


def node_names(root: Tensor) -> list[str]:
    """Names of the operations below ``root`` in the recorded graph, each once."""
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(following for following, _ in node.next_functions)
    return sorted({node.name() for node in seen})


def backward_bytes(roots: list[Tensor], most_nodes: int = 20_000) -> tuple[int, int]:
    """Bytes of all gradients that one backward pass from ``roots`` makes, and how many operations it takes.

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
    return total, len(seen)


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sees every operator below autograd, whoever calls it.

    PyTorch keeps Dynamo out of modes by default, which imports all of Dynamo at the first operator and takes
    more than a second; ``skipped_by_dynamo`` is for when it is there anyway.
    """

    skipped_by_dynamo = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return cls.skipped_by_dynamo


def reaches(roots: list[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the recorded graph leads from ``roots`` to one of these leaves.

    ``torch.autograd.grad`` would tell by computing gradients.
    """
    wanted = {id(leaf) for leaf in leaves}
    seen: set[Any] = set()
    stack: list[Any] = [root.grad_fn for root in roots if root.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in wanted:
            return True
        stack.extend([following for following, _ in node.next_functions if following is not None])
    return False


def weak_storage(x: Tensor) -> Any:
    """A reference to the memory of ``x`` that keeps its address, but not its contents, from being reused.

    Nothing public does that; without it a tensor that is freed and one that is made later look the same.
    """
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]


def storage_key(x: Tensor) -> int:
    """A number that names the memory of ``x`` as long as somebody holds it; 0 where there is none.

    No public name tells whether two tensors share memory when one of them has no elements, or has been freed.
    """
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts, wrappers
        return 0
