"""Every case, by its name."""

from __future__ import annotations

import derivative_cases  # noqa: F401
import mixed_cases  # noqa: F401
import plan_cases  # noqa: F401
import thread_cases  # noqa: F401
import waiting_cases  # noqa: F401
from device_cases import CASES

__all__ = ["CASES"]
