"""Checkpointing: memory for time, in every mode of differentiation.

On the tape this is ``torch.utils.checkpoint``; inside ``torch.func`` transforms, which refuse it, a custom
function of our own (:mod:`._checkpoint_transforms`). Which of them is decided here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointError, checkpoint

from . import _state
from ._checkpoint_surroundings import Surroundings
from ._checkpoint_transforms import checkpoint_in_transforms, name_of
from ._torch_private import (
    backward_pass,
    in_forward_ad,
    in_functorch,
    in_functorch_compiled,
    is_tracing,
    outside_functorch,
)
from ._torch_private import saved_tensors_hooks as hooks_in_force

__all__ = ["checkpointed"]


def checkpointed(f: Callable[..., Any], *xs: Any, **kwargs: Any) -> Any:
    """The value of ``f(*xs, **kwargs)``, with nothing of its inside stored for the backward pass.

    The backward pass runs ``f`` once more to get back what it needs: once per backward pass, and once per
    chunk of Jacobian rows, never once per row. Time for memory.

    Parameters
    ----------
    f : callable
        A function, module or bound method that does the same when it runs again: random numbers of PyTorch's
        default generators (CPU and CUDA), autocast and the default device are restored, anything else that
        ``f`` changes is not. Tensors that it closes over, and the parameters of modules, get their gradients.
    *xs, **kwargs
        Passed to ``f``: tensors, structures of them, or anything else.

    Returns
    -------
    object
        What ``f`` returns.

    Raises
    ------
    RuntimeError
        In the backward pass, where ``f`` did something else when it ran again (saved tensors of other shapes
        or in another number), or wrote in place into what its own backward needs.

    Notes
    -----
    Calls may be nested, and differentiated in any mode and to any order. In forward mode nothing is stored in
    any case, and ``f`` just runs. Under ``torch.compile`` the call is marked for recomputation; inside a
    derivative that is compiled with it, ``f`` just runs, and what to store is left to the compiler.

    Examples
    --------
    >>> import torch
    >>> from torchzygote import checkpointed, gradient
    >>> w = torch.tensor(3.0)
    >>> gradient(lambda x: checkpointed(lambda x: torch.exp(x * w), x), torch.tensor(0.0))
    (tensor(3.),)

    Only the input of each layer is kept here, however much a layer computes inside:

    >>> layers = [torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))] * 5
    >>> def deep(x):
    ...     for layer in layers:
    ...         x = checkpointed(layer, x)
    ...     return x.sum()
    >>> gradient(deep, torch.ones(8))[0].shape
    torch.Size([8])

    References
    ----------
    ``checkpointed`` in Zygote.jl, https://fluxml.ai/Zygote.jl/stable/adjoints/#Checkpointing; Griewank and
    Walther, *Evaluating Derivatives*, chapter 12.
    """
    if not callable(f):
        raise TypeError(f"checkpointed: f: expected a function, which comes first, got {type(f).__name__}")
    if torch.compiler.is_compiling():
        return f(*xs, **kwargs) if in_functorch_compiled() else _compiled(f, xs, kwargs)
    if in_functorch():
        return checkpoint_in_transforms(f, xs, kwargs)
    if not torch.is_grad_enabled() or in_forward_ad() or is_tracing():
        return f(*xs, **kwargs)
    return _on_tape(f, xs, kwargs)


def _compiled(f: Callable[..., Any], xs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def call(*xs: Any) -> Any:
        return f(*xs, **kwargs)

    return checkpoint(call, *xs, use_reentrant=False)


# ---------------------------------------------------------------------------------------------------------
# on the tape


def _on_tape(f: Callable[..., Any], xs: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    runs = _Runs(f, kwargs)
    position = _state.mark()
    try:
        return checkpoint(
            runs,
            *xs,
            use_reentrant=False,
            preserve_rng_state=False,  # which looks at the devices of xs only
            context_fn=lambda: (_Watched(runs), _Versions(runs)),
        )
    except RuntimeError as error:
        if "don't yet support saved tensor hooks" not in str(error):
            raise
    # f uses torch.func itself, which refuses hooks around it
    _state.forget_since(position)
    runs.rewind()
    return checkpoint_in_transforms(f, xs, kwargs)


class _Runs:
    """``f`` for its first run and its recomputations, in the same surroundings."""

    __slots__ = ("_f", "_kwargs", "_surroundings", "versions")

    def __init__(self, f: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self._f = f
        self._kwargs = kwargs
        self._surroundings: Surroundings | None = None
        self.versions: list[int] = []

    def __call__(self, *xs: Any) -> Any:
        if self._surroundings is None:
            self._surroundings = Surroundings()
            return self._f(*xs, **self._kwargs)
        position = _state.mark()
        try:
            with self._surroundings.restored():
                return self._f(*xs, **self._kwargs)
        except _Enough as enough:
            if enough.runs is not self:
                raise
            error = enough.error
        finally:
            _state.forget_since(position)  # hooks report from the first run
        # Out here, without the frames of f: an exception that refers to itself would keep tensors alive.
        try:
            raise error.with_traceback(None)
        finally:
            del error

    def rewind(self) -> None:
        """Set the random state back to where it was before the first run."""
        if self._surroundings is not None:
            self._surroundings.rewind()

    @property
    def name(self) -> str:
        """The name of ``f`` for a message."""
        return name_of(self._f)


class _Enough(BaseException):
    """What PyTorch raises to end a recomputation early, in a form that ``except Exception`` doesn't catch."""

    def __init__(self, runs: _Runs, error: Exception) -> None:
        self.runs = runs
        self.error = error


class _Watched(saved_tensors_hooks):
    """During the first run: PyTorch's hooks, whose recomputation then runs outside ``torch.func`` transforms.

    And whose errors say what went wrong: a recomputed tensor that ``f`` has written into since is refused,
    which ``torch.utils.checkpoint`` lets pass with wrong gradients.
    """

    def __init__(self, runs: _Runs) -> None:
        self._runs = runs

    def __enter__(self) -> None:
        pack, unpack = hooks_in_force()
        runs = self._runs
        numbers = itertools.count()
        recomputed_in = -1

        def numbered(x: Tensor) -> tuple[int, Any]:
            return next(numbers), pack(x)

        def recomputed(packed: tuple[int, Any]) -> Tensor:
            nonlocal recomputed_in
            number, holder = packed
            try:
                now = backward_pass()
                if now == recomputed_in >= 0:  # nothing runs any more, it is only looked up
                    x = unpack(holder)
                else:
                    with outside_functorch():
                        x = unpack(holder)
                    recomputed_in = now
            except CheckpointError as error:
                raise RuntimeError(
                    f"checkpointed: expected {runs.name} to do the same when it ran again for the backward "
                    "pass, but the tensors that it needs there came in other shapes, dtypes or number; make "
                    f"it depend on nothing but its arguments and tensors that stay as they are ({error})"
                ) from None
            if number < len(runs.versions) and x._version != runs.versions[number]:
                raise RuntimeError(
                    f"checkpointed: {runs.name} writes in place into a tensor of shape {tuple(x.shape)} that "
                    "its own backward pass needs; write into a clone() of it"
                )
            return x

        super().__init__(numbered, recomputed)
        super().__enter__()


class _Versions(saved_tensors_hooks):
    """During a recomputation: PyTorch's hooks, and the versions of what they see."""

    def __init__(self, runs: _Runs) -> None:
        self._runs = runs

    def __enter__(self) -> None:
        pack, unpack = hooks_in_force()
        runs = self._runs
        versions: list[int] = []
        runs.versions = versions

        def noted(x: Tensor) -> Any:
            versions.append(x._version)
            try:
                return pack(x)
            except Exception as error:
                raise _Enough(runs, error) from None

        super().__init__(noted, unpack)
        super().__enter__()
