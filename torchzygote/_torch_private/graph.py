"""The graph that autograd has recorded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lacking import LACKING
from .levels import in_functorch, transform_stack
from .nodes import node_of, node_shape, source_of

__all__ = [
    "Survey",
    "consumers_below",
    "depends_on_others",
    "has_hooks",
    "has_nodes_before",
    "hooks_made",
    "leads_to",
    "mark_as_own",
    "node_names",
    "reaches",
    "rounding_of_cudnn",
    "saved_tensors_hooks",
    "sequence_number",
    "survey",
]


def sequence_number() -> int:
    """The number of the next node that autograd records in this thread: what is older was there before."""
    return int(torch._C._autograd._get_sequence_nr())


def hooks_made() -> int:
    """How many hooks this process has made: whether a function registered any can't be seen in its graph."""
    return int(torch.utils.hooks.RemovableHandle.next_id)


def _nodes_below(starts: Iterable[Any]) -> Iterator[Any]:
    """The nodes of the recorded graph from these on, each once."""
    seen: set[Any] = set()
    stack = [node for node in starts if node is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend([following for following, _ in node.next_functions if following is not None])


def has_nodes_before(roots: Sequence[Tensor], start: int) -> bool:
    """Whether what has been recorded for ``roots`` begins before :func:`sequence_number` was ``start``."""
    return any(
        getattr(node, "variable", None) is None and node._sequence_nr() < start
        for node in _nodes_below(node_of(root) for root in roots)
    )


def has_hooks(x: Tensor) -> bool:
    """Whether hooks have been registered on ``x``; those on what was computed from it don't show."""
    return bool(x._backward_hooks)


def saved_tensors_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """The pack and unpack hooks in force; a pair that calls them can then be put on top of them.

    ``torch.utils.checkpoint`` keeps its own to itself.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks  # type: ignore[no-any-return]


class Survey(NamedTuple):
    """What one walk along the recorded graph tells of a backward pass, without running it."""

    nbytes: int
    """Of all gradients that the pass makes, but of nested ones: what one row needs at most while rows are
    batched."""
    nodes: int
    """Operations."""
    misbatched: str | None
    """One of them that must not run under ``vmap``, if there is one."""
    custom: list[Any]
    """Nodes that are not PyTorch's own: Python and C++ autograd functions. Their backward need not be
    differentiable by its cotangent, and may say so by silence; those of this package, which are, say so by a
    class attribute ``torchzygote_composes``."""
    nonlinear: list[Any]
    """These, and nodes whose derivative by the cotangent is wrong where that is zero."""
    unpushable: list[str]
    """Names of operators made with ``torch.library``: forward mode gives zeros for them, silently."""
    once: list[tuple[str, Any]]
    """Operations whose second derivative PyTorch gets wrong, and the node below that it is wrong by."""
    lacking: bool
    """Whether there are operations whose backward can't be differentiated, but that have a formula."""
    sparse: list[Any]
    """Nodes of sparse tensors: what their backward gives can't be differentiated by what it got."""
    biased: list[Any]
    """Normalizations with a bias and no weight: PyTorch's second derivative by the bias is zero."""
    by_lu: bool
    """Whether one solves by an LU decomposition, which forward mode gets wrong inside ``vmap``."""
    coarsest: float
    """Relative spacing of the coarsest numbers among the gradients, as after autocast in ``f``."""


# PyTorch's batching rule of these backwards gives wrong numbers where the rows alone are batched (2.13).
_MISBATCHED = {"CdistBackward0": "torch.cdist", "MaskedSelectBackward0": "torch.masked_select"}
# Their derivative by the cotangent is NaN where that is zero (2.13), though they are linear in it.
_NOT_LINEAR_AT_ZERO = frozenset({"LogcumsumexpBackward0"})
# Without a weight, PyTorch's second derivative by the bias is zero (2.13).
_BIASED = frozenset(
    {
        "NativeLayerNormBackward0",
        "NativeBatchNormBackward0",
        "CudnnBatchNormBackward0",
        "MiopenBatchNormBackward0",
    }
)
# The backward of values() cuts the graph, whatever the layout; what comes back to a CSR tensor made of values
# is read by values(), too, or by an operation that knows COO only (2.13).
_SPARSE = frozenset({"ValuesBackward0", "SparseCompressedTensorBackward0"})
# PyTorch's second derivative by this source is wrong: norms count as constant, or all is zero (2.13).
_ONCE_BY = {
    "WeightNormInterfaceBackward0": ("weight_norm", 0),
    "SparseCooTensorWithDimsAndTensorsBackward0": ("sparse_coo_tensor", 0),
    "NativeLayerNormBackwardBackward0": ("norm's gradient", 1),
    "NativeBatchNormBackwardBackward0": ("norm's gradient", 1),
    "CudnnBatchNormBackwardBackward0": ("norm's gradient", 0),
    "MiopenBatchNormBackwardBackward0": ("norm's gradient", 0),
}
_BY_LU = frozenset(
    {"LinalgDetBackward0", "LinalgLuSolveBackward0", "LinalgSlogdetBackward0", "LinalgSolveExBackward0"}
)
# Inside vmap, PyTorch's batching rule gives noise for the derivatives of its backward (2.13).
_MISBATCHED_IN_VMAP = {"LinalgLuSolveBackward0": "torch.linalg.lu_solve"}
# On CUDA, cuDNN computes these in TF32 unless told otherwise.
_BY_CUDNN = frozenset({"ConvolutionBackward0", "ConvolutionBackwardBackward0", "CudnnRnnBackward0"})
_TF32 = 2.0**-10
# That one's gradient by the bias fails where it is to be differentiated (2.13).
_GROUPED = "NativeGroupNormBackward0"
_GROUPED_BIAS_FAILS = torch.__version__ < "2.14"  # its derivatives by a bias without a weight
_TOLD_BY_NAME = frozenset(
    {
        *LACKING,
        *_NOT_LINEAR_AT_ZERO,
        *_SPARSE,
        *_BY_LU,
        *_BY_CUDNN,
        *_MISBATCHED,
        *_BIASED,
        *_ONCE_BY,
        _GROUPED,
    }
)
_PythonNode = torch.autograd.function.BackwardCFunction
# Types of nodes of which nothing has to be told but their gradients; a name takes as long as two of these.
_ordinary: set[type] = set()


def survey(roots: Sequence[Tensor], ends: Collection[Any] = ()) -> Survey:
    """Walk along the graph recorded below ``roots``: 3 microseconds for each operation.

    ``ends``: nodes that a backward pass doesn't come to, nor to what is below.
    """
    # Not by `_nodes_below`: small calls wait for this, and a generator takes a microsecond for each node.
    seen: set[Any] = set(ends)
    stack: list[Any] = [node for root in roots if (node := node_of(root)) is not None]
    total = 0
    misbatched = None
    custom: list[Any] = []
    nonlinear: list[Any] = []
    unpushable: list[str] = []
    once: list[tuple[str, Any]] = []
    sparse: list[Any] = []
    biased: list[Any] = []
    dtypes: set[torch.dtype] = set()
    by_lu = lacking = False
    rounded = 0.0
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        kind = type(node)
        name = "" if kind in _ordinary else node.name()
        if not name:
            pass
        elif isinstance(node, _PythonNode):
            if not getattr(node._forward_cls, "torchzygote_composes", False):  # type: ignore[attr-defined]
                custom.append(node)
                if node._forward_cls.__module__ == "torch._library.autograd":  # type: ignore[attr-defined]
                    unpushable.append(_operator_name(name))
        elif name not in _TOLD_BY_NAME:
            if "CppNode" in name:
                custom.append(node)
            elif name.endswith(kind.__name__):  # not of a type for all that has none of its own
                _ordinary.add(kind)
        elif name in _NOT_LINEAR_AT_ZERO:
            nonlinear.append(node)
        elif name in _SPARSE:
            sparse.append(node)
        elif name in _BY_LU:
            by_lu = True
            if name in _MISBATCHED_IN_VMAP and "vmap" in transform_stack():
                misbatched = _MISBATCHED_IN_VMAP[name]
        elif name in _BY_CUDNN:
            meta = node._input_metadata[0]
            rounded = max(rounded, rounding_of_cudnn(meta.device, meta.dtype))
        elif name in LACKING:
            lacking = True
            misbatched = _MISBATCHED.get(name, misbatched)
        elif name in _MISBATCHED:
            misbatched = _MISBATCHED[name] if _misbatches(node, name) else misbatched
        elif name in _ONCE_BY:
            operation, place = _ONCE_BY[name]
            if getattr(node, "_saved_train", True):  # batch norm by given statistics is right
                once.append((operation, node.next_functions[place][0]))
        elif (bias := _only_bias(node)) is not None:
            if name == _GROUPED:
                if _GROUPED_BIAS_FAILS:
                    once.append(("group_norm", bias))
            else:
                biased.append(node)
        for meta in node._input_metadata:
            dtype = meta.dtype
            dtypes.add(dtype)
            try:
                total += math.prod(meta.shape) * dtype.itemsize
            except Exception:  # the size of a nested tensor can't be asked
                if not meta.is_nested_tensor:
                    raise
        for following, _ in node.next_functions:
            if following is not None:
                stack.append(following)
    coarsest = max(map(_spacing, dtypes), default=0.0)
    coarsest = max(coarsest, rounded)
    nonlinear = custom + nonlinear
    return Survey(
        total,
        len(seen) - len(ends),
        misbatched,
        custom,
        nonlinear,
        unpushable,
        once,
        lacking,
        sparse,
        biased,
        by_lu,
        coarsest,
    )


def rounding_of_cudnn(device: torch.device, dtype: torch.dtype) -> float:
    """Relative spacing of what a convolution multiplies there, where it isn't that of its dtype."""
    if device.type != "cuda" or dtype != torch.float32:
        return 0.0
    try:
        return _TF32 if torch.backends.cudnn.allow_tf32 else 0.0
    except RuntimeError:  # set by the newer interface, for each operation
        return _TF32


@functools.cache
def _spacing(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point or dtype.is_complex else 0.0


def _operator_name(node: str) -> str:
    """``ns::op`` of ``GeneratedBackwardFor_ns_op_overloadBackward``, as far as that can be told."""
    return node.removeprefix("GeneratedBackwardFor_").removesuffix("Backward").removesuffix("_default")


def _misbatches(node: Any, name: str) -> bool:
    """Whether this one is wrong: ``masked_select`` is where the mask has more dimensions than its input."""
    if name != "MaskedSelectBackward0":
        return True
    try:
        return len(node._saved_mask.shape) > len(node_shape(*node.next_functions[0]) or ())
    except RuntimeError:  # freed: there will be no backward pass
        return False


def _only_bias(node: Any) -> Any:
    """What the bias of a normalization comes from, if it has one and no weight."""
    (weight, _), (bias, _) = node.next_functions[1:3]
    if bias is None or weight is not None:
        return None
    try:
        return bias if node._saved_weight is None else None
    except RuntimeError:  # freed: there will be no backward pass
        return None


def mark_as_own(leaf: Tensor) -> None:
    """Note that ``leaf`` was made by this package, and stands for nothing that anybody else holds."""
    leaf._torchzygote_own = True  # type: ignore[attr-defined]


def depends_on_others(root: Tensor, start: int) -> bool:
    """Whether the graph recorded for ``root`` leads to anything but the package's own leaves.

    ``start``: the :func:`sequence_number` from which nodes are not older than the computation itself.
    """
    for node in _nodes_below([root.grad_fn if root.grad_fn is not None else source_of(root)[0]]):
        leaf = getattr(node, "variable", None)
        if leaf is None and node._sequence_nr() < start:
            return True
        if leaf is not None and not hasattr(leaf, "_torchzygote_own"):
            return True
    return False


def consumers_below(root: Tensor) -> dict[tuple[Any, int], list[tuple[Any, int]]]:
    """For each value recorded below ``root`` the nodes that it goes into, and in which place of each."""
    found: dict[tuple[Any, int], list[tuple[Any, int]]] = {}
    for node in _nodes_below([root.grad_fn]):
        for position, value in enumerate(node.next_functions):
            if value[0] is not None:
                found.setdefault(value, []).append((node, position))
    return found


def node_names(root: Tensor) -> list[str]:
    """Names of the operations below ``root`` in the recorded graph, each once."""
    return sorted({node.name() for node in _nodes_below([root.grad_fn])})


def leads_to(node: Any, inputs: Sequence[Tensor]) -> bool:
    """Whether the recorded graph leads from ``node`` to one of the inputs that it was recorded for."""
    if in_functorch():  # inputs are leaves there, and their edges can't be asked for outside of their level
        return _reach([node], inputs)
    return not {source_of(x)[0] for x in inputs}.isdisjoint(_nodes_below([node]))


def reaches(roots: list[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the recorded graph leads from ``roots`` to one of these leaves.

    ``torch.autograd.grad`` would tell by computing gradients.
    """
    return _reach((root.grad_fn for root in roots), leaves)


def _reach(starts: Iterable[Any], leaves: Sequence[Tensor]) -> bool:
    wanted = {id(leaf) for leaf in leaves}
    return any(id(getattr(node, "variable", None)) in wanted for node in _nodes_below(starts))
