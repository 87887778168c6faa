"""Running a function so that it can be differentiated; nesting is decided here and only here.

Three ways, one interface (:class:`Linearization`):

- at top level, and inside this package's own reverse mode: the autograd tape;
- inside a ``torch.func`` transform, or plain forward mode: a ``torch.func`` level of our own;
- while ``torch.compile`` traces: public ``torch.func`` only, which is all that Dynamo follows.

Knows nothing of matrices, chunks or results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _state
from ._arguments import Prepared, is_inexact, kind_of
from ._create_graph import compiling, keeps_graph, recording_if, refuse_export, refuse_recorder
from ._double_backward import pulled_for_another, refuse_reentrant, refuse_twice
from ._entry_point import entry_point
from ._error_notes import call, pulled
from ._exchange import exchanged, finding, swapped
from ._forward import forward_mode, jvp
from ._memory_layout import separate
from ._outputs import detached, differentiated_part
from ._state import in_transform
from ._tensor_holders import each_tensor
from ._torch_private import (
    NOTHING_TOLD,
    Survey,
    are_right_as_they_are,
    batched_like,
    coarsest,
    create_grad_input,
    grad_level,
    has_hooks,
    has_nodes_before,
    hooks_made,
    in_functorch,
    innermost_level,
    is_jit_tracing,
    keep_number,
    leave_grad_level,
    mark_as_own,
    next_number,
    only_pushed,
    pytree,
    scripts_as_written,
    sequence_number,
    survey,
    tracer_follows_pullbacks,
)
from ._unfused import unfused

__all__ = [
    "Linearization",
    "call",
    "call_exchanged",
    "compiling",
    "detached",
    "entry_point",
    "finding",
    "forward_mode",
    "in_transform",
    "jvp",
    "keeps_graph",
    "linearize",
    "recording_if",
    "separate",
    "swapped",
]


class Linearization:
    """``f`` at one point, ready to be pulled back: ``roots`` are its tensor outputs.

    ``inputs``: the tensors that are differentiated by. ``y`` is what ``f`` returned, as the code around this
    differentiation may see it. ``start``: what :func:`hooks_made` and :func:`sequence_number` said before
    ``f`` ran, if that is known. ``nested``: in a level of ``torch.func``. ``ends``: nodes of inputs that have
    a history, which no pullback comes to. ``number``: as for a survey.
    """

    __slots__ = (
        "__weakref__",
        "_ends",
        "_is_right",
        "_nested",
        "_number",
        "_pull",
        "_start",
        "_survey",
        "_y",
        "_y_is_recorded",
        "inputs",
        "prepared",
        "roots",
        "waiting",
        "y_leaves",
        "y_spec",
    )

    def __init__(
        self,
        prepared: Prepared,
        roots: list[Tensor],
        inputs: list[Tensor],
        start: tuple[int, int] | None = None,
        nested: bool = False,
        ends: frozenset[Any] = frozenset(),
        number: int | None = None,
    ) -> None:
        self.prepared = prepared
        self.roots = roots
        self.inputs = inputs
        self._y: Any = None
        self._y_is_recorded = False
        self.y_leaves: list[Any] = []
        self.y_spec: Any = None
        self.waiting: list[_state.Waiting] = []
        self._pull: Callable[..., Any] | None = None
        self._survey: Survey | None = None
        self._is_right = False
        self._start, self._ends, self._number = start, ends, number
        self._nested = nested

    @property
    def y(self) -> Any:
        """What ``f`` returned; small calls that don't ask for it don't wait until it is detached."""
        if self._y_is_recorded:
            self._y, self._y_is_recorded = detached(self._y), False
        return self._y

    def onward(self, roots: list[Tensor], inputs: list[Tensor]) -> Linearization:
        """What has been computed from this one, by ``inputs``."""
        return Linearization(
            self.prepared, roots, inputs, self._start, self._nested, self._ends, self._number
        )

    def may_be_bent(self) -> bool:
        """Whether hooks may change what is pulled back, or keep it: the recorded graph doesn't show them."""
        if self._start is None or hooks_made() != self._start[0]:
            return True
        if all(self.prepared.owned):
            return False
        # What Params hold may have hooks, and so may what was computed from it before.
        return any(map(has_hooks, self.inputs)) or has_nodes_before(self.roots, self._start[1])

    def pull(
        self,
        cotangents: Sequence[Tensor | None],
        *,
        retain: bool = True,
        create_graph: bool = False,
        pushed: bool = False,
    ) -> list[Tensor | None]:
        """One pullback: a cotangent (or ``None``) per root gives a gradient (or ``None``) per input.

        ``pushed``: it is going to be differentiated by forward mode only.
        """
        if self._pull is not None:
            return self._pull_compiled(cotangents)
        pairs = zip(self.roots, cotangents, strict=True)
        asked = [(root, seed) for root, seed in pairs if seed is not None and root.requires_grad]
        if not asked or not self.inputs:
            return [None] * len(self.inputs)
        roots, seeds = [root for root, _ in asked], [seed for _, seed in asked]
        if innermost_level() is not None:
            seeds = [batched_like(seed, root) for seed, root in zip(seeds, roots, strict=True)]
        custom = sparse = rewritten = copies = []
        if create_graph or self._nested:
            found = self.told_of(roots)
            rewritten = found.running
        if create_graph:
            if not (pushed or only_pushed()):
                rewritten = rewritten + found.biased
                if found.once:
                    refuse_twice(found.once, self.inputs)
            if not (self._nested or in_functorch()):  # there is no tape to ask
                custom, sparse, copies = found.custom, found.sparse, found.copies
        if not create_graph and self._nested:
            # As torch.func.vjp does it: under vmap PyTorch's backward of torch.linalg.solve is wrong else.
            results = pulled_for_another(roots, seeds, self.inputs, True, [], [], rewritten, [])
            return [None if g is None else g.detach() for g in results]
        if rewritten or sparse or custom or copies:
            results = pulled_for_another(roots, seeds, self.inputs, retain, custom, sparse, rewritten, copies)
        else:
            results = pulled(roots, seeds, self.inputs, retain, create_graph, self.prepared)
        for result in results:
            if result is None:
                refuse_reentrant(roots, self._ends)
                break
        return results

    def pull_dense(
        self, cotangents: Sequence[Tensor | None], *, create_graph: bool = False
    ) -> list[Tensor | None]:
        """:meth:`pull`, with dense tensors where a backward gives sparse ones, as ``nn.Embedding`` may."""
        results = self.pull(cotangents, create_graph=create_graph)
        return [g if g is None or g.layout is torch.strided else g.to_dense() for g in results]

    def survey(self) -> Survey:
        """What the recorded graph of all roots tells."""
        if self._survey is None:
            self._survey = survey(self.roots, self._ends, self.inputs, self._number)
        return self._survey

    def told_of(self, roots: list[Tensor]) -> Survey:
        """The same of some roots, as far as a pullback that is pulled back again is concerned."""
        whole = len(roots) == len(self.roots)
        if whole and self._survey is not None:
            return self._survey
        if self._is_right or are_right_as_they_are(roots, self._ends, self._number):
            self._is_right = self._is_right or whole
            return NOTHING_TOLD
        return self.survey() if whole else survey(roots, self._ends, self.inputs, self._number)

    def nbytes(self) -> int:
        """What a pullback of one row needs at most, if all gradients have the dtype of the first root."""
        return self.survey().numel * self.roots[0].element_size() if self.roots else 0

    def coarsest(self) -> float:
        """Relative spacing of the coarsest numbers that have been recorded."""
        return max(coarsest(self.roots, self._ends, self.inputs, self._number), self.survey().rounded)

    def restricted(self, root: int, by: int) -> Linearization:
        """``roots[root]`` alone, by ``inputs[by]`` alone: what isn't asked for isn't computed."""
        if len(self.roots) == len(self.inputs) == 1:
            return self
        part = self.onward([self.roots[root]], [self.inputs[by]])
        if len(self.roots) == 1:
            part._survey = self._survey
        if self._pull is not None:
            whole = self

            def pull(cotangents: tuple[Tensor]) -> list[Tensor | None]:
                full: list[Tensor | None] = [None] * len(whole.roots)
                full[root] = cotangents[0]
                return [whole._pull_compiled(full)[by]]

            part._pull = pull
        return part

    def _pull_compiled(self, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        assert self._pull is not None
        full = [
            torch.zeros_like(root) if cotangent is None else cotangent
            for root, cotangent in zip(self.roots, cotangents, strict=True)
        ]
        return list(self._pull(tuple(full)))


def _tracked_on_tape(prepared: Prepared, keep: bool, number: int | None) -> list[Tensor]:
    """Twins of the inputs that the tape records; writing into one in place is refused by PyTorch.

    ``number``: as for a survey.
    """
    tracked = []
    for x, owned in zip(prepared.inputs, prepared.owned, strict=True):
        if not owned:
            tracked.append(x)
        elif keep and x.requires_grad:
            # A view from a multi-view function: keeps the outer history, and refuses writes in place.
            tracked.append(x.unsqueeze(0).unbind()[0])
        else:
            twin = x.detach().requires_grad_()
            if keep:
                mark_as_own(twin)
            tracked.append(twin)
    if number is not None:
        for twin in tracked:
            keep_number(twin, number)
    return tracked


def linearize(
    f: Callable[..., Any], prepared: Prepared, *, keep: bool, scalar_aux: bool = False
) -> Linearization:
    """Run ``f`` once, recording it.

    ``keep``: results will be differentiable themselves. ``scalar_aux``: only the first field of a returned
    tuple is differentiated. The caller is inside :func:`_state.differentiation`.
    """
    if compiling():
        refuse_export()
        with unfused():
            return _linearize_compiled(f, prepared, scalar_aux)
    if is_jit_tracing():
        refuse_recorder("torch.jit.trace", "trace")
    nested = in_transform()
    way = _linearize_functorch if nested else _linearize_on_tape
    if not (keep or nested):
        _state.drop_graph()
        return way(f, prepared, keep, scalar_aux)
    with unfused() if keep else scripts_as_written():
        return way(f, prepared, keep, scalar_aux)


def _linearize_on_tape(
    f: Callable[..., Any], prepared: Prepared, keep: bool, scalar_aux: bool
) -> Linearization:
    start = (hooks_made(), sequence_number())
    # A loop of derivatives would walk along all that came before, each time. Not by sequence numbers: what f
    # computes in other threads has theirs.
    number = next_number() if keep and all(prepared.owned) else None
    if torch.is_grad_enabled():
        tracked = _tracked_on_tape(prepared, keep, number)
        y = call(f, prepared, tracked)
    else:
        with torch.enable_grad():
            tracked = _tracked_on_tape(prepared, keep, number)
            y = call(f, prepared, tracked)
    ends = [x.grad_fn for x, owned in zip(tracked, prepared.owned, strict=True) if owned] if keep else []
    lin = Linearization(prepared, [], tracked, start, ends=frozenset(filter(None, ends)), number=number)
    _take_outputs(lin, y, scalar_aux)
    lin._y, lin._y_is_recorded = y, not keep
    return lin


def _take_outputs(lin: Linearization, y: Any, scalar_aux: bool) -> None:
    part = differentiated_part(y) if scalar_aux else y
    if not isinstance(part, Tensor) and kind_of(part) == "structure":
        lin.y_leaves, lin.y_spec = pytree.tree_flatten(part)
    else:
        lin.y_leaves = [part]
    lin.roots = [leaf for leaf in lin.y_leaves if is_inexact(leaf)]


def call_exchanged(f: Callable[..., Any], prepared: Prepared, tracked: Sequence[Tensor]) -> Any:
    """:func:`call`, where what ``f`` finds by identity has its twins among ``tracked``."""
    mine = [x for x, owned in zip(prepared.inputs, prepared.owned, strict=True) if not owned]
    if not mine:
        return call(f, prepared, tracked)
    held = {id(x) for x in mine}
    with exchanged(mine, [x for x, owned in zip(tracked, prepared.owned, strict=True) if not owned]):
        y = call(f, prepared, tracked)
        # An object whose tensor is about to be exchanged back is no result.
        return pytree.tree_map(lambda leaf: leaf.view_as(leaf) if id(leaf) in held else leaf, y)


def _linearize_functorch(
    f: Callable[..., Any], prepared: Prepared, keep: bool, scalar_aux: bool
) -> Linearization:
    """Like ``torch.func.vjp``, but "does not depend on" stays distinguishable from zero."""
    # What f finds by identity gets a twin of its own; made out here, lest the new level wraps it.
    sources = [x if owned else x.view_as(x) for x, owned in zip(prepared.inputs, prepared.owned, strict=True)]
    with grad_level() as level, torch.enable_grad():
        twins = [create_grad_input(x, level) for x in sources]
        tracked = [twins[place] for place in prepared.places()]
        y = call_exchanged(f, prepared, tracked)
        lin = Linearization(prepared, [], tracked, nested=True)
        _take_outputs(lin, y, scalar_aux)
        lin._y = each_tensor(lambda leaf: leave_grad_level(leaf, level), y)
    lin._y_is_recorded = not keep  # under vmap alone
    return lin


def _linearize_compiled(f: Callable[..., Any], prepared: Prepared, scalar_aux: bool) -> Linearization:
    """Public ``torch.func.vjp``; an input that ``f`` doesn't use gives zeros here."""
    if not all(prepared.owned):
        raise RuntimeError(
            "inside torch.compile, modules and Params can't be differentiated by identity: pass the "
            "parameters as arguments and call the module with torch.func.functional_call"
        )
    kept: dict[str, Any] = {}

    def flat(*inputs: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        y = f(*prepared.arguments(inputs))
        part = differentiated_part(y) if scalar_aux else y
        leaves, kept["spec"] = pytree.tree_flatten(part)
        kept["structured"] = not pytree.tree_is_leaf(part)
        kept["leaves"] = [None if is_inexact(leaf) else (leaf,) for leaf in leaves]
        # vjp hands tensors on, nothing else, and wants at least one to differentiate.
        given, kept["y"] = pytree.tree_flatten(y)
        kept["given"] = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in given]
        roots = tuple(leaf for leaf in leaves if is_inexact(leaf))
        return roots or (torch.zeros(()),), tuple(leaf for leaf in given if isinstance(leaf, Tensor))

    if tracer_follows_pullbacks:
        traced: tuple[Any, ...] = torch.func.vjp(flat, *prepared.inputs, has_aux=True)
    else:
        from ._pullback_traced import vjp_traced

        traced = vjp_traced(flat, *prepared.inputs)
    roots, pull, tensors = traced
    constant = None not in kept["leaves"]
    lin = Linearization(prepared, [] if constant else list(roots), list(prepared.inputs))
    lin._pull = None if constant else pull
    given = iter(tensors)
    lin._y = pytree.tree_unflatten(
        [next(given) if leaf is None else leaf[0] for leaf in kept["given"]], kept["y"]
    )
    remaining = iter(roots)
    lin.y_leaves = [next(remaining) if leaf is None else leaf[0] for leaf in kept["leaves"]]
    lin.y_spec = kept["spec"] if kept["structured"] else None
    return lin
