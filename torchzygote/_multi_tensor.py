"""One operation over many tensors, as one multi-tensor call per device and dtype.

Knows nothing of parameters or gradients. ``torch._foreach_*`` has no rule for ``torch.func.vmap``, lacks some
derivatives and doesn't sum a derivative over broadcast axes: what is recorded beyond the plainest case goes
through the ordinary operators, one tensor at a time, and so do sparse tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._engine import non_overlapping
from ._torch_private import in_forward_ad, in_functorch

__all__ = [
    "OPERATORS",
    "REFLECTED",
    "Operator",
    "apply",
    "apply_",
    "by_kind",
    "clone_all",
    "copy_all",
    "describe",
    "flatten",
    "parts_of",
    "recorded",
    "writable",
]

Number = int | float | complex
Operand = Number | Tensor | list[Tensor] | tuple[float, float]  # the last for clipping


Label = Callable[[int], str]


def _position(i: int) -> str:
    return f"value {i}"


class Operator(NamedTuple):
    """A binary operator: for one tensor, for many, for many in place."""

    symbol: str
    one: Callable[[Any, Any], Any]
    many: Callable[[list[Tensor], Any], Sequence[Tensor]]
    many_: Callable[[list[Tensor], Any], None] | None


def _subtract(xs: list[Tensor], right: Any) -> Sequence[Tensor]:
    if isinstance(right, Tensor):
        return torch._foreach_add(xs, right, alpha=-1)
    return torch._foreach_sub(xs, right)


def _subtract_(xs: list[Tensor], right: Any) -> None:
    if isinstance(right, Tensor):
        torch._foreach_add_(xs, right, alpha=-1)
    else:
        torch._foreach_sub_(xs, right)


def _power(xs: list[Tensor], right: Any) -> Sequence[Tensor]:
    return torch._foreach_pow(xs, [right] * len(xs) if isinstance(right, Tensor) else right)


def _power_(xs: list[Tensor], right: Any) -> None:
    torch._foreach_pow_(xs, [right] * len(xs) if isinstance(right, Tensor) else right)


def _subtract_from(xs: list[Tensor], left: Any) -> Sequence[Tensor]:
    return torch._foreach_add(torch._foreach_neg(xs), left)


def _divide_into(xs: list[Tensor], left: Any) -> Sequence[Tensor]:
    if not isinstance(left, Tensor):
        dtype = (
            torch.promote_types(xs[0].dtype, torch.complex32) if isinstance(left, complex) else xs[0].dtype
        )
        left = torch.full((), left, dtype=dtype, device=xs[0].device)
    return torch._foreach_div([left] * len(xs), xs)


def _raise_to(xs: list[Tensor], left: Any) -> Sequence[Tensor]:
    if isinstance(left, Tensor):
        return torch._foreach_pow([left] * len(xs), xs)
    return torch._foreach_pow(left, xs)


OPERATORS = {
    "+": Operator("+", operator.add, torch._foreach_add, torch._foreach_add_),
    "-": Operator("-", operator.sub, _subtract, _subtract_),
    "*": Operator("*", operator.mul, torch._foreach_mul, torch._foreach_mul_),
    "/": Operator("/", operator.truediv, torch._foreach_div, torch._foreach_div_),
    "**": Operator("**", operator.pow, _power, _power_),
}
REFLECTED = {
    "+": Operator("+", lambda x, n: n + x, torch._foreach_add, None),
    "-": Operator("-", lambda x, n: n - x, _subtract_from, None),
    "*": Operator("*", lambda x, n: n * x, torch._foreach_mul, None),
    "/": Operator("/", lambda x, n: n / x, _divide_into, None),
    "**": Operator("**", lambda x, n: n**x, _raise_to, None),
}


def describe(x: Tensor) -> str:
    """Dtype and shape in a few characters."""
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


# -- what can go together ------------------------------------------------------------------------------------


def by_kind(xs: Sequence[Tensor]) -> list[list[int]]:
    """Positions of the tensors of each device and dtype."""
    if not xs:
        return []
    device, dtype = xs[0].device, xs[0].dtype
    if all(x.dtype is dtype and x.device == device for x in xs):
        return [list(range(len(xs)))]
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault((x.device, x.dtype), []).append(i)
    return list(groups.values())


def recorded(tensors: Iterable[Tensor]) -> bool:
    """Whether an operation on one of ``tensors`` is differentiated or batched by anybody."""
    if in_functorch() or in_forward_ad():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


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


def _alike(xs: list[Tensor], right: Operand) -> bool:
    """The common case, told fast: dense, all of one kind, pairs of one shape, and nothing is recorded."""
    if not xs or in_functorch() or in_forward_ad() or isinstance(right, complex):
        return False
    dtype, device, tape = xs[0].dtype, xs[0].device, torch.is_grad_enabled()
    if not (dtype.is_floating_point or dtype.is_complex):
        return False
    if isinstance(right, Tensor) and (right.is_complex() or (tape and right.requires_grad)):
        return False
    for x in xs + right if isinstance(right, list) else xs:
        if x.dtype is not dtype or x.layout is not torch.strided or x.device != device:
            return False
        if tape and x.requires_grad:
            return False
    return not isinstance(right, list) or [x.shape for x in xs] == [y.shape for y in right]


def _at(operand: Operand, where: list[int]) -> Operand:
    return [operand[i] for i in where] if isinstance(operand, list) else operand


def _nth(operand: Operand, i: int) -> Any:
    return operand[i] if isinstance(operand, list) else operand


def _for_many(xs: list[Tensor], right: Operand) -> Operand:
    """A 0-dim tensor as the multi-tensor call for ``xs`` takes it."""
    if not isinstance(right, Tensor):
        return right
    if right.device.type == "cpu" and xs[0].device.type != "cpu":
        number: Number = right.item()
        return number
    return right.to(xs[0].device, copy=True)  # one of the tensors written to may be this very one


# -- the operators -------------------------------------------------------------------------------------------


def apply(op: Operator, xs: list[Tensor], right: Operand, label: Label = _position) -> list[Tensor]:
    """``op(x, right)`` for each ``x``; ``right`` is a number, a 0-dim tensor or a list, one per ``x``.

    ``label(i)`` says in an error which ``x`` it is about.
    """
    if _alike(xs, right):
        return list(op.many(xs, _for_many(xs, right)))
    _check(op, xs, right, label, in_place=False)
    dense = [
        i
        for i, x in enumerate(xs)
        if _is_strided(x) and (not isinstance(right, list) or _is_strided(right[i]))
    ]
    out: list[Any] = [None] * len(xs)
    if len(dense) < len(xs):
        for i in set(range(len(xs))).difference(dense):
            out[i] = _one_sparse(op, xs[i], _nth(right, i))
    if not _together(op, xs, right):
        for i in dense:
            out[i] = op.one(xs[i], _nth(right, i))
        return out
    for among in by_kind([xs[i] for i in dense]):
        where = [dense[i] for i in among]
        group = [xs[i] for i in where]
        for i, y in zip(where, op.many(group, _for_many(group, _at(right, where))), strict=True):
            out[i] = y
    return out


def apply_(op: Operator, xs: list[Tensor], right: Operand, label: Label = _position) -> list[Tensor]:
    """The same, written into each ``x`` where that can be; returns the tensors that hold the results.

    What can't be written into is replaced: see :func:`writable`. Errors come before anything is written.
    """
    assert op.many_ is not None
    if not _alike(xs, right):
        _check(op, xs, right, label, in_place=True)
    elif _all_writable(xs) and not _crossed(xs, right):
        op.many_(xs, _for_many(xs, right))
        return xs
    if recorded(_operands(xs, right)):
        return [y.to(x.dtype) for x, y in zip(xs, apply(op, xs, right), strict=True)]
    if isinstance(right, list):
        right = _apart(xs, right)
    out = list(xs)
    inside, replaced = writable(xs)
    seen: set[int] = set()
    for i in [i for i in inside if xs[i].numel() > 0]:
        if xs[i].data_ptr() in seen:  # two values with one memory would both be written into it
            inside.remove(i)
            replaced.append(i)
        seen.add(xs[i].data_ptr())
    for i, y in zip(replaced, apply(op, [xs[i] for i in replaced], _at(right, replaced)), strict=True):
        out[i] = y.to(xs[i].dtype)
    for among in by_kind([xs[i] for i in inside]):
        where = [inside[i] for i in among]
        group = [xs[i] for i in where]
        op.many_(group, _for_many(group, _at(right, where)))
    return out


def _is_strided(x: Tensor) -> bool:
    return x.layout is torch.strided


def _one_sparse(op: Operator, x: Tensor, y: Any) -> Tensor:
    """Sparse stays sparse where zeros stay zeros; elsewhere the result is dense."""
    scalar = not isinstance(y, Tensor) or y.dim() == 0
    if scalar:
        keeps = op.symbol == "*" or op is OPERATORS["/"]
    else:
        keeps = op.symbol in "+-" and x.layout is y.layout
    if not keeps:
        x = x if _is_strided(x) else x.to_dense()
        y = y if not isinstance(y, Tensor) or _is_strided(y) else y.to_dense()
    result: Tensor = op.one(x, y)
    return result


def _crossed(xs: list[Tensor], right: Operand) -> bool:
    """Whether writing into one of ``xs`` might change the operand of another."""
    if not isinstance(right, list):
        return False
    return not {id(x) for x in xs}.isdisjoint([id(y) for x, y in zip(xs, right, strict=True) if x is not y])


def _apart(xs: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    """``right``, cloned where writing into another ``x`` first would change it."""
    positions = {id(x): i for i, x in enumerate(xs)}
    return [y.clone() if positions.get(id(y), i) != i else y for i, y in enumerate(right)]


def _all_writable(xs: list[Tensor]) -> bool:
    """Whether :func:`writable` finds nothing to replace, told fast for the common case."""
    if len({x.data_ptr() for x in xs}) == len(xs) and all(
        x.is_contiguous() and not x.is_inference() for x in xs
    ):
        return True
    pointers = [x.data_ptr() for x in xs if x.numel() > 0]
    return len(set(pointers)) == len(pointers) and not writable(xs)[1]


def writable(xs: list[Tensor]) -> tuple[list[int], list[int]]:
    """Positions of the tensors that can be written into, and of those that must be replaced instead.

    Those are sparse ones, expanded ones, one that occurs again, and tensors made in inference mode.
    """
    seen: set[int] = set()
    can: list[int] = []
    cannot: list[int] = []
    for i, x in enumerate(xs):
        fits = (
            _is_strided(x)
            and id(x) not in seen
            and (x.is_contiguous() or non_overlapping(x))
            and (not x.is_inference() or torch.is_inference_mode_enabled())
        )
        seen.add(id(x))
        (can if fits else cannot).append(i)
    return can, cannot


def _check(op: Operator, xs: list[Tensor], right: Operand, label: Label, in_place: bool) -> None:
    """Refuse operands that don't go together."""
    if in_place and not isinstance(right, tuple):
        seen: set[Any] = set()
        for i, x in enumerate(xs):
            y = _nth(right, i)
            kind = (x.dtype, x.dim() > 0, y.dtype, y.dim() > 0) if isinstance(y, Tensor) else x.dtype
            if kind in seen:
                continue
            seen.add(kind)
            whole = not (x.dtype.is_floating_point or x.dtype.is_complex)
            if (whole and op.symbol == "/") or not torch.can_cast(torch.result_type(x, y), x.dtype):
                raise _unfit_dtype(op, x, y, label(i))
    if not isinstance(right, list):
        return
    for i, (x, y) in enumerate(zip(xs, right, strict=True)):
        if x.dtype is y.dtype and x.shape == y.shape and x.device == y.device:
            continue
        if x.device != y.device and y.dim() > 0:
            raise ValueError(
                f"{op.symbol}: expected values on one device for {label(i)}, got {x.device} and {y.device}; "
                "move one of them"
            )
        try:
            shape: Any = torch.broadcast_shapes(x.shape, y.shape)  # type: ignore[no-untyped-call]
        except RuntimeError:
            shape = None
        if shape is None or (in_place and shape != x.shape):
            raise ValueError(
                f"{op.symbol}: expected values of shapes that fit for {label(i)}, got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )


def _unfit_dtype(op: Operator, x: Tensor, y: Any, label: str) -> TypeError:
    got = describe(y) if isinstance(y, Tensor) else repr(y)
    return TypeError(
        f"{op.symbol}=: expected what fits the dtype {x.dtype} of the value of {label}, got {got}; "
        f"write a = a {op.symbol} b"
    )


def clone_all(xs: list[Tensor]) -> list[Tensor]:
    """Copies with memory of their own."""
    many = getattr(torch, "_foreach_clone", None)  # newer than the oldest PyTorch that we support
    if many is not None and _alike(xs, 1):
        return list(many(xs))
    if many is None or recorded(xs) or not all(map(_is_strided, xs)):
        return [x.clone() for x in xs]
    out: list[Any] = [None] * len(xs)
    for where in by_kind(xs):
        for i, y in zip(where, many([xs[i] for i in where]), strict=True):
            out[i] = y
    return out


# -- one vector ----------------------------------------------------------------------------------------------


def flatten(xs: list[Tensor]) -> Tensor:
    """All elements in one new vector, on the device of the first."""
    if not xs:
        return torch.zeros(0)
    dense = [x if _is_strided(x) else x.to_dense() for x in xs]
    device = dense[0].device
    return torch.cat([x.reshape(-1).to(device) for x in dense])


def parts_of(vector: Tensor, xs: list[Tensor]) -> list[Tensor]:
    """Consecutive parts of ``vector`` in the shapes of the tensors; views."""
    parts = torch.split(vector, [x.numel() for x in xs])
    return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]


def copy_all(dst: list[Tensor], src: list[Tensor]) -> None:
    """Write each tensor into its fellow, which can be written into; nothing is recorded."""
    with torch.no_grad():
        for where in by_kind(dst):
            torch._foreach_copy_([dst[i] for i in where], [src[i] for i in where])
