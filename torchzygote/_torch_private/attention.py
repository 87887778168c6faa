"""Fused attention and the inference fast path of PyTorch's transformer layers, off and on again.

``torch.nn.attention.sdpa_kernel`` does the same in ten times the time, and the wrappers in
``torch.backends.cuda`` take more than what they wrap: small Hessians would feel both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.backends import mha

__all__ = ["fuse_attention_again", "unfuse_attention"]

_C: Any = torch._C
_mha: Any = mha
Flags = tuple[bool, bool, bool, bool, bool]


def unfuse_attention() -> Flags:
    """Leave the formula alone to compute attention; returns what was allowed before."""
    before = (
        _C._get_flash_sdp_enabled(),
        _C._get_mem_efficient_sdp_enabled(),
        _C._get_cudnn_sdp_enabled(),
        _C._get_math_sdp_enabled(),
        _mha._is_fastpath_enabled,
    )
    flash, efficient, cudnn, formula, _ = before
    if flash:
        _C._set_sdp_use_flash(False)
    if efficient:
        _C._set_sdp_use_mem_efficient(False)
    if cudnn:
        _C._set_sdp_use_cudnn(False)
    if not formula:
        _C._set_sdp_use_math(True)
    _mha._is_fastpath_enabled = False
    return before


def fuse_attention_again(before: Flags) -> None:
    """Allow again what was allowed before."""
    flash, efficient, cudnn, formula, fast = before
    if flash:
        _C._set_sdp_use_flash(True)
    if efficient:
        _C._set_sdp_use_mem_efficient(True)
    if cudnn:
        _C._set_sdp_use_cudnn(True)
    if not formula:
        _C._set_sdp_use_math(False)
    if fast:
        _mha._is_fastpath_enabled = True
