"""What the nodes of a recorded graph tell of a backward pass, by their names or the functions that made them.

Kinds of nodes are learned as they are met; knows nothing of walks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .lacking import LACKING
from .levels import transform_stack
from .nodes import node_name, node_shape
from .rounding import rounding_of_convolutions

__all__ = [
    "AS_IT_IS",
    "AS_MANY",
    "ELEMENTARY",
    "LEAN",
    "ORDINARY",
    "Leaf",
    "Survey",
    "Told",
    "hides_another",
    "is_compiled_function",
    "is_right_as_it_is",
]


class Survey(NamedTuple):
    """What one walk along the recorded graph tells of a backward pass, without running it."""

    numel: int
    """Elements of all gradients that the pass makes, but of nested ones: for what one row needs at most while
    rows are batched. To ask each for its dtype, too, takes a third more."""
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
    copies: list[Any]
    """Nodes of what is written into views in place: they hide the node of the operation that does it."""
    sparse: list[Any]
    """Nodes of sparse tensors: what their backward gives can't be differentiated by what it got."""
    biased: list[Any]
    """Normalizations with a bias and no weight: PyTorch's second derivative by the bias is zero."""
    running: list[Any]
    """Running sums of exponentials (``logcumsumexp``), whose gradient has a wrong derivative."""
    fused: bool
    """Whether there is attention in one kernel, whose backward can't be differentiated."""
    by_lu: bool
    """Whether one solves by an LU decomposition, which forward mode gets wrong inside ``vmap``."""
    looped: bool
    """Whether there is an LSTM of oneDNN's, whose backward runs row by row though rows are batched."""
    rounded: float
    """Relative spacing that operations round to before they compute, where they do; see :func:`coarsest`."""
    products: Sequence[Any] = ()
    """Nodes of products with a matrix and of the like; not told where the inputs count alone."""
    elementary: bool = False
    """Whether all are of kinds whose pullback has the same formula, linear in the cotangent, whether it is
    recorded or not: of few operations, all of which PyTorch batches, and rightly."""


# PyTorch's batching rule of these backwards gives wrong numbers where the rows alone are batched (2.13).
_MISBATCHED = {"CdistBackward0": "torch.cdist", "MaskedSelectBackward0": "torch.masked_select"}
# Its derivative by the cotangent is NaN where that is zero (2.13), though it is linear in it.
_RUNNING = "LogcumsumexpBackward0"
_FUSED = frozenset(
    {
        "ScaledDotProductCudnnAttentionBackward0",
        "ScaledDotProductEfficientAttentionBackward0",
        "ScaledDotProductFlashAttentionBackward0",
        "ScaledDotProductFlashAttentionForCpuBackward0",
    }
)
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
_LOOPED = "MkldnnRnnLayerBackward0"
# Factors may be rounded there by settings of their own; cuDNN does so, unless told otherwise.
_ROUNDED = frozenset({"ConvolutionBackward0", "ConvolutionBackwardBackward0", "CudnnRnnBackward0", _LOOPED})
# That one's gradient by the bias fails where it is to be differentiated (2.13).
_GROUPED = "NativeGroupNormBackward0"
_GROUPED_BIAS_FAILS = torch.__version__ < "2.14"  # its derivatives by a bias without a weight
_COPIES = "torch::autograd::CopySlices"
_NORMS = _BIASED | {_GROUPED}
_TOLD_BY_NAME = frozenset(
    {
        *LACKING,
        *_FUSED,
        *_SPARSE,
        *_BY_LU,
        *_ROUNDED,
        *_MISBATCHED,
        *_NORMS,
        *_ONCE_BY,
        _COPIES,
        _RUNNING,
    }
)
# What a pullback that is pulled back again has to watch, put right or refuse.
_WATCHED = frozenset({*_SPARSE, *_ONCE_BY, _COPIES, _RUNNING})
Leaf: Any = type(torch.zeros((), requires_grad=True).view(()).grad_fn.next_functions[0][0])  # type: ignore[union-attr]
# The type of all nodes of C++ functions that nobody has told Python of.
_UNTOLD = "CppFunction"
_PythonNode = torch.autograd.function.BackwardCFunction
# Types of nodes of which nothing has to be told but their gradients,
ORDINARY: set[type] = set()
# those whose backward is right, and has the right derivative, whatever else is told of them,
AS_IT_IS: set[type] = set()
# and those of the first kind of one input, that has as many elements: one is asked for all in a row.
AS_MANY: set[type] = set()
# Those that make nothing of the size of an input whose gradient nobody wants. (Custom functions may make all
# gradients, and products of batches expand what isn't batched.)
LEAN: set[type] = set()
# Those that :attr:`Survey.elementary` is about.
ELEMENTARY: set[type] = {Leaf}
_KINDS_LEAN = frozenset(
    f"{kind}Backward0"
    for kind in "Addmm Addmv Convolution Mm Mv NativeBatchNorm NativeGroupNorm NativeLayerNorm".split()  # noqa: SIM905
)
_KINDS_AS_MANY = frozenset(
    f"{kind}Backward0"
    for kind in """
    Abs Alias Clone Cos Elu Erf Exp Expm1 Gelu LeakyRelu Log Log1P Neg Permute Pow Reciprocal Relu
    ReshapeAlias Rsqrt Sigmoid Silu Sin Softplus Sqrt Squeeze T Tanh ToCopy Transpose UnsafeView Unsqueeze
    View
    """.split()  # noqa: SIM905
) | {"RsubBackward1"}
# Read off PyTorch's derivatives.yaml (2.13): none asks whether it is recorded, as those of silu and logit do,
# looks at the cotangent's values, or selects by a mask, as that of masked_scatter does.
_KINDS_ELEMENTARY = frozenset(
    f"{kind}Backward0"
    for kind in """
    Abs Add Addmm Addmv Alias Asin Atan Baddbmm Bmm Cat Clone Cos Cosh Cumsum Diagonal Div Dot Erf Exp Expand
    Expm1 Flip Index IndexSelect LeakyRelu Log Log1P LogSoftmax Logsumexp Mean Mm Mul Mv Neg Permute Pow
    Reciprocal Relu Repeat ReshapeAlias Roll Rsqrt Rsub Select Sigmoid Sin Sinh Slice Softmax Softplus Split
    Sqrt Squeeze Stack Sub Sum T Tan Tanh ToCopy Transpose Unbind UnsafeView Unsqueeze View Where
    """.split()  # noqa: SIM905
) | {f"{kind}Backward1" for kind in ("Mean", "Rsub", "Squeeze", "Sum")}


class Told:
    """What is told of nodes by their names, or by the functions that made them; see :class:`Survey`."""

    __slots__ = (
        "biased",
        "by_lu",
        "copies",
        "custom",
        "fused",
        "lacking",
        "looped",
        "misbatched",
        "nonlinear",
        "once",
        "rounded",
        "running",
        "sparse",
        "unpushable",
    )

    def __init__(self) -> None:
        self.misbatched: str | None = None
        self.custom: list[Any] = []
        self.nonlinear: list[Any] = []
        self.unpushable: list[str] = []
        self.once: list[tuple[str, Any]] = []
        self.copies: list[Any] = []
        self.sparse: list[Any] = []
        self.biased: list[Any] = []
        self.running: list[Any] = []
        self.by_lu = self.fused = self.lacking = self.looped = False
        self.rounded = 0.0

    def survey(self, numel: int, nodes: int) -> Survey:
        return Survey(
            numel=numel,
            nodes=nodes,
            misbatched=self.misbatched,
            custom=self.custom,
            nonlinear=self.custom + self.nonlinear,
            unpushable=self.unpushable,
            once=self.once,
            lacking=self.lacking,
            copies=self.copies,
            sparse=self.sparse,
            biased=self.biased,
            running=self.running,
            fused=self.fused,
            by_lu=self.by_lu,
            looped=self.looped,
            rounded=self.rounded,
        )

    def look_at(self, node: Any) -> None:
        name = node_name(node)
        if name in _KINDS_LEAN:
            LEAN.add(type(node))
        if isinstance(node, _PythonNode):
            self._look_at_python(node, name)
        elif name in _TOLD_BY_NAME:
            self._look_up(node, name)
        elif type(node).__name__ != _UNTOLD:
            ORDINARY.add(type(node))
            if name in _KINDS_AS_MANY:
                AS_MANY.add(type(node))
            if name in _KINDS_ELEMENTARY:
                ELEMENTARY.add(type(node))
        elif not name.startswith("torch::autograd::") or "CppNode" in name:
            self.custom.append(node)

    def _look_at_python(self, node: Any, name: str) -> None:
        made_by = _written(node._forward_cls)
        if not getattr(made_by, "torchzygote_composes", False):
            self.custom.append(node)
            if made_by.__module__ == "torch._library.autograd":
                self.unpushable.append(_operator_name(name))

    def _look_up(self, node: Any, name: str) -> None:
        if name == _COPIES:
            self.copies.append(node)
        elif name in _FUSED:
            self.fused = True
        elif name == _RUNNING:
            self.running.append(node)
        elif name in _SPARSE:
            self.sparse.append(node)
        elif name in _BY_LU:
            self.by_lu = True
            if name in _MISBATCHED_IN_VMAP and "vmap" in transform_stack():
                self.misbatched = _MISBATCHED_IN_VMAP[name]
        elif name in _ROUNDED:
            meta = node._input_metadata[0]
            self.looped |= name == _LOOPED
            self.rounded = max(self.rounded, rounding_of_convolutions(meta.device, meta.dtype))
        elif name in LACKING:
            self.lacking = True
            self.misbatched = _MISBATCHED.get(name, self.misbatched)
        elif name in _MISBATCHED:
            self.misbatched = _MISBATCHED[name] if _misbatches(node, name) else self.misbatched
        elif name in _ONCE_BY:
            operation, place = _ONCE_BY[name]
            if getattr(node, "_saved_train", True):  # batch norm by given statistics is right
                self.once.append((operation, node.next_functions[place][0]))
        elif (bias := _only_bias(node)) is not None:
            if name != _GROUPED:
                self.biased.append(node)
            elif _GROUPED_BIAS_FAILS:
                self.once.append(("group_norm", bias))


def is_right_as_it_is(node: Any) -> bool:
    """Whether a node is none of those that a survey tells as custom, sparse, copies, running, biased or once.

    By its kind and its edges alone: what it has saved may take a checkpoint's second run to ask for.
    """
    name = node_name(node)
    if isinstance(node, _PythonNode):
        return bool(getattr(_written(node._forward_cls), "torchzygote_composes", False))  # type: ignore[attr-defined]
    if name in _WATCHED:
        return False
    if name in _NORMS:
        return not _may_be_biased(node)
    if type(node).__name__ != _UNTOLD:
        AS_IT_IS.add(type(node))
        return True
    return name.startswith("torch::autograd::") and "CppNode" not in name


def _written(function: Any) -> Any:
    """The custom function as it was written; ``torch.func`` generates another for each level of its own."""
    if issubclass(function, torch.autograd.Function):
        return function
    backward = function.backward
    inside = dict(zip(backward.__code__.co_freevars, backward.__closure__ or (), strict=True))
    return inside["autograd_function"].cell_contents if "autograd_function" in inside else function


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


def _may_be_biased(node: Any) -> bool:
    """Whether a normalization has a bias that is differentiated by, and no weight that is."""
    (weight, _), (bias, _) = node.next_functions[1:3]
    return bias is not None and weight is None


def _only_bias(node: Any) -> Any:
    """What the bias of a normalization comes from, if it has one and no weight."""
    if not _may_be_biased(node):
        return None
    try:
        bias = node.next_functions[2][0]
        return bias if node._saved_weight is None else None
    except RuntimeError:  # freed: there will be no backward pass
        return None


def hides_another(node: Any) -> bool:
    """Whether a node is of what was written into a view in place: the node of that operation is inside."""
    return node_name(node) == _COPIES


def is_compiled_function(node: Any) -> bool:
    """Whether a node is of a function made with ``torch.compile``, and no other that has the name."""
    made_by: Any = getattr(node, "_forward_cls", None)
    compiled: bool = node_name(node) == "CompiledFunctionBackward" and made_by.__module__.startswith("torch.")
    return compiled
