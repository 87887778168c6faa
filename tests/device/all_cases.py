"""Every case, by its name: modules register theirs as they are imported."""

from __future__ import annotations

import derivative_cases  # noqa: F401 (registers its cases, as the others do)
import mixed_cases  # noqa: F401
import plan_cases  # noqa: F401
import thread_cases  # noqa: F401
import waiting_cases  # noqa: F401
from device_cases import CASES

__all__ = ["CASES"]
