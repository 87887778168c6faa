"""Samples from PyTorch's own database of operators, as functions to differentiate, and their derivatives.

The derivatives are those of plain autograd, row by row; nothing here uses the package.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any
from unittest import mock

import hypothesis
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Function = Callable[..., Tensor]

_SMALL = 24  # elements of input and output, if there is such a sample; otherwise the smallest one
_LARGE = 130  # by all of the input up to here, otherwise by as many elements of the first argument as _SMALL
_ROWS = 100  # elements of each part of the output
_GENERATED = 100  # samples of an operator; convolutions have thousands
_LOOKED_AT = 20  # of them, those with something to differentiate
_EXTREME = 1e6  # numbers from here on aren't differentiated by


@contextmanager
def _global_settings_kept() -> Iterator[None]:
    """Importing PyTorch's test tools changes the settings of the process, which other tests run in, too."""
    profile: str = hypothesis.settings._current_profile  # older releases have no function that tells
    backends = torch.backends.flags_frozen.__globals__
    mutable = backends["__allow_nonbracketed_mutation_flag"]
    calls = [(kind, kind.__call__) for kind in (torch._C.ScriptFunction, torch._C.ScriptMethod)]
    try:
        yield
    finally:
        hypothesis.settings.load_profile(profile)
        backends["__allow_nonbracketed_mutation_flag"] = mutable
        for kind, call in calls:
            kind.__call__ = call


def operators() -> dict[str, Any]:
    """The operators with derivatives in float64, by name; ``ImportError`` without PyTorch's test tools."""
    with _global_settings_kept():
        from torch.testing._internal.common_methods_invocations import op_db
    return {
        f"{op.name}.{op.variant_test_name}".rstrip("."): op
        for op in op_db
        if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")
    }


@dataclass
class Sample:
    """``f`` of the floating arguments ``xs``: what the operator returns that has derivatives, in a row."""

    f: Function
    xs: list[Tensor]
    form: Any
    rows: int = 0

    @property
    def elements(self) -> int:
        return sum(x.numel() for x in self.xs)

    def by_first(self) -> Sample:
        """The same by the first argument alone, at the others."""
        return Sample(lambda x: self.f(x, *(x.clone() for x in self.xs[1:])), self.xs[:1], self.form)

    def by_part(self) -> Sample:
        """The same by the first elements of the first argument."""
        first = self.by_first()
        (x,) = first.xs
        rest = x.reshape(-1)[_SMALL:]
        f = lambda head: first.f(torch.cat([head, rest]).reshape(x.shape))
        return Sample(f, [x.reshape(-1)[:_SMALL]], self.form)

    def loss(self) -> tuple[Function, Tensor]:
        """A scalar whose second derivatives show those of ``f`` by the first argument, and where it is."""
        f = self.by_first().f
        return lambda x: weighted(f(x).sin()), self.xs[0]


def weighted(y: Tensor) -> Tensor:
    return (y * torch.arange(1, y.numel() + 1, dtype=y.dtype).mul(1.7).cos().add(0.2)).sum()


def _is_argument(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float64 and not _without_rows(leaf)


def _without_rows(t: Tensor) -> bool:
    return t.layout != torch.strided or t.is_nested or t.numel() == 0


def _in_a_row(result: Any) -> Tensor | None:
    parts = [t for t in tree_leaves(result) if isinstance(t, Tensor) and not _without_rows(t)]
    parts = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in parts]
    parts = [t.reshape(-1)[:_ROWS] for t in parts if t.is_floating_point()]
    return torch.cat(parts) if parts else None


def seeded(call: Callable[..., Any], *args: Any) -> Any:
    """What it returns, from the same random numbers each time."""
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes the stack for devices that aren't there
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what samples draw from
    return call(*args)


def _sample(op: Any, given: Any) -> Sample | None:
    """``None`` without floating arguments or a floating result, or where the numbers are extreme.

    Infinity in a result, or what overflows on the way, is NaN in other places in each way to differentiate.
    """
    leaves, spec = tree_flatten((given.input, given.args, given.kwargs))
    places = [i for i, leaf in enumerate(leaves) if _is_argument(leaf)]

    def f(*xs: Tensor) -> Any:
        # the operator may write into what isn't differentiated (running statistics), which must not add up
        filled = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for place, x in zip(places, xs, strict=True):
            filled[place] = x
        first, args, kwargs = tree_unflatten(filled, spec)
        return _in_a_row(given.output_process_fn_grad(op(first, *args, **kwargs)))

    if not places:
        return None
    xs = [leaves[place].detach() for place in places]
    with torch.no_grad():
        y = seeded(f, *xs)
    form = (spec, [leaf.dim() if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves])
    if y is None or not y.isfinite().all() or any(x.abs().max() > _EXTREME for x in xs):
        return None
    return Sample(f, xs, form, y.numel())


def samples(op: Any) -> list[Sample]:
    """The first small sample of an operator, and the last one of another form; or else the smallest one."""
    from torch.testing._internal import common_utils
    from torch.testing._internal.opinfo import core

    # which looks through the sources of the whole stack for a unittest.TestCase, for 0.1 s
    no_test = {"extract_test_fn": mock.Mock(return_value=None)}
    with mock.patch.multiple(common_utils, **no_test), mock.patch.multiple(core, **no_test):
        given = seeded(lambda: list(islice(op.sample_inputs("cpu", torch.float64), _GENERATED)))
    found = list(islice((sample for s in given if (sample := _sample(op, s)) is not None), _LOOKED_AT))
    small = [sample for sample in found if max(sample.elements, sample.rows) <= _SMALL]
    if small:
        return small[:1] + [sample for sample in small if sample.form != small[0].form][-1:]
    smallest = sorted(found, key=lambda sample: sample.elements + sample.rows)[:1]
    return [sample if sample.elements <= _LARGE else sample.by_part() for sample in smallest]


# ---------------------------------------------------------------------------------------------------------
# plain autograd


def _recorded(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in xs]


def _rows(y: Tensor, xs: Sequence[Tensor], **options: Any) -> list[list[Tensor]]:
    """The gradients of each element of ``y``, zero where it doesn't depend on an argument."""
    if not y.requires_grad:
        return [[torch.zeros_like(x) for x in xs] for _ in range(y.numel())]
    rows = []
    for seed in torch.eye(y.numel(), dtype=y.dtype):
        grads = torch.autograd.grad(y, xs, seed.reshape(y.shape), allow_unused=True, **options)
        rows.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, xs, strict=True)])
    return rows


def gradients(f: Function, xs: Sequence[Tensor]) -> list[Tensor]:
    xs = _recorded(xs)
    return _rows(f(*xs), xs)[0]


def jacobians(f: Function, xs: Sequence[Tensor]) -> list[Tensor]:
    xs = _recorded(xs)
    rows = _rows(f(*xs), xs, retain_graph=True)
    by_argument = [torch.stack([row[i] for row in rows]) for i in range(len(xs))]
    return [J.flatten(1) if x.dim() else J for J, x in zip(by_argument, xs, strict=True)]


def hessian(f: Function, x: Tensor) -> Tensor:
    (x,) = _recorded([x])
    ((gradient,),) = _rows(f(x), [x], create_graph=True)
    rows = [row.reshape(-1) for (row,) in _rows(gradient, [x], retain_graph=True)]
    return torch.stack(rows) if x.dim() else rows[0][0]
