"""torchzygote: Zygote's utilities for PyTorch.

Public names and nothing else; each is documented where it is defined.
"""

from __future__ import annotations

from . import _after_fork as _after_fork
from ._cost_model import set_memory_budget
from ._version import __version__ as __version__
from .buffer import Buffer
from .checkpointing import checkpointed
from .eager import eager_update
from .forward_mode import DroppedGradientWarning, forwarddiff
from .graddict import GradDict
from .gradients import WithGradient, gradient, pullback, pushforward, withgradient
from .grads import Grads
from .hessians import WithHessian, diaghessian, hessian, hessian_dual, hessian_reverse, withhessian
from .hooks import hook, showgrad
from .jacobians import WithJacobian, jacobian, withjacobian
from .nondifferentiable import ignore_derivatives, isderiving
from .params import Params
from .plans import HessianPlan, JacobianPlan, jacobian_sparsity, plan_hessian, plan_jacobian
from .sparsity.detect import hessian_sparsity
from .vectors import copy_

__all__ = [
    "Buffer",
    "DroppedGradientWarning",
    "GradDict",
    "Grads",
    "HessianPlan",
    "JacobianPlan",
    "Params",
    "WithGradient",
    "WithHessian",
    "WithJacobian",
    "checkpointed",
    "copy_",
    "diaghessian",
    "eager_update",
    "forwarddiff",
    "gradient",
    "hessian",
    "hessian_dual",
    "hessian_reverse",
    "hessian_sparsity",
    "hook",
    "ignore_derivatives",
    "isderiving",
    "jacobian",
    "jacobian_sparsity",
    "plan_hessian",
    "plan_jacobian",
    "pullback",
    "pushforward",
    "set_memory_budget",
    "showgrad",
    "withgradient",
    "withhessian",
    "withjacobian",
]
