"""Fused attention and the inference fast path of PyTorch's transformer layers, off and on again.

``torch.nn.attention.sdpa_kernel`` does the same in ten times the time, and the wrappers in
``torch.backends.cuda`` take more than what they wrap: small Hessians would feel both.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.backends import mha

__all__ = ["fuse_attention_again", "unfuse_attention"]

_C: Any = torch._C
_mha: Any = mha
# Whether a kernel is allowed, its switch, and what is wanted of it: the last is the formula.
_ON_CPU = (
    (_C._get_flash_sdp_enabled, _C._set_sdp_use_flash, False),
    (_C._get_math_sdp_enabled, _C._set_sdp_use_math, True),
)
_ON_DEVICES = (
    (_C._get_mem_efficient_sdp_enabled, _C._set_sdp_use_mem_efficient, False),
    (_C._get_cudnn_sdp_enabled, _C._set_sdp_use_cudnn, False),
)
_built_for = (torch.version.cuda, torch.version.hip, getattr(torch.version, "xpu", None))
_KERNELS = (*_ON_CPU, *_ON_DEVICES) if any(_built_for) or sys.platform == "darwin" else _ON_CPU


def unfuse_attention() -> list[bool]:
    """Leave the formula alone to compute attention; returns what was allowed before."""
    before = [_mha._is_fastpath_enabled]
    _mha._is_fastpath_enabled = False
    for is_allowed, switch, wanted in _KERNELS:
        allowed = is_allowed()
        before.append(allowed)
        if allowed is not wanted:
            switch(wanted)
    return before


def fuse_attention_again(before: list[bool]) -> None:
    """Allow again what was allowed before."""
    if before[0]:
        _mha._is_fastpath_enabled = True
    for allowed, (_, switch, wanted) in zip(before[1:], _KERNELS, strict=True):
        if allowed is not wanted:
            switch(allowed)
