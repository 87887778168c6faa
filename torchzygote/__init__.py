"""torchzygote: Zygote's utilities for PyTorch.

Public names and nothing else; each is documented where it is defined.
"""

from __future__ import annotations

from ._plan import set_memory_budget
from ._version import __version__
from .gradients import WithGradient, gradient, pullback, pushforward, withgradient
from .hessians import WithHessian, diaghessian, hessian, hessian_dual, hessian_reverse, withhessian
from .jacobians import WithJacobian, jacobian, withjacobian

__all__ = [
    "WithGradient",
    "WithHessian",
    "WithJacobian",
    "__version__",
    "diaghessian",
    "gradient",
    "hessian",
    "hessian_dual",
    "hessian_reverse",
    "jacobian",
    "pullback",
    "pushforward",
    "set_memory_budget",
    "withgradient",
    "withhessian",
    "withjacobian",
]
