"""Fused attention and the inference fast path of PyTorch's transformer layers, off and on again.

``torch.nn.attention.sdpa_kernel`` does the same in ten times the time, and the wrappers in
``torch.backends.cuda`` take more than what they wrap: small Hessians would feel both. Where ``f`` enters
``sdpa_kernel`` itself, kernels are switched off for each call. With dropout, PyTorch's own formula ends the
process in forward mode inside ``vmap`` (2.13): there it is written out.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import mha

from .exchanges import Exchange, known_to_torchscript
from .forward import in_forward_ad
from .levels import transform_stack
from .wants import runs_fused_here

__all__ = ["ATTENTION", "fuse_attention_again", "unfuse_attention"]

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


_attention: Any = F.scaled_dot_product_attention


def _unfused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` computes without its kernels, whoever has allowed them since."""
    args = (query, key, value, attn_mask, dropout_p, is_causal)
    if torch.compiler.is_compiling() or runs_fused_here():
        return _attention(*args, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    if dropout_p > 0 and in_forward_ad() and "vmap" in transform_stack():
        return _written_attention(*args, scale, enable_gqa)
    allowed = unfuse_attention()
    try:
        return _attention(*args, scale=scale, enable_gqa=enable_gqa)  # type: ignore[no-any-return]
    finally:
        fuse_attention_again(allowed)


def _written_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    is_causal: bool,
    scale: float | None,
    repeats_heads: bool,
) -> Tensor:
    if repeats_heads:
        heads = query.shape[-3]
        key, value = (x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    root = math.sqrt(abs(scale))  # of each, lest half precision overflows
    scores = (query * math.copysign(root, scale)) @ (key * root).transpose(-2, -1)
    if is_causal:
        if mask is not None:
            raise RuntimeError("scaled_dot_product_attention: attn_mask goes without is_causal=True")
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype is torch.bool else scores + mask
    blind = (scores == -math.inf).all(-1, keepdim=True)  # a query that sees no key gets zeros
    weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    return F.dropout(weights, dropout) @ value


ATTENTION = (Exchange(F, "scaled_dot_product_attention", _attention, _unfused_attention),)
known_to_torchscript(ATTENTION)
