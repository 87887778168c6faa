"""What every call goes through on its way in: modes of autograd, and other threads that might interfere.

What a call records and nobody keeps isn't left to a checkpoint around it, which would run all again for it.

Knows nothing of what the calls compute.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from ._create_graph import keeps_graph
from ._exchange import finding, finds_by_identity
from ._stop_iteration import Carried
from ._torch_private import (
    aside_of_checkpoint,
    hooks_in_force,
    inside_checkpoint,
    is_of_checkpoint,
    is_of_pytorchs,
)

__all__ = ["entry_point"]

Returned = TypeVar("Returned")
Given = ParamSpec("Given")


def entry_point(worker: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """A worker of the public functions, outside inference mode: what is made in there can't be recorded.

    A ``create_graph`` that is set, among its positional arguments, asks for recording whatever the mode is.
    ``args`` among them are the caller's.
    """
    names = list(inspect.signature(worker).parameters)
    asks = names.index("create_graph") if "create_graph" in names else None
    given = names.index("args") if "args" in names else None

    @functools.wraps(worker)
    def outside(*args: Given.args, **kwargs: Given.kwargs) -> Returned:
        if torch.compiler.is_compiling():
            return worker(*args, **kwargs)  # Dynamo can't trace the questions below
        hooks = hooks_in_force(False)
        create_graph: Any = None if asks is None else args[asks]
        if hooks is not None and is_of_checkpoint(hooks):
            if not keeps_graph(create_graph):
                with aside_of_checkpoint():
                    return outside(*args, **kwargs)
            if is_of_pytorchs(hooks):
                return inside_checkpoint(hooks, functools.partial(outside, *args, **kwargs))
        try:  # not `released`: small calls wait for this
            inference = torch.is_inference_mode_enabled()
            recording = torch.is_grad_enabled() and not inference
            by_identity = given is not None and finds_by_identity(args[given])  # type: ignore[arg-type]
            if recording:
                if not by_identity:
                    return worker(*args, **kwargs)
                with finding():
                    return worker(*args, **kwargs)
            with (
                finding() if by_identity else contextlib.nullcontext(),
                torch.inference_mode(False) if inference else contextlib.nullcontext(),
                torch.set_grad_enabled(bool(create_graph)),
            ):
                return worker(*args, **kwargs)
        except Carried as found:
            held = [found.error]
        raise held.pop()  # as `released` does

    return outside
