"""Checkpointing on the tape: ``torch.utils.checkpoint``, and what it lets pass with wrong gradients.

It runs the function again and trusts that all is as it was. Here the containers among the arguments, the
surroundings and the flags of parameters are as they were, and tensors are compared with what they were.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError

from .. import _state
from .._arguments import name_of
from .._dropped_graphs import Held
from .._flags import FlagHold, held_again, held_by_others, holds, not_held_since
from .._torch_private import (
    backward_pass,
    checkpoint_undebugged,
    hooks_in_force,
    outside_functorch,
    sequence_number,
    version_of,
)
from .arguments import NO_ARGUMENTS, Arguments, taken_apart
from .asked_again import handed_out
from .holdings import Holdings, Uses, written_since
from .nothing_saved import run_before_backward
from .surroundings import Surroundings, may_draw_after_saving, outside_inference
from .transforms import checkpoint_in_transforms, refusal

__all__ = ["checkpoint_on_tape"]

# Of a tensor that is saved: version, whether it requires grad, shape, dtype.
_State = tuple[int, bool, torch.Size, torch.dtype]
_SAME_FLAGS = "set requires_grad before the call, and differentiate by what f uses around the call"
_BE_PURE = "make it depend on nothing but its arguments and tensors that stay as they are"


def checkpoint_on_tape(f: Callable[..., Any], xs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``f(*xs, **kwargs)``, where nothing but the tape records."""
    tensors, arguments = taken_apart(xs, kwargs)
    runs = _Runs(f, arguments, (xs, kwargs))
    position = _state.mark()
    if (session := _state.session()) is not None:
        session.recomputes = True
        runs.held = session.held
    start = sequence_number()
    error: BaseException | None = None
    try:
        y = checkpoint_undebugged(
            runs,
            *tensors,
            use_reentrant=False,
            preserve_rng_state=False,  # which looks at the devices of xs only
            determinism_check="none",  # is done here, with less time for each tensor
            context_fn=lambda: (_FirstRunHooks(runs), _Noted(runs)),
        )
    except RuntimeError as refused:
        error = refused
    else:
        error, runs.failed = runs.failed, None
        if error is None:
            return y if runs.first else run_before_backward(lambda: runs.rerun(tensors), y, start)
    if not isinstance(error, RuntimeError) or "don't yet support saved tensor hooks" not in str(error):
        try:
            raise error
        finally:
            del error  # whose traceback holds this frame
    del error
    # f uses torch.func itself, which refuses hooks around it
    _state.forget_since(position)
    runs.rewind()
    return checkpoint_in_transforms(f, xs, kwargs)


def _of_no_graph() -> NoReturn:
    raise RuntimeError(
        "checkpointed: the derivative that this call was made in is over, and has kept no graph to pull back "
        "through; create_graph=True keeps it"
    )


def _text(state: _State) -> str:
    return f"shape {tuple(state[2])} and dtype {state[3]}"


class _Runs:
    """``f`` for its first run and its recomputations: the same arguments in the same surroundings.

    ``first``, ``seen``: the state of each tensor that was saved in the first run, and in the latest
    recomputation; ``numbers``: how many operations the first run had recorded by then. ``begun``: the number
    of the node that a run records first. ``shifted``: the latest recomputation may record more or less, and
    goes on to its end; ``enough``: what the backward pass needs is there; ``ends_next``: it will be when the
    last operation is over. ``copied``: arguments came out of somebody's hooks with other versions than they
    went in. ``failed``: what the first run raised.
    """

    __slots__ = (
        "__weakref__",
        "_arguments",
        "_disturbed",
        "_f",
        "_finished",
        "_given",
        "_holdings",
        "_holds",
        "_others",
        "_surroundings",
        "_versions",
        "begun",
        "copied",
        "ends_next",
        "enough",
        "failed",
        "first",
        "held",
        "numbers",
        "seen",
        "shifted",
    )

    def __init__(self, f: Callable[..., Any], arguments: Arguments, given: Any) -> None:
        self._f = f
        self._arguments = arguments
        self._given = given  # for the first run
        self._finished = False
        self._disturbed = False  # other threads switched flags of tensors meanwhile
        self._others = (0, False)
        self._holdings: Holdings | None = None
        self._holds: tuple[FlagHold, ...] = ()
        self._surroundings: Surroundings | None = None
        self._versions: list[int] = []
        self.begun = 0
        self.copied = False
        self.ends_next = False
        self.enough: Exception | None = None
        self.failed: BaseException | None = None
        self.first: list[_State] = []
        self.held: Held | None = None
        self.numbers: list[int] = []
        self.seen: list[_State] = []
        self.shifted = False

    def release(self) -> None:
        """The graph that this is part of is dropped, which ``f`` and what it holds may refer to."""
        self._f, self._arguments, self._given = _of_no_graph, NO_ARGUMENTS, None
        self._holdings = self._surroundings = None

    def __call__(self, *tensors: Tensor) -> Any:
        if self._surroundings is None or self._holdings is None:
            if self._given is None:
                self._f()
            try:
                return self._first_run(tensors)
            except BaseException as error:
                # Through PyTorch's checkpoint, it would leave hooks in force as long as somebody keeps it.
                self.failed = error
                return None
        changes = self._holdings.changes()
        if changes is not None:
            raise self.refusal(*changes)
        written = self._holdings.written()
        if not written:
            return self.rerun(tensors)
        # It may be that what the backward pass needs comes before they are used.
        uses = Uses(written)
        try:
            with uses:
                y = self.rerun(tensors)
        except (Exception, _Enough):  # an interrupt goes on as it is
            if uses.found is None:
                raise
        else:
            if uses.found is None:
                return y
        raise self.refusal(*written_since(uses.found))

    def rerun(self, tensors: Sequence[Tensor]) -> Any:
        """Once more, whatever has become of the arguments."""
        assert self._surroundings is not None
        assert self._holdings is not None
        if self.held is not None:
            self.held.add(self)
        self.copied = [version_of(x) for x in tensors] != self._versions
        xs, kwargs = self._arguments.with_tensors(tensors)
        position = _state.mark()
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(_state.forget_since, position)  # hooks report from the first run
                stack.callback(held_again(self._holds))
                # An inner derivative by what f is given, which runs this one as it is pulled back itself.
                stack.callback(not_held_since(self._holds, tensors))
                self._holdings.put_back(stack)
                # Whoever requires grad now is recorded, and what is saved for it may pass for what was saved
                # before.
                self.shifted = self._disturbed or self._holdings.have_other_flags()
                self.enough, self.ends_next, self._others = None, False, held_by_others()
                stack.enter_context(self._surroundings.restored())
                self.begun = sequence_number()
                y = self._f(*xs, **kwargs)
            if self.enough is None:
                return y
            error, self.enough = self._verdict(self.enough), None
        except _Enough as enough:
            if enough.runs is not self:
                raise
            error = enough.error
        # Out here, without the frames of f: an exception that refers to itself would keep tensors alive.
        try:
            raise error.with_traceback(None)
        finally:
            del error

    def _first_run(self, tensors: Sequence[Tensor]) -> Any:
        (xs, kwargs), self._given = self._given, None
        self._versions = [version_of(x) for x in tensors]
        self._holds = holds()
        self._holdings = Holdings(self._f, self._arguments.leaves)
        self._surroundings = Surroundings()
        before = held_by_others()
        with self._holdings:
            self.begun = sequence_number()
            y = self._f(*xs, **kwargs)
        self._disturbed = before != held_by_others() or before[1]
        self._finished = True
        return y

    def is_surely_the_same(self) -> bool:
        """Whether nothing hints at other tensors being recorded than in the first run, if that is over."""
        return not (self._finished and (self.shifted or self._others[1] or self._others != held_by_others()))

    def _verdict(self, enough: Exception) -> Exception:
        """``enough``, if a whole recomputation saved what the first run did: only casts were cached, say."""
        if len(self.seen) != len(self.first):
            return self.refusal(
                f"it saves {len(self.seen)} tensors now, and saved {len(self.first)} before; perhaps other "
                "tensors require grad now",
                _SAME_FLAGS,
            )
        pairs = zip(self.first, self.seen, strict=True)
        return next((found for pair in pairs if (found := self._difference(*pair)) is not None), enough)

    def _difference(self, then: _State, again: _State) -> RuntimeError | None:
        """The error that says that another tensor was saved than before, if that shows."""
        if then[2:] != again[2:]:
            return self.refusal(
                f"a tensor that it needs there, of {_text(then)}, came as one of {_text(again)}", _BE_PURE
            )
        if then[1] != again[1]:
            return self.refusal("other tensors require grad now", _SAME_FLAGS)
        return None

    def rewind(self) -> None:
        """Set the random state back to where it was before the first run."""
        if self._surroundings is not None:
            self._surroundings.rewind()

    def refusal(self, what: str, advice: str) -> RuntimeError:
        """The error that says that ``f`` did something else when it ran again."""
        return refusal(self._f, what, advice)

    def refuse(self, x: Tensor, then: _State, again: _State) -> None:
        """Say what is wrong with ``x``, saved in another state than before, or written to since."""
        if version_of(x) != again[0]:
            raise RuntimeError(
                f"checkpointed: {name_of(self._f)} writes in place into a tensor of shape {tuple(x.shape)} "
                "that its own backward pass needs; write into a clone() of it"
            )
        if (other := self._difference(then, again)) is not None:
            raise other
        if not self.copied:
            raise self.refusal(
                f"a tensor that it uses, of {_text(again)}, has been written in place since (by "
                "+=, an optimizer or an eager update, say)",
                "write into a clone() of it",
            )


class _Enough(BaseException):
    """What PyTorch raises to end a recomputation early, in a form that ``except Exception`` doesn't catch."""

    def __init__(self, runs: _Runs, error: Exception) -> None:
        self.runs = runs
        self.error = error


class _FirstRunHooks(saved_tensors_hooks):
    """During the first run: PyTorch's hooks, whose recomputation then runs outside ``torch.func`` transforms.

    And whose errors say what went wrong.
    """

    def __init__(self, runs: _Runs) -> None:
        self._runs = runs

    def __enter__(self) -> None:
        pack, unpack = hooks_in_force(False)
        runs = self._runs
        first = runs.first
        recomputed_in = -1

        def numbered(x: Tensor) -> tuple[int, Any]:
            runs.numbers.append(sequence_number() - runs.begun)
            first.append((version_of(x), x.requires_grad, x.shape, x.dtype))
            return len(first) - 1, pack(x)

        recomputed = lambda packed: handed_out((id(runs), packed[0]), once, packed)

        def once(packed: tuple[int, Any]) -> Tensor:
            nonlocal recomputed_in
            number, holder = packed
            try:
                now = backward_pass()
                if now == recomputed_in >= 0:  # nothing runs any more, it is only looked up
                    x: Tensor = unpack(holder)
                else:
                    with outside_functorch(), outside_inference():
                        x = unpack(holder)
                    recomputed_in = now
            except CheckpointError as error:
                raise runs.refusal(f"it needs other tensors there ({error})", _BE_PURE) from None
            if number < len(runs.seen):
                again = runs.seen[number]
                if again != first[number] or version_of(x) != again[0]:
                    runs.refuse(x, first[number], again)
            return x

        super().__init__(numbered, recomputed)
        super().__enter__()


class _Noted(saved_tensors_hooks):
    """During a recomputation: PyTorch's hooks, and the state of what they see."""

    def __init__(self, runs: _Runs) -> None:
        self._runs = runs

    def __enter__(self) -> None:
        pack, unpack = hooks_in_force(False)
        runs = self._runs
        seen: list[_State] = []
        runs.seen = seen

        def noted(x: Tensor) -> Any:
            if runs.enough is not None and runs.ends_next:
                raise _Enough(runs, runs.enough)
            number = len(seen)
            seen.append((version_of(x), x.requires_grad, x.shape, x.dtype))
            if runs.enough is not None:
                return x.detach()  # it is only counted
            if runs.numbers[number : number + 1] != [sequence_number() - runs.begun]:
                runs.shifted = True
            try:
                return pack(x)
            except Exception as error:
                if runs.is_surely_the_same():
                    if not may_draw_after_saving(runs.numbers, runs.first):
                        raise _Enough(runs, error) from None
                    runs.ends_next = True
                runs.enough = error
                return x.detach()

        super().__init__(noted, unpack)
        super().__enter__()
