"""Tensors and their memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _foreach_utils

from .operators import is_tracing

__all__ = [
    "alike",
    "base_of",
    "flatten_dense",
    "group_by_device_and_dtype",
    "has_meta_storage",
    "has_numbers",
    "is_missing_tangent",
    "is_view",
    "keeps_tensors_from_swapping",
    "memory_holders",
    "no_torch_function",
    "object_holders",
    "refuse_writes",
    "set_versions",
    "storage_key",
    "swap_tensors",
    "uncoalesced_values",
    "unflatten_dense",
    "version_of",
    "weak_storage",
]

# A subclass with this as its ``__torch_function__`` is a plain tensor to everything that is computed from it.
no_torch_function: Callable[..., Any] = torch._C._disabled_torch_function_impl

# How often a tensor was written into, with all views of its memory; public names only count it up. These four
# are no functions of Python, as a call of one would take half as long again.
version_of: Callable[[Tensor], int] = attrgetter("_version")
# Whether a tensor is a view, and what of (``None`` for others), which ``requires_grad`` may come of.
is_view: Callable[[Tensor], bool] = Tensor._is_view
base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")
# How many hold the tensor in C++, as a graph that saved it does; all that hold it in Python count once.
object_holders: Callable[[Tensor], int] = Tensor._use_count  # type: ignore[attr-defined]

_PLAIN = (Tensor, torch.nn.Parameter)
_OF_CUSTOM_FUNCTION = torch._C._autograd.CreationMeta.IN_CUSTOM_FUNCTION


def swap_tensors(a: Tensor, b: Tensor) -> None:
    """Exchange what two tensor objects hold, so that every holder of ``a`` sees what ``b`` was.

    The only way to differentiate by a tensor that ``f`` closes over inside a ``torch.func`` transform: a mode
    that replaces it misses ``autograd.Function.apply`` and ``vmap(f)(w)``. ``torch.utils.swap_tensors``
    refuses tensors that somebody else holds, which is the very case here. Weak references are refused in any
    case: autocast's cache has one to each weight that it cast, which are cast again without it, and what
    ``torch.profiler`` has recorded with shapes, until it is freed.
    """
    for let_go in (torch.clear_autocast_cache, gc.collect):
        try:
            torch._C._swap_tensor_impl(a, b)
            return
        except RuntimeError:
            let_go()
    torch._C._swap_tensor_impl(a, b)


def keeps_tensors_from_swapping() -> bool:
    """Whether each tensor that is used gets a weak reference: a profiler that records shapes makes one."""
    if not torch._C._autograd._profiler_enabled():
        return False
    a, b = torch.empty(0, device="cpu"), torch.empty(0, device="cpu")
    a.view_as(b)
    try:
        torch._C._swap_tensor_impl(a, b)
    except RuntimeError:
        return True
    return False


def refuse_writes(view: Tensor) -> None:
    """Have writes into ``view`` or its base raise, as into a view that a custom autograd function made.

    A write makes a new graph for a view, in which what hangs on its node (a hook) is missing, silently.
    """
    torch._C._autograd._set_creation_meta(view, _OF_CUSTOM_FUNCTION)


def group_by_device_and_dtype(xs: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of each device and dtype, in the order in which ``torch.nn.utils`` takes them.

    Its order of the groups, a hash map's, decides the last bits of a norm over several dtypes.
    """
    groups: Any = _foreach_utils._group_tensors_by_device_and_dtype([list(xs)])
    return [lists[0] for lists, _ in groups.values()]


def weak_storage(x: Tensor) -> Any:
    """A reference to the memory of ``x`` that keeps its address, but not its contents, from being reused.

    Nothing public does that; without it a tensor that is freed and one that is made later look the same.
    """
    return StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]


def set_versions(counted: Iterable[tuple[Tensor, int]]) -> None:
    """Set each tensor's version counter, one after the other: for contents that have been put back.

    Autograd compares versions, not contents, of what it saved, and nothing public sets them.
    """
    for x, version in counted:
        torch._C._autograd._unsafe_set_version_counter((x,), (version,))


def storage_key(x: Tensor) -> int:
    """A number that names the memory of ``x`` as long as somebody holds it; 0 where there is none.

    No public name tells whether two tensors share memory when one of them has no elements, or has been freed.
    """
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts, wrappers
        return 0


def has_numbers(x: Tensor) -> bool:
    """Whether the elements of ``x`` may be asked for: not if it is fake, without memory, or being traced."""
    if x.is_meta:
        return False
    # What traces and what fakes are dispatch modes; to ask for any takes a tenth of the time.
    if type(x) in _PLAIN and torch._C._len_torch_dispatch_stack() == 0:
        return True
    return not (isinstance(x, FakeTensor) or is_tracing())


def has_meta_storage(x: Tensor) -> bool:
    """Whether the memory of ``x`` is none, as of a fake tensor, which pretends to be on another device.

    Nothing public tells without a warning.
    """
    try:
        return x.untyped_storage().device.type == "meta"
    except (NotImplementedError, RuntimeError):  # sparse and opaque layouts, wrappers
        return False


def is_missing_tangent(x: Tensor) -> bool:
    """Whether ``x`` is one of the zeros without memory by which PyTorch says that there is no tangent."""
    return x._is_zerotensor()


def uncoalesced_values(x: Tensor) -> Tensor:
    """The values of a sparse COO tensor as they lie in memory; the public name wants each place once."""
    return x._values()


_use_count: Callable[[int], int] = torch._C._storage_Use_Count


def memory_holders(x: Tensor) -> int:
    """How many tensors have the memory of ``x``, itself included; one more where it isn't PyTorch's own.

    No public name tells whether somebody else would see what is written into ``x``.
    """
    storage = x.untyped_storage()
    # the object made for this very question counts as well
    return _use_count(storage._cdata) - storage.resizable()


def alike(*examples: Tensor) -> Callable[..., bool]:
    """A function that tells whether as many values are tensors with all of the examples' metadata.

    Type, dtype, shape, strides, device, ``requires_grad`` and dispatch keys (which wrappers of ``torch.func``
    and modes change), in one call: an eighth of a microsecond, where the public names take half of one; of a
    thousand, a twentieth of one each. ``False`` where one of them comes twice. Neither the examples nor the
    values may be without strides, as nested tensors are: that ends the process.
    """
    make: Any = TensorGuards  # its stub lacks the tensors
    check: Callable[..., bool] = make(*examples, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check


def flatten_dense(xs: list[Tensor]) -> Tensor:
    """All elements of dense tensors of one device in one vector, which is a view where there is one tensor.

    A third of the time of ``reshape`` for each and ``cat``; no public name takes a list.
    """
    flat: Tensor = torch._C._nn.flatten_dense_tensors(xs)
    return flat


def unflatten_dense(vector: Tensor, xs: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of ``vector`` in the shapes of ``xs``, of which each has elements; views.

    Half the time of ``split`` and ``view`` for each.
    """
    return list(torch._C._nn.unflatten_dense_tensors(vector, xs))
