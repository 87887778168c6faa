"""Which functions of the package a test calls."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest


def noted_calls(monkeypatch: pytest.MonkeyPatch, module: ModuleType, *names: str) -> list[str]:
    """The names of these functions of a module, in the order in which they are called from now on."""
    calls: list[str] = []
    for name in names:
        original = getattr(module, name)

        def noted(*args: Any, _name: str = name, _original: Any = original) -> Any:
            calls.append(_name)
            return _original(*args)

        monkeypatch.setattr(module, name, noted)
    return calls
