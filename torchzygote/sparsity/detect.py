"""Which entries of a Jacobian or Hessian can be nonzero: found by one run of the function.

Knows how to run the function safely and what to give up on; nothing of colorings or products.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from .. import _state
from .._call_options import check_callable
from .._error_notes import call
from .._hidden_derivatives import cutting, watching
from .._memory_layout import copied_in_place
from .._outputs import real_scalar
from .._random import OneRun, RandomState
from .._real_arguments import prepare_one
from .._torch_private import (
    custom_function_of,
    dynamo_is_loaded,
    in_functorch,
    node_name,
    reaches,
    survey,
    uncompiled,
)
from .._unfused import unfused
from ..native.index_sets import expand_pairs, expand_sets
from ._recorder import recorder
from ._replay import Replay
from ._sets import OverBudget
from ._trace import Program, Ref
from .pattern import Pattern, indptr_of
from .rules import PROBES

__all__ = ["DEFAULT_BUDGET", "hessian_patterns", "hessian_sparsity", "jacobian_patterns"]

logger = logging.getLogger("torchzygote")

# Members and couplings that detection may store: about a gigabyte.
DEFAULT_BUDGET = 1 << 27


class _RecordedRun(NamedTuple):
    """One recorded run: ``why_dense`` says what kept the structure from being seen."""

    value: Any
    program: Program
    inputs: list[Ref]
    output: Ref | None
    why_dense: str | None


def _twin(x: Tensor, owned: bool) -> Tensor:
    """A copy that only ``f``'s argument is: a tensor that ``f`` closes over must not be taken for it."""
    if not owned:
        return x
    return copied_in_place(x).requires_grad_()


def _run(
    f: Callable[..., Any],
    inputs: Sequence[Tensor],
    owned: Sequence[bool],
    varying: Sequence[Any] = (),
) -> _RecordedRun:
    """Run ``f``, written down; random state, statistics and callbacks are left as they were."""
    known = dynamo_is_loaded()
    run = _recorded(f, inputs, owned, varying)
    if not known and dynamo_is_loaded():
        # f may have compiled something, which hides its operators; now that Dynamo is there, it won't.
        run = _recorded(f, inputs, owned, varying)
    return run


def _recorded(
    f: Callable[..., Any], inputs: Sequence[Tensor], owned: Sequence[bool], varying: Sequence[Any]
) -> _RecordedRun:
    """One run of ``f`` under a recorder, as far as it gets."""
    random = RandomState()
    position = _state.mark()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        unfused(),
        _state.differentiation(),
        watching() as hidden,
    ):
        _state.drop_graph()
        twins = [_twin(x, own) for x, own in zip(inputs, owned, strict=True)]
        written = recorder(twins, PROBES, varying)
        refs = [written.depends(x) for x in twins]
        reason = None
        try:
            with uncompiled(), written, cutting(written.cut):
                value = f(*twins)
        except Exception as error:
            reason = f"f can't be recorded: {type(error).__name__}: {error}"
        finally:
            written.undo()
            random.restore()
            _state.forget_since(position)
        if reason is not None:
            value = f(*twins)  # raises what f raises, if it is f that does
            random.restore()
    reason = reason or written.unsupported or (f"{hidden[0]} in f" if hidden else None)
    output = written.reference(value) if isinstance(value, Tensor) else None
    return _RecordedRun(value, written.program(), refs, output, reason or _unseen(value, output, twins))


def _unseen(value: Any, output: Ref | None, twins: Sequence[Tensor]) -> str | None:
    """Why the recorded operators may not be all there is to the derivative, if so."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return None
    for node in survey([value]).custom:
        forward = custom_function_of(node)
        if forward is not CheckpointFunction and not getattr(forward, "derivative_of_forward", False):
            # Its backward may be that of another function (a straight-through estimator).
            return f"the custom autograd function {node_name(node).removesuffix('Backward')}"
    return "an operation out of sight" if output is None and reaches([value], twins) else None


def _give_up(why: str) -> None:
    logger.debug("sparsity: taken as dense: %s", why)


def _about(run: _RecordedRun, replay: Replay | None) -> dict[str, Any]:
    return {
        "is_local": run.program.is_local or (replay is not None and replay.context.local),
        "unknown": tuple(replay.unknown) if replay is not None else (),
        "operators": run.program.operators,
    }


def jacobian_patterns(
    f: Callable[..., Any],
    inputs: Sequence[Tensor],
    owned: Sequence[bool],
    budget: int,
    varying: Sequence[Any] = (),
) -> tuple[Any, list[Pattern]]:
    """What ``f`` returned, and the pattern of the Jacobian by each input, ``(y.numel(), x.numel())``.

    ``owned``: ``False`` for an input that ``f`` finds by identity. ``budget``: how many members of index sets
    may be stored; beyond that, the patterns are dense. ``varying``: other values that the next call may
    replace.
    """
    run = _run(f, inputs, owned, varying)
    rows = run.value.numel() if isinstance(run.value, Tensor) else int(getattr(run.value, "size", 1))
    replay = None
    try:
        if run.why_dense is None:
            if run.output is None:
                return run.value, [_empty(rows, x.numel(), run) for x in inputs]
            replay = Replay(run.program, run.inputs, budget, second=False)
            ids = replay.run(run.output).reshape(-1)
            return run.value, _split(ids, replay, _about(run, replay))
        _give_up(run.why_dense)
    except OverBudget:
        _give_up("over budget")
    return run.value, [Pattern.full((rows, x.numel()), **_about(run, replay)) for x in inputs]


def _empty(rows: int, columns: int, run: _RecordedRun) -> Pattern:
    nothing = torch.empty(0, dtype=torch.int64, device="cpu")
    return Pattern(
        (rows, columns), torch.zeros(rows + 1, dtype=torch.int64, device="cpu"), nothing, **_about(run, None)
    )


def _split(ids: Tensor, replay: Replay, about: dict[str, Any]) -> list[Pattern]:
    """Rows of index sets cut into one pattern for each input."""
    sets = replay.sets
    sizes = sets.sizes(ids)
    if ids.numel() > 0 and int(sizes.min()) == sets.size:  # nothing of what is full need be stored
        widths = [hi - lo for lo, hi in itertools.pairwise(replay.bounds)]
        return [Pattern.full((ids.numel(), width), given_up=False, **about) for width in widths]
    sets.spend(int(sizes.sum()))
    rows, columns = expand_sets(sets.ptr, sets.members, ids)
    if len(replay.bounds) == 2:
        return [Pattern((ids.numel(), replay.bounds[1]), indptr_of(sizes), columns, **about)]
    patterns = []
    for lo, hi in zip(replay.bounds, replay.bounds[1:], strict=False):
        inside = (columns >= lo) & (columns < hi)
        counts = torch.bincount(rows[inside], minlength=ids.numel())
        patterns.append(Pattern((ids.numel(), hi - lo), indptr_of(counts), columns[inside] - lo, **about))
    return patterns


def hessian_patterns(
    f: Callable[..., Any],
    inputs: Sequence[Tensor],
    owned: Sequence[bool],
    budget: int,
) -> tuple[Any, list[Pattern]]:
    """What ``f`` returned, and by each input the symmetric pattern of the Hessians of all its elements.

    Those that mix two inputs are not looked for.
    """
    run = _run(f, inputs, owned)
    sizes = [x.numel() for x in inputs]
    replay = None
    try:
        if run.why_dense is None:
            if run.output is None:
                return run.value, [_empty(n, n, run) for n in sizes]
            replay = Replay(run.program, run.inputs, budget, second=True)
            replay.run(run.output)
            return run.value, _blocks(replay, _about(run, replay))
        _give_up(run.why_dense)
    except OverBudget:
        _give_up("over budget")
    return run.value, [Pattern.full((n, n), **_about(run, replay)) for n in sizes]


def _blocks(replay: Replay, about: dict[str, Any]) -> list[Pattern]:
    """The couplings expanded to one symmetric pattern for each input."""
    sets = replay.sets
    first, second = replay.context.pairs()
    if bool((torch.minimum(sets.sizes(first), sets.sizes(second)) == sets.size).any()):
        widths = [hi - lo for lo, hi in itertools.pairwise(replay.bounds)]
        return [Pattern.full((width, width), given_up=False, **about) for width in widths]
    bounds = torch.tensor(replay.bounds, device="cpu")
    indptr, indices = expand_pairs(sets.ptr, sets.members, first, second, bounds, sets.budget - sets.used)
    if indptr.numel() != sets.size + 1:
        raise OverBudget
    patterns = []
    for lo, hi in zip(replay.bounds, replay.bounds[1:], strict=False):
        begin, end = int(indptr[lo]), int(indptr[hi])
        patterns.append(
            Pattern((hi - lo, hi - lo), indptr[lo : hi + 1] - begin, indices[begin:end] - lo, **about)
        )
    return patterns


def hessian_sparsity(f: Callable[..., Any], x: Any) -> Tensor:
    """Structure of the Hessian: which entries can be nonzero.

    Parameters
    ----------
    f : callable
        ``f(x)`` is a real scalar. It is run once.
    x : number or array
        As for :func:`hessian`.

    Returns
    -------
    torch.Tensor
        A symmetric ``torch.sparse_csr`` tensor of dtype bool, shape ``(x.numel(), x.numel())``; its entries
        and its attribute ``is_local`` mean what they do for :func:`jacobian_sparsity`.

    Raises
    ------
    TypeError
        ``f`` is no function, or ``x`` is a structure, a module or opaque.
    ValueError
        ``x`` is complex, or ``f(x)`` is complex or no scalar.
    RuntimeError
        Inside a ``torch.func`` transform or ``torch.compile``.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import hessian_sparsity
    >>> hessian_sparsity(lambda x: (x[1:] * x[:-1]).sum(), torch.rand(4)).to_dense().int()
    tensor([[0, 1, 0, 0],
            [1, 0, 1, 0],
            [0, 1, 0, 1],
            [0, 0, 1, 0]], dtype=torch.int32)
    """
    check_callable("hessian_sparsity", f)
    refuse_transforms("hessian_sparsity")
    prepared = prepare_one("hessian_sparsity", x)

    flat = OneRun(lambda *inputs: call(f, prepared, inputs))
    value, patterns = hessian_patterns(flat, prepared.inputs, prepared.owned, DEFAULT_BUDGET)
    flat.settle()
    real_scalar("hessian_sparsity", value)
    return patterns[0].to_csr(prepared.inputs[0].device)


def refuse_transforms(caller: str) -> None:
    """Structure is found from memory and values, which torch.func's wrappers hide."""
    if in_functorch() or torch.compiler.is_compiling():
        raise RuntimeError(
            f"{caller}: expected a plain call, got one inside a torch.func transform or torch.compile; "
            "find the structure outside and reuse it"
        )
