"""The gradient of a scalar function, recorded so that it can be differentiated itself.

One forward pass gives value, gradient and what Hessian rows are pulled back from. Knows nothing of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _cost_model, _engine, _state
from ._arguments import Prepared
from ._cost_model import FREE, RowCost
from ._double_backward import are_norms_refused
from ._engine import Linearization
from ._other_ways import suppressed
from ._outputs import real_scalar
from ._random import RandomState
from ._recorded.affine import AffineMap, Entrance, entrances
from ._row_cost import is_linear, is_plain
from ._torch_private import is_leaf, multiplications
from ._unfused import unfused

__all__ = ["SecondOrder", "Seen", "gradient_by", "run"]

# What one column of several takes while it is pushed through f and its gradient, in gradients that f's graph
# has: 0.6 for layers, 1.5 for a recurrence (columns alone 2.5 and 4.5).
_PUSHED_BYTES = 2

# ``f`` as recorded, and its root; ``None`` where it is constant.
_Recorded = tuple[Linearization, "Tensor | None"]


class SecondOrder:
    """Value and gradient of one call; ``by_input(i)``: the gradient by input ``i``, ready to be pulled back.

    The gradient is taken by :meth:`differentiate` (recorded) or :meth:`take_gradient` (not recorded).
    """

    __slots__ = (
        "_first",
        "_is_taken",
        "_lin",
        "_positions",
        "_root",
        "_row_cost",
        "_value",
        "_written",
        "caller",
        "grads",
        "keep",
        "prepared",
    )

    def __init__(self, caller: str, prepared: Prepared, keep: bool, value: Any = None) -> None:
        self.caller = caller
        self.prepared = prepared
        self.keep = keep
        self._value = value
        self.grads: list[Tensor | None] = [None] * len(prepared.inputs)
        self._first: Linearization | None = None
        self._root: Tensor | None = None
        self._is_taken = False
        self._lin: Linearization | None = None
        self._positions: list[int | None] = [None] * len(self.grads)
        self._row_cost: RowCost | None = None
        self._written: Callable[[], _Recorded] | None = None

    def start_from(self, recorded: _Recorded, written: Callable[[], _Recorded] | None = None) -> None:
        """``written`` runs ``f`` again, with norms by their formulas."""
        self._first, self._root = recorded
        self._written = written

    @property
    def value(self) -> Any:
        """What ``f`` returned."""
        return self._value if self._first is None else self._first.y

    def replace_by(self, gradient: Tensor, value: Any) -> None:
        """Use value and gradient of the run that the Hessian came from."""
        self.grads[0], self._value, self._first = gradient, value, None

    def record(self, lin: Linearization, positions: list[int | None]) -> None:
        """``lin.roots[positions[i]]`` is the gradient by input ``i``."""
        self._lin, self._positions = lin, positions
        self._row_cost = None

    def take_gradient(self, *, pushed: bool = False) -> None:
        """The gradient alone, by a plain pullback; ``pushed``: forward mode is going to differentiate it."""
        if self._first is None or self._root is None or self._is_taken:
            return
        self._is_taken = True
        seeds = [torch.ones_like(self._root)]
        if not (pushed or self.keep or _engine.in_transform()) and self._first.survey().custom:
            # Forward mode doesn't notice a backward that leaves autograd, and gives zeros.
            with suppressed():  # it may do without what this lacks
                self.grads = list(map(_engine.detached, self._first.pull(seeds, create_graph=True)))
                return
        # Compiled functions let themselves be pulled back once, unless more than that has been recorded.
        self.grads = self._first.pull(
            seeds,
            retain=self.keep or self._lin is not None,
            create_graph=self.keep,
            pushed=pushed,
        )

    def differentiate(self) -> None:
        """The gradient, recorded so that it can be pulled back."""
        if self._first is None or self._root is None or self._lin is not None:
            return
        found = self._first.survey()
        if self._written is not None and (found.lacking or are_norms_refused(found.once, self._first.inputs)):
            written, self._written = self._written, None
            self._first, self._root = written()
            if self._root is None:
                return
        grads = self._first.pull_dense([torch.ones_like(self._root)], create_graph=True)
        self.grads = grads
        roots: list[Tensor] = []
        positions: list[int | None] = []
        for g in grads:
            depends = g is not None and g.requires_grad
            positions.append(len(roots) if depends else None)
            if g is not None and g.requires_grad:
                roots.append(g)
        self.record(self._first.onward(roots, self._first.inputs), positions)

    def is_plain(self) -> bool:
        """Whether pulling back does what the recorded graph shows, at its cost."""
        return self._lin is not None and is_plain(self._lin)

    def is_linear_again(self, i: int) -> bool:
        """Whether the pullback of the recorded gradient by input ``i`` is linear in its cotangent."""
        lin = self.by_input(i)
        return lin is not None and is_linear(lin)

    def coarsest(self) -> float:
        """Relative spacing of the coarsest numbers that ``f`` has computed with, where it was recorded."""
        return 0.0 if self._first is None or _engine.compiling() else self._first.coarsest()

    def rounded(self) -> float:
        """Relative spacing that operations of ``f`` round to before they compute, where it was recorded."""
        return 0.0 if self._first is None or _engine.compiling() else self._first.survey().rounded

    @property
    def is_constant(self) -> bool:
        """Whether ``f`` depends on nothing."""
        return self._lin is None and self._root is None

    @property
    def is_linear(self) -> bool:
        """Whether the gradient is known to depend on nothing."""
        return self.is_constant or (self._lin is not None and not self._lin.roots)

    def by_input(self, i: int) -> Linearization | None:
        """``None`` where the gradient depends on nothing."""
        position = self._positions[i]
        if self._lin is None or position is None:
            return None
        return self._lin.restricted(position, i)

    def gradients(self) -> dict[int, Tensor]:
        """The recorded gradients, by inputs that they depend on."""
        if self._lin is None:
            return {}
        return {i: self._lin.roots[p] for i, p in enumerate(self._positions) if p is not None}

    def scalar(self) -> Tensor | None:
        """What the gradients are taken of, where its recorded graph shows how they are pulled back."""
        return self._root if self._first is not None and self.is_plain() else None

    def recorded(self) -> tuple[Tensor, list[Tensor]] | None:
        """What has been recorded and by what, before the gradient is taken, where the graph shows all of it.

        ``None`` also where inputs are what ``f`` finds by itself: they may come of each other.
        """
        if self._first is None or self._root is None or self._lin is not None:
            return None
        inputs = self._first.inputs
        apart = all(owned or is_leaf(x) for x, owned in zip(inputs, self.prepared.owned, strict=True))
        return (self._root, inputs) if apart and is_plain(self._first) else None

    def by_inputs(self, which: Sequence[int]) -> Linearization:
        """The gradients by inputs that they depend on, by all of these."""
        assert self._lin is not None
        roots = [self._lin.roots[p] for i in which if (p := self._positions[i]) is not None]
        return self._lin.onward(roots, [self._lin.inputs[i] for i in which])

    def tracked(self, i: int) -> Tensor:
        """Input ``i`` as ``f`` was recorded with it."""
        assert self._first is not None
        return self._first.inputs[i]

    def entrances(self, which: Sequence[int]) -> tuple[list[AffineMap], dict[int, Entrance]]:
        """How these of the inputs enter ``f``, where maps affine in all terms at once are among the ways."""
        if self._first is None or self._root is None or not self.is_plain():
            return [], {}
        maps, found = entrances(self._root, self._first.inputs, which)
        maps = [part for whole in maps for part in whole.jointly()]
        return maps, {i: entrance for i, entrance in found.items() if entrance.terms}

    def gradient_inside(self, values: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradient by values inside ``f``, recorded."""
        assert self._first is not None
        assert self._root is not None
        inside = self.derived(self._root, *values)
        return inside.pull_dense([torch.ones_like(self._root)], create_graph=True)

    def derived(self, root: Tensor, *by: Tensor) -> Linearization:
        """What has been computed from what was recorded, by inputs or by values inside ``f``."""
        assert self._first is not None
        return self._first.onward([root], list(by))

    def is_small(self) -> bool:
        """Whether all rows by the only input take less than to find out whether fewer products would do."""
        if self._first is None or _engine.compiling() or _engine.in_transform():
            return False
        return self.prepared.inputs[0].numel() * self.row_guess().nbytes < _cost_model.LEAST_BYTES

    def multiplies_much(self, rows: int) -> bool:
        """Whether so many rows take long by the only product of matrices, though its result may be small.

        Batched, a product with few columns reads the matrix again for each row: a byte a multiplication.
        """
        products = () if self._first is None else self._first.survey().products
        return len(products) == 1 and 3 * rows * multiplications(products[0]) >= _cost_model.LEAST_BYTES

    def row_guess(self) -> RowCost:
        """About what a row of a Hessian takes, from ``f`` alone: its gradient repeats most operations."""
        if self._row_cost is not None or self._first is None:
            return self.row_cost()
        found = self._first.survey()
        return RowCost(3 * self._first.nbytes(), 3 * found.nodes, found.misbatched)

    def row_cost(self) -> RowCost:
        """What a row of a Hessian takes.

        A guess on the high side where the gradient isn't recorded, and where all rows together are so small
        that nobody will ask for more: the walk along the gradient's graph takes 3 microseconds a node.
        """
        if self._row_cost is None:
            guess = FREE
            rows = max(map(Tensor.numel, self.prepared.inputs), default=0)
            if self._first is not None and (self._lin is None or _cost_model.is_small(rows * rows)):
                found = self._first.survey()
                guess = RowCost(8 * self._first.nbytes(), 4 * found.nodes, found.misbatched)
            if self._lin is None or (guess.nodes > 0 and _cost_model.is_small(rows * guess.nbytes)):
                self._row_cost = guess
            else:
                found = self._lin.survey()
                self._row_cost = RowCost(self._lin.nbytes(), found.nodes, found.misbatched)
        return self._row_cost


def _root(caller: str, lin: Linearization, y: Any) -> Tensor | None:
    return real_scalar(caller, y if lin.y_spec is not None else lin.y_leaves[0])


def run(
    caller: str,
    f: Callable[..., Any],
    prepared: Prepared,
    keep: bool,
    *,
    recorded: bool = True,
    random: RandomState | None = None,
) -> SecondOrder:
    """Run ``f`` once. ``recorded``: its gradient is going to be pulled back, not only used.

    From ``random`` on, if there is one, ``f`` may run again: where it differentiates norms itself.
    """
    if recorded and (_engine.compiling() or _engine.in_transform()):
        return _run_nested(caller, f, prepared, keep)
    position = _state.mark()

    def record() -> _Recorded:
        lin = _engine.linearize(f, prepared, keep=keep)
        return lin, _root(caller, lin, lin.y)

    def written() -> _Recorded:
        assert random is not None
        _state.forget_since(position)
        random.restore()
        with unfused():
            return record()

    first = record()
    second = SecondOrder(caller, prepared, keep)
    second.start_from(first, written if recorded and random is not None and not keep else None)
    return second


def _run_nested(caller: str, f: Callable[..., Any], prepared: Prepared, keep: bool) -> SecondOrder:
    """Inside ``torch.func``: one level differentiates the gradient that another one gives."""

    def gradient_and_value(*inputs: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        inner = run(caller, f, prepared.at(list(inputs)), True, recorded=False)
        inner.take_gradient()
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, inner.grads, strict=True)]
        return tuple(grads), inner.value

    if not all(prepared.owned):
        raise RuntimeError(
            f"{caller}: inside a torch.func transform, second derivatives by Params are not supported; "
            "pass the tensors as arguments (torch.func.functional_call calls a module with them)"
        )
    outer = Prepared(())
    outer.inputs = list(prepared.inputs)
    outer.owned = [True] * len(outer.inputs)
    outer.simple = True
    lin = _engine.linearize(gradient_and_value, outer, keep=True)
    grads, value = lin.y if keep else _engine.detached(lin.y)
    second = SecondOrder(caller, prepared, keep, value)
    second.grads = list(grads)
    known = _engine.compiling()
    second.record(
        lin, [i if known or lin.roots[i].requires_grad else None for i in range(len(prepared.inputs))]
    )
    return second


class Seen:
    """What a pushed run of ``f`` shows besides its gradient: its value, and whether to go on.

    It stops where all columns don't fit into memory, or custom functions have to be checked before.
    ``columns``: so many are pushed at once before anybody has measured ``f``; 0 where that needn't be asked.
    """

    __slots__ = ("columns", "stopped", "value")

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.stopped = False
        self.value: Any = None

    def look(self, inner: SecondOrder) -> None:
        """``f`` has run, and has yet to be pulled back."""
        self.value = inner.value
        if inner._first is not None and not _engine.compiling():
            found = inner._first.survey()
            nbytes = self.columns * _PUSHED_BYTES * inner._first.nbytes()
            fits = not _cost_model.exceeds_budget(nbytes, inner.prepared.inputs[0].device)
            self.stopped = bool(found.custom) or not fits


def gradient_by(
    f: Callable[..., Any], caller: str, prepared: Prepared, which: int, seen: Seen | None = None
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The gradient by one input as a function of it, for forward mode to differentiate: it runs ``f``.

    Where anybody wants to have ``seen`` the value, it comes second, if it is a tensor.
    """

    def gradient_of(primal: Tensor) -> tuple[Tensor, ...]:
        inputs = list(prepared.inputs)
        inputs[which] = primal
        inner = run(caller, f, prepared.at(inputs), True, recorded=False)
        grad = None
        if seen is not None:
            seen.look(inner)
        if seen is None or not seen.stopped:
            inner.take_gradient(pushed=True)
            grad = inner.grads[which]
        grad = torch.zeros_like(primal) if grad is None else grad
        return (grad, inner.value) if seen is not None and isinstance(inner.value, Tensor) else (grad,)

    return gradient_of
