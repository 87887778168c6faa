"""Marks of tests that fail with an older PyTorch, which the package supports otherwise."""

from __future__ import annotations

import pytest
import torch


def needs_torch(version: str, why: str) -> pytest.MarkDecorator:
    """An expected failure before this version, for a reason that is PyTorch's; to pass there is an error."""
    older = torch.__version__ < version
    return pytest.mark.xfail(older, reason=f"PyTorch before {version}: {why}", strict=True)


tracer_forgets_hooks = "2.11" <= torch.__version__ < "2.13"
hooks_compiled = needs_torch("2.11", "Dynamo doesn't trace Tensor.register_hook")
custom_functions_compiled = needs_torch("2.11", "Dynamo doesn't trace autograd.Function inside torch.func")
hooks_compiled_twice = needs_torch("2.13", "Dynamo forgets hooks in second derivatives and under vmap")
messages_with_sizes_compiled = needs_torch("2.12", "Dynamo shows the parts of a message with symbolic sizes")
copy_compiled = needs_torch("2.12", "Dynamo doesn't trace copy.copy")
aminmax_derived = needs_torch("2.12", "derivative for aten::aminmax is not implemented")
masked_compiled = needs_torch("2.13", "Dynamo doesn't trace x[mask] inside torch.func")
nextafter_derived = needs_torch("2.13", "the derivative for 'nextafter' is not implemented")
grid_sample_derived_twice = needs_torch(
    "2.12", "derivative for aten::grid_sampler_2d_backward is not implemented"
)
