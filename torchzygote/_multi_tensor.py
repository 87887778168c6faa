"""One operation over many tensors, as one multi-tensor call per device and dtype.

Knows nothing of parameters or gradients. ``torch._foreach_*`` has no rule for ``torch.func.vmap``, lacks some
derivatives and doesn't sum a derivative over broadcast axes: what is recorded beyond the plainest case goes
through the ordinary operators, one tensor at a time, and so do sparse tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._metadata import COMMON, TENSOR_TYPES, Metadata, by_kind, metadata_of
from ._operators import Number, Operator
from ._overlap import all_apart, detached_from, known_apart, writable
from ._sparse_operands import beside_dense, is_strided, one_sparse
from ._torch_private import flatten_dense, in_forward_ad, in_functorch, unflatten_dense

__all__ = [
    "apply",
    "apply_",
    "clone_all",
    "copy_all",
    "describe",
    "flatten",
    "in_groups",
    "in_groups_",
    "parts_of",
    "plain",
    "recorded",
]

Operand = Number | Tensor | list[Tensor] | tuple[float, float]  # the last for clipping


Label = Callable[[int], str]

_requires_grad: Callable[[Any], bool] = operator.attrgetter("requires_grad")


def _position(i: int) -> str:
    return f"value {i}"


def describe(x: Tensor) -> str:
    """Dtype and shape in a few characters."""
    shape = "(uninitialized)" if nn.parameter.is_lazy(x) else tuple(x.shape)
    return f"{str(x.dtype).removeprefix('torch.')} {shape}"


# -- what can go together ------------------------------------------------------------------------------------


def recorded(tensors: Iterable[Tensor]) -> bool:
    """Whether an operation on one of ``tensors`` is differentiated or batched by anybody."""
    if in_functorch() or in_forward_ad():
        return True
    return torch.is_grad_enabled() and any(map(_requires_grad, tensors))


def _operands(xs: list[Tensor], right: Operand) -> list[Tensor]:
    return [*xs, *right] if isinstance(right, list) else [*xs, right] if isinstance(right, Tensor) else xs


def _together(op: Operator, xs: list[Tensor], right: Operand) -> bool:
    """Whether the multi-tensor call may be taken.

    Of what is recorded, its derivatives cover: real, on the tape, nothing broadcast.
    """
    if not recorded(_operands(xs, right)):
        return True
    if in_functorch() or in_forward_ad() or op.many_ is None or isinstance(right, (Tensor, complex)):
        return False
    return all(
        x.dtype.is_floating_point and x.dtype is y.dtype and x.shape == y.shape and x.device == y.device
        for x, y in zip(xs, right if isinstance(right, list) else xs, strict=True)
    )


def plain(
    xs: list[Tensor], right: Operand, known: Metadata | None = None
) -> tuple[Metadata, Metadata | None] | None:
    """What ``xs`` and a list of operands are, in the common case.

    All are dense and not recorded, and each fits its operand as it is. ``known``: the metadata of ``xs``, for
    those who have asked for them already.
    """
    mine = None if isinstance(right, complex) else known or metadata_of(xs)
    if mine is None or not mine.common or mine.recorded():
        return None
    if isinstance(right, list):
        theirs = metadata_of(right)
        if theirs is None or not mine.fits(theirs) or not theirs.common or theirs.recorded():
            return None
        return mine, theirs
    if isinstance(right, Tensor):
        if right.is_complex() or (right.requires_grad and torch.is_grad_enabled()):
            return None
        if mine.has_0dim and {right.dtype} != set(mine.dtypes):
            return None  # the dtypes of 0-dim tensors may be promoted
    return mine, None


def _at(operand: Operand, where: list[int]) -> Operand:
    return [operand[i] for i in where] if isinstance(operand, list) else operand


def _nth(operand: Operand, i: int) -> Any:
    return operand[i] if isinstance(operand, list) else operand


def _for_many(xs: list[Tensor], right: Operand) -> Operand:
    """A 0-dim tensor as the multi-tensor call for ``xs`` takes it."""
    if not isinstance(right, Tensor):
        return right
    if right.is_meta and not xs[0].is_meta:
        raise ValueError(
            "expected an operand with a value, got a tensor on the meta device, which has none; make it on "
            f"{xs[0].device}"
        )
    if right.device.type == "cpu" and xs[0].device.type != "cpu":
        number: Number = right.item()
        return number
    return right.to(xs[0].device, copy=True)  # one of the tensors written to may be this very one


# -- the operators -------------------------------------------------------------------------------------------


def apply(op: Operator, xs: list[Tensor], right: Operand, label: Label = _position) -> list[Tensor]:
    """``op(x, right)`` for each ``x``; ``right`` is a number, a 0-dim tensor or a list, one per ``x``.

    ``label(i)`` says in an error which ``x`` it is about.
    """
    known = plain(xs, right)
    if known is not None:
        return in_groups(op.many, known[0].groups, xs, right)
    _check(op, xs, right, label, in_place=False)
    dense = [
        i for i, x in enumerate(xs) if is_strided(x) and (not isinstance(right, list) or is_strided(right[i]))
    ]
    out: list[Any] = [None] * len(xs)
    if len(dense) < len(xs):
        for i in set(range(len(xs))).difference(dense):
            out[i] = one_sparse(op, xs[i], _nth(right, i))
    if not _together(op, xs, right):
        for i in dense:
            out[i] = op.one(xs[i], _nth(right, i))
        return out
    if isinstance(right, Tensor):
        promoted = [i for i in dense if torch.result_type(xs[i], right) is not xs[i].dtype]
        for i in promoted:  # the multi-tensor calls don't, or compute in a narrower dtype
            out[i] = op.one(xs[i], right)
        dense = [i for i in dense if out[i] is None]
    group = [xs[i] for i in dense]
    for i, y in zip(dense, in_groups(op.many, by_kind(group), group, _at(right, dense)), strict=True):
        out[i] = y
    return out


def apply_(
    op: Operator, xs: list[Tensor], right: Operand, label: Label = _position, known: Metadata | None = None
) -> list[Tensor]:
    """The same, written into each ``x`` where that can be; returns the tensors that hold the results.

    What can't be written into is replaced: see ``_overlap``. Errors come before anything is written.
    ``known``: as for :func:`plain`.
    """
    assert op.many_ is not None
    found = plain(xs, right, known)
    # A power may be too large for one dtype of several.
    if found is None or (op.symbol == "**" and len(found[0].groups) > 1):
        _check(op, xs, right, label, in_place=True)
    if found is not None and _apart(xs, right, *found):
        in_groups_(op.many_, found[0].groups, xs, right)
        return xs
    if recorded(_operands(xs, right)):
        return [y.to(x.dtype) for x, y in zip(xs, apply(op, xs, right), strict=True)]
    out = list(xs)
    inside, replaced = writable(xs)
    if isinstance(right, list):
        right = detached_from(xs, inside, beside_dense(op, xs, right))
    elif isinstance(right, Tensor):
        right = right.clone()  # it may be part of one that is written to
    for i, y in zip(replaced, apply(op, [xs[i] for i in replaced], _at(right, replaced)), strict=True):
        out[i] = y.to(xs[i].dtype)
    group = [xs[i] for i in inside]
    in_groups_(op.many_, by_kind(group), group, _at(right, inside))
    return out


def in_groups(
    fn: Callable[..., Any], groups: list[list[int]], xs: list[Tensor], right: Operand
) -> list[Tensor]:
    """One call per group of positions."""
    if len(groups) == 1:
        return list(fn(xs, _for_many(xs, right)))
    out: list[Any] = [None] * len(xs)
    for where in groups:
        group = [xs[i] for i in where]
        for i, y in zip(where, fn(group, _for_many(group, _at(right, where))), strict=True):
            out[i] = y
    return out


def in_groups_(fn: Callable[..., Any], groups: list[list[int]], xs: list[Tensor], right: Operand) -> None:
    """One call per group of positions, for what it writes."""
    if len(groups) == 1:
        fn(xs, _for_many(xs, right))
        return
    if isinstance(right, Tensor):
        right = right.clone()  # one of the tensors that an earlier call writes to may be this very one
    for where in groups:
        group = [xs[i] for i in where]
        fn(group, _for_many(group, _at(right, where)))


def _apart(xs: list[Tensor], right: Operand, mine: Metadata, theirs: Metadata | None) -> bool:
    """Whether ``xs`` can be written into before ``right`` is read: but for what is combined with itself."""
    if not isinstance(right, list):
        return known_apart(xs, mine)
    if known_apart(xs, mine, right, theirs):
        return True
    others = [y for x, y in zip(xs, right, strict=True) if y is not x]
    return len(others) < len(xs) and (all_apart(xs, others) if others else known_apart(xs, mine))


def _check(op: Operator, xs: list[Tensor], right: Operand, label: Label, in_place: bool) -> None:
    """Refuse operands that don't go together."""
    if op.symbol == "-":
        _check_bools(xs, right, label, in_place)
    if in_place and not isinstance(right, tuple):
        _check_in_place(op, xs, right, label)
    if not isinstance(right, list):
        return
    symbol = _as_called(op, in_place)
    for i, (x, y) in enumerate(zip(xs, right, strict=True)):
        if x.dtype is y.dtype and x.shape == y.shape and x.device == y.device:
            continue
        if x.device != y.device and (y.dim() > 0 or y.device.type != "cpu"):
            raise ValueError(
                f"{symbol}: expected values on one device for {label(i)}, got {x.device} and {y.device}; "
                "move one of them"
            )
        try:
            shape: Any = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
        except RuntimeError:
            shape = None
        if shape is None or (in_place and shape != x.shape):
            raise ValueError(
                f"{symbol}: expected values of shapes that fit for {label(i)}, got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )


def _as_called(op: Operator, in_place: bool) -> str:
    return f"{op.symbol}=" if in_place else op.symbol


def _check_bools(xs: list[Tensor], right: Operand, label: Label, in_place: bool) -> None:
    """Refuse to subtract what PyTorch doesn't, as of a number."""
    for values in (xs, right) if isinstance(right, list) else (xs,):
        for i, x in enumerate(values):
            if x.dtype is torch.bool:
                raise TypeError(
                    f"{'-=' if in_place else '-'}: expected tensors of numbers for {label(i)}, got a bool "
                    "tensor; convert it, as in x.float(), or use ^ or ~ on bools"
                )


def _check_in_place(op: Operator, xs: list[Tensor], right: Operand, label: Label) -> None:
    """Refuse dtypes that can't hold the result, and what ``op`` refuses, before anything is written."""
    seen: set[Any] = set()
    for i, x in enumerate(xs):
        y = _nth(right, i)
        kind = (x.dtype, x.dim() > 0, y.dtype, y.dim() > 0) if isinstance(y, Tensor) else x.dtype
        if kind in seen:
            continue
        seen.add(kind)
        whole = not (x.dtype.is_floating_point or x.dtype.is_complex)
        if (whole and op.symbol == "/") or not _holds(x, y):
            raise _unfit_dtype(op, x, y, label(i))
        if x.dtype not in COMMON or op.symbol == "**":
            _attempt(op, x, y, label(i))


def _holds(x: Tensor, y: Any) -> bool:
    """Whether the dtype of ``x`` holds a result with ``y``."""
    try:
        return torch.can_cast(torch.result_type(x, y), x.dtype)
    except RuntimeError:  # there is no result: of float8 with others, of quantized ones
        return False


def _attempt(op: Operator, x: Tensor, y: Any, label: str) -> None:
    """Let PyTorch refuse for one element what it would refuse after others have been written."""
    one = torch.ones((1,) * min(x.dim(), 1), dtype=x.dtype, device=x.device)
    if isinstance(y, Tensor):
        y = torch.ones((1,) * min(x.dim(), y.dim(), 1), dtype=y.dtype, device=x.device)
    try:
        op.one(one, y)
    except NotImplementedError as error:
        raise TypeError(
            f"{op.symbol}=: expected a dtype that PyTorch has this operation for, got {describe(x)} for "
            f"{label} ({error}); convert it, as in x.float()"
        ) from error


def _unfit_dtype(op: Operator, x: Tensor, y: Any, label: str) -> TypeError:
    got = describe(y) if isinstance(y, Tensor) else repr(y)
    return TypeError(
        f"{op.symbol}=: expected a result that fits the dtype {x.dtype} of the value of {label}, which none "
        f"with {got} does; write a = a {op.symbol} b"
    )


def clone_all(xs: list[Tensor], known: Metadata | None = None) -> list[Tensor]:
    """Copies with memory of their own; ``known``: as for :func:`plain`."""
    many = getattr(torch, "_foreach_clone", None)  # newer than the oldest PyTorch that we support
    found = plain(xs, 1, known)
    if many is not None and found is not None:
        return in_groups(lambda group, _: many(group), found[0].groups, xs, 1)
    if many is None or recorded(xs) or not all(map(is_strided, xs)):
        return [x.clone() for x in xs]
    return in_groups(lambda group, _: many(group), by_kind(xs), xs, 1) if xs else []


# -- one vector ----------------------------------------------------------------------------------------------


def flatten(xs: list[Tensor]) -> Tensor:
    """All elements in one new vector, on the device of the first."""
    if not xs:
        return torch.zeros(0)
    known = plain(xs, 1)
    if known is not None and known[0].solid and len(xs) > 1 and len(set(known[0].devices)) == 1:
        return flatten_dense(xs)
    dense = [x if is_strided(x) else x.to_dense() for x in xs]
    device = dense[0].device
    if device.type != "meta" and any(x.is_meta for x in dense):
        raise ValueError(
            "to_vector: expected tensors with elements, got one on the meta device, which has none, beside "
            f"one on {device}; give it elements, as by to_empty()"
        )
    return torch.cat([x.reshape(-1).to(device) for x in dense])


def parts_of(vector: Tensor, xs: list[Tensor], known: Metadata | None) -> list[Tensor]:
    """Consecutive parts of ``vector`` in the shapes of the tensors; views. ``known``: their metadata."""
    numels = [x.numel() for x in xs] if known is None else known.numels
    if (
        known is not None and 0 not in numels and type(vector) in TENSOR_TYPES
    ):  # what is empty loses its shape
        with torch.set_grad_enabled(torch.is_grad_enabled() and vector.requires_grad):
            return unflatten_dense(vector, xs)
    return [part.view(x.shape) for part, x in zip(torch.split(vector, numels), xs, strict=True)]


def copy_all(dst: list[Tensor], src: list[Tensor], known: Metadata | None = None) -> None:
    """Write each tensor into its fellow, which can be written into; nothing is recorded.

    ``known``: the metadata of ``dst``.
    """
    known = known or metadata_of(dst)
    with torch.no_grad():
        groups = by_kind(dst) if known is None else known.groups
        if len(groups) == 1:
            torch._foreach_copy_(dst, src)
            return
        for where in groups:
            torch._foreach_copy_([dst[i] for i in where], [src[i] for i in where])
