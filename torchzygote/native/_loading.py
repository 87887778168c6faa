"""Loading the compiled libraries, and remembering why one isn't there.

Knows files and devices; it must not know what the operators compute.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from ._autograd import OPERATORS, finish_registration

__all__ = ["info", "loaded_devices", "operator", "telling_refusals"]

_FOLDER = Path(__file__).parent
_SUFFIXES = (".abi3.so", ".so", ".pyd")
_SETTINGS = ("auto", "require", "off")
# From that version on, what a library with the stable ABI throws arrives as a RuntimeError.
_ERRORS_LOSE_TYPES = torch.__version__ >= "2.15.0.dev0"
_REFUSAL = re.compile(r"[\w\[\]]+: expected ")

# device type -> why its operators are not there; empty where they are
_reasons: dict[str, str] = {}
_files: dict[str, str] = {}
loaded_devices: set[str] = set()


def _setting() -> str:
    setting = os.environ.get("TORCHZYGOTE_NATIVE") or "auto"
    if setting not in _SETTINGS:
        raise ValueError(f"TORCHZYGOTE_NATIVE: expected one of {', '.join(_SETTINGS)}, got {setting!r}")
    return setting


def _load_one(device: str, stem: str) -> None:
    path = next((p for s in _SUFFIXES if (p := _FOLDER / f"{stem}{s}").exists()), None)
    if path is None:
        needed = "a C++ compiler is" if device == "cpu" else "nvcc is"
        _reasons[device] = f"{stem} was not built; pip install --no-build-isolation does so where {needed}"
        return
    _files[device] = str(path)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except Exception as error:  # a broken library must not break the package
        _reasons[device] = f"{path.name} could not be loaded: {str(error).strip().splitlines()[0]}"
        return
    if not all(hasattr(torch.ops.torchzygote, name) for name in OPERATORS):
        _reasons[device] = f"{path.name} was built from other sources; build it again"
        return
    loaded_devices.add(device)
    _reasons[device] = ""


def _load() -> None:
    """Load what is there; once, as the package is imported."""
    setting = _setting()
    if setting == "off":
        _reasons.update(dict.fromkeys(("cpu", "cuda"), "TORCHZYGOTE_NATIVE=off"))
        return
    _load_one("cpu", "_C")
    if "cpu" in loaded_devices:
        finish_registration()
    elif setting == "require":
        raise ImportError(
            f"TORCHZYGOTE_NATIVE=require, but the native library is not there: {_reasons['cpu']}"
        )
    if "cpu" not in loaded_devices:
        _reasons["cuda"] = "the CPU library, which defines the operators, is not loaded"
    elif not torch.cuda.is_available():
        _reasons["cuda"] = "torch.cuda is not available"
    else:
        _load_one("cuda", "_C_cuda")
        if setting == "require" and _reasons["cuda"]:
            raise ImportError(f"TORCHZYGOTE_NATIVE=require, but {_reasons['cuda']}")


def operator(name: str) -> Any:
    """The loaded operator ``torchzygote::name``; what it refuses is a ``ValueError``."""
    return telling_refusals(getattr(torch.ops.torchzygote, name).default)


def telling_refusals(loaded: Any) -> Any:
    """An operator that raises a ``ValueError`` where the library does so, in all versions of PyTorch."""
    if not _ERRORS_LOSE_TYPES:
        return loaded

    def call(*args: Any) -> Any:
        try:
            return loaded(*args)
        except RuntimeError as error:
            if type(error) is not RuntimeError or not _REFUSAL.match(str(error)):
                raise
            refusal = ValueError(*error.args)
        raise refusal

    return call


def info() -> dict[str, Any]:
    """What is loaded of the native library, for which devices, and why not where it isn't.

    Returns
    -------
    dict
        ``setting``: the environment variable ``TORCHZYGOTE_NATIVE``, ``"auto"`` by default. ``devices``: the
        device types whose operators are loaded. ``files``: what was found for each. ``missing``: for each of
        the other device types the reason.

    Examples
    --------
    >>> from torchzygote import native
    >>> sorted(native.info())
    ['devices', 'files', 'missing', 'setting']
    """
    return {
        "setting": _setting(),
        "devices": sorted(loaded_devices),
        "files": dict(_files),
        "missing": {device: reason for device, reason in _reasons.items() if reason},
    }


_load()
