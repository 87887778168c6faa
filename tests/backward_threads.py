"""Backward passes in threads of their own, as those of a device, where there is none."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._functorch import pyfunctorch
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from torchzygote import _exchange, _state
from torchzygote._torch_private import backward
from torchzygote._torch_private.passing import stash

__all__ = ["in_threads_of_pytorchs", "move_backward_passes"]

# Kept by a thread that a backward pass starts from, and taken along by it.
_CARRIED = ("torchzygote",)
_LONG_ENOUGH = 30.0
# So many backward passes, one inside the other, PyTorch runs in one thread.
_DEPTH = 60


class _Surroundings:
    """What PyTorch takes along into a device's thread: modes, transforms, and what has been kept by name."""

    def __init__(self, stack: list[Any]) -> None:
        self._stack = stack
        self._recording = torch.is_grad_enabled()
        self._forward = torch._C._is_fwd_grad_enabled()
        self._refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        self._overriding = [
            torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())
        ]
        self._dispatching = [
            torch._C._get_dispatch_stack_at(i) for i in range(torch._C._len_torch_dispatch_stack())
        ]
        self._kept = {key: torch._C._get_obj_in_tls(key) for key in _CARRIED if torch._C._is_key_in_tls(key)}

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        for key, value in self._kept.items():
            stash(key, value)
        with (
            contextlib.nullcontext()
            if self._refused is None
            else torch.autograd.graph.disable_saved_tensors_hooks(self._refused),
            pyfunctorch.temporarily_restore_interpreter_stack(self._stack),
            torch.set_grad_enabled(self._recording),
            forward_ad._set_fwd_grad_enabled(self._forward),
            _modes(
                self._overriding, torch._C._push_on_torch_function_stack, torch._C._pop_torch_function_stack
            ),
            _modes(self._dispatching, _python_dispatch._push_mode, _python_dispatch._pop_mode),
        ):
            yield


@contextlib.contextmanager
def _modes(modes: list[Any], push: Callable[[Any], None], pop: Callable[[], Any]) -> Iterator[None]:
    for mode in modes:
        push(mode)
    try:
        yield
    finally:
        for _ in modes:
            pop()


def move_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each backward pass run in a thread of its own, and fail where that waits for us."""
    run = backward._run_backward

    def threaded(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []

        def work(surroundings: _Surroundings) -> None:
            try:
                with surroundings.entered():
                    found.append(run(*args, **kwargs))
            except BaseException as error:
                found.append(error)

        with pyfunctorch.temporarily_clear_interpreter_stack() as stack:
            thread = threading.Thread(target=work, args=(_Surroundings(stack),), daemon=True)
            thread.start()
            thread.join(_LONG_ENOUGH)
        if not found:
            raise AssertionError("the backward pass waits for the thread that waits for it")
        if isinstance(found[0], BaseException):
            raise found[0]
        return found[0]

    for asking in (_exchange, _state):
        monkeypatch.setattr(asking, "passes_leave_their_thread", lambda: True)
    monkeypatch.setattr(backward, "_run_backward", threaded)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", threaded)


def in_threads_of_pytorchs() -> set[int]:
    """Have each backward pass run in a thread of PyTorch's own, from now on; the set will tell in which.

    PyTorch has some for passes that are inside of too many others.
    """
    run = backward._run_backward
    leaves = [torch.zeros((), requires_grad=True) for _ in range(_DEPTH + 2)]
    roots = [leaf * 1 for leaf in leaves]
    one = torch.ones(())
    passes: list[Callable[[], None]] = []
    threads: set[int] = set()

    def step(i: int) -> None:
        if i < len(roots):
            run((roots[i],), (one,), True, False, (leaves[i],), True, accumulate_grad=False)
        else:
            passes[-1]()

    for i, root in enumerate(roots):
        root.register_hook(lambda g, following=i + 1: step(following))

    def deep(*args: Any, **kwargs: Any) -> Any:
        found: list[Any] = []
        recording = torch.is_grad_enabled()

        def last() -> None:
            threads.add(threading.get_ident())
            with torch.set_grad_enabled(recording):
                found.append(run(*args, **kwargs))

        passes.append(last)
        try:
            step(0)
        finally:
            passes.pop()
        return found[0]

    backward._run_backward = torch.autograd._engine_run_backward = deep
    return threads
