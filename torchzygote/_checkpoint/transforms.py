"""Checkpointing inside ``torch.func`` transforms.

``f`` runs once, just as it would without checkpointing, and is recorded by every level that records. Then
the graph is cut off at the outputs, and in its place each level gets one node (:mod:`._checkpoint.node`) that
runs ``f`` again. The node must be told everything that ``f`` depends on, also what it closes over; that is
found by :mod:`._checkpoint.closure`. Where something can't be found, the recorded graph just stays: the same
derivatives, more memory, and a warning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import _state
from .._arguments import name_of
from .._engine import swapped
from .._torch_private import (
    grad_level,
    in_functorch_derivative,
    is_recorded,
    is_wrapped,
    leave_grad_level,
    pytree,
    sequence_number,
    transform_stack,
)
from .._warning import warn
from .closure import ClosureRecorder, has_version, needs_name, reaches_only
from .holdings import Holdings, written_since
from .node import Rerun, attach
from .surroundings import Surroundings

__all__ = ["checkpoint_in_transforms", "refusal"]


def refusal(f: Callable[..., Any], what: str, advice: str) -> RuntimeError:
    """The error that says that ``f`` did something else when it ran again."""
    return RuntimeError(
        f"checkpointed: expected {name_of(f)} to do the same when it ran again for the backward pass, but "
        f"{what}; {advice}"
    )


def checkpoint_in_transforms(f: Callable[..., Any], xs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``f(*xs, **kwargs)``, where a ``torch.func`` transform is running."""
    if not set(transform_stack()) <= {"grad", "jvp", "vmap"}:
        return f(*xs, **kwargs)
    leaves, spec = pytree.tree_flatten((xs, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and needs_name(leaf)]
    # Views, so that an argument is told apart from the same tensor closed over.
    arguments = [leaves[i].view_as(leaves[i]) for i in places]
    for i, argument in zip(places, arguments, strict=True):
        leaves[i] = argument
    closure = ClosureRecorder(arguments)
    holdings = Holdings(f, leaves, closure.adopt)
    surroundings = Surroundings()
    position = _state.mark()
    with holdings, closure:
        xs, kwargs = pytree.tree_unflatten(leaves, spec)
        y = f(*xs, **kwargs)
    outputs, y_spec = pytree.tree_flatten(y)
    attached = [i for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor) and is_recorded(leaf)]
    if not attached:
        return y
    roots = [outputs[i] for i in attached]
    for root in roots:
        closure.note(root)
    if not closure.finds_all(roots, arguments):
        warn(
            f"checkpointed: {name_of(f)} depends on a tensor that can't be found from outside; its inside is "
            "stored for the backward pass. Pass the tensor as an argument.",
        )
        return y
    # Argument views are only held as long as this call.
    for i in places:
        leaves[i] = None
    again = _Again(f, leaves, spec, places, closure, attached, roots, holdings, surroundings)
    again.report_later(_state.forget_since(position))
    for i, new in zip(attached, attach(again, roots, [*arguments, *closure.tensors]), strict=True):
        outputs[i] = new
    return pytree.tree_unflatten(outputs, y_spec)


class _Again(Rerun):
    """``f`` as a function of its arguments' tensors and of what it closes over, in its surroundings."""

    def __init__(
        self,
        f: Callable[..., Any],
        leaves: list[Any],
        spec: Any,
        places: list[int],
        closure: ClosureRecorder,
        attached: list[int],
        roots: list[Tensor],
        holdings: Holdings,
        surroundings: Surroundings,
    ) -> None:
        self._f = f
        self._leaves = leaves
        self._spec = spec
        self._places = places
        self._closure = closure.tensors
        self._constants = closure.untouched()
        self._attached = attached
        self._expected = [(root.shape, root.dtype) for root in roots]
        self._holdings = holdings
        self._surroundings = surroundings
        self._in_transform = in_functorch_derivative()
        self._waiting: list[Callable[[], None]] = []
        # Plain leaves stay as they are, found by identity, so that threads may share them.
        self.natural = {
            len(places) + i: tensor for i, tensor in enumerate(self._closure) if _is_plain_leaf(tensor)
        }

    def _transform(self) -> contextlib.AbstractContextManager[int | None]:
        """A level of ``torch.func`` that records nothing, where ``f`` was inside one and isn't now.

        It matters to derivatives that ``f`` takes: inside a transform they are differentiable in turn.
        """
        if self._in_transform and not in_functorch_derivative():
            return grad_level()
        return contextlib.nullcontext()

    def report_later(self, waiting: list[Callable[[], None]]) -> None:
        """Keep what waits for the end of the differentiation: a run that is pulled back makes its own."""
        self._waiting = waiting
        if waiting:
            _state.at_end(self._report)

    def _report(self) -> None:
        _state.call_all(self._waiting)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self._waiting = []
        self._refuse_changes()
        start = sequence_number()
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=False):
            leaves[place] = tensor
        xs, kwargs = pytree.tree_unflatten(leaves, self._spec)
        mine: list[Tensor] = []
        twins: list[Tensor] = []
        for i, tensor in enumerate(self._closure, start=len(self._places)):
            if i not in self.natural:
                mine.append(tensor)
                # A twin of its own: a tensor may be given for two of them.
                twins.append(tensors[i].view_as(tensors[i]))
        with contextlib.ExitStack() as stack:
            self._holdings.put_back(stack)
            stack.enter_context(swapped(mine, twins))
            stack.enter_context(self._surroundings.restored())
            level = stack.enter_context(self._transform())
            found = pytree.tree_leaves(self._f(*xs, **kwargs))
            results: list[Any] = [found[i] if i < len(found) else None for i in self._attached]
            # An object whose tensor is about to be swapped back is no result.
            results = [r.view_as(r) if any(r is tensor for tensor in mine) else r for r in results]
            if level is not None:
                results = [leave_grad_level(r, level) if isinstance(r, Tensor) else r for r in results]
        self._check(results, [*tensors, *self.natural.values()], start)
        return tuple(results)

    def _check(self, results: list[Any], inputs: Sequence[Tensor], start: int) -> None:
        """Refuse what isn't that function of ``inputs`` which the first run was."""
        got = [(r.shape, r.dtype) if isinstance(r, Tensor) else type(r).__name__ for r in results]
        if got != self._expected:
            raise refusal(
                self._f,
                f"it returned {got} instead of {self._expected}",
                "make it depend on nothing but its arguments and tensors that stay as they are",
            )
        if not reaches_only(results, inputs, start):
            raise refusal(
                self._f, "it used another tensor", "pass it as an argument, or leave it where it was found"
            )

    def _refuse_changes(self) -> None:
        changes = self._holdings.changes()
        for name in self._holdings.written().values():
            changes = written_since(name)
        if changes is None and not all(has_version(ref(), version) for ref, version in self._constants):
            changes = "a tensor that it uses has been written in place since", "write into a clone() of it"
        if changes is not None:
            raise refusal(self._f, *changes)


def _is_plain_leaf(x: Tensor) -> bool:
    return not is_wrapped(x) and x.grad_fn is None
