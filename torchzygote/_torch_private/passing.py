"""What a backward pass takes along into threads of PyTorch's own, as those of a device."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from torch import cuda

__all__ = ["pass_along", "passed_along", "passes_leave_their_thread"]

# Context variables don't do: PyTorch takes them along from where a pass begins, and from a thread of its own
# in which another pass begins, those of that thread.
_KEY = "torchzygote"
_has: Callable[[str], bool] = torch._C._is_key_in_tls
_get: Callable[[str], object] = torch._C._get_obj_in_tls
_keep: Callable[[str, object], None] = torch._C._stash_obj_in_tls
_remove: Callable[[str], None] | None = getattr(torch._C, "_remove_obj_from_tls", None)  # some have none


# Other devices than CUDA that this PyTorch knows of, whether they are there or not.
_OTHERS = torch.backends.mps.is_built() or torch.xpu._is_compiled()
_name_of_extension: Callable[[], str] = torch._C._get_privateuse1_backend_name
_NOBODYS = "privateuseone"  # the device of an extension, as long as none has given it a name


def passes_leave_their_thread() -> bool:
    """Whether backward passes may run in threads of devices; on the CPU only deep nests do."""
    # torch.cuda.is_initialized(), but in forked processes, where nothing runs on CUDA: every call asks
    return _OTHERS or cuda._initialized or _name_of_extension() != _NOBODYS


def passed_along() -> object:
    """What :func:`pass_along` was given last in this thread, or before the backward pass that it runs."""
    return _get(_KEY) if _has(_KEY) else None


def pass_along(value: object) -> None:
    """Have backward passes that begin in this thread from now on find ``value``; ``None``: nothing.

    Whoever does that puts back what :func:`passed_along` said before.
    """
    if value is None and _remove is not None:
        _remove(_KEY)  # a thread that ends with it has to wait for Python
    else:
        stash(_KEY, value)


def stash(key: str, value: object) -> None:
    """Keep it where backward passes that begin in this thread find it."""
    if _STEALS:
        _count_one_more(value)
    _keep(key, value)


def _count_one_more(value: object) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def _steals_references() -> bool:
    """Whether PyTorch keeps what it is given without counting that, and frees it once (2.10 and 2.11 do)."""
    probe = object()
    _count_one_more(probe)
    before = sys.getrefcount(probe)
    _keep(_KEY, probe)
    steals = sys.getrefcount(probe) == before
    if not steals:
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(probe))
    if _remove is not None:
        _remove(_KEY)
    else:
        if steals:
            _count_one_more(None)
        _keep(_KEY, None)
    return steals


_STEALS = _steals_references()
