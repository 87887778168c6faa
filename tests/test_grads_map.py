"""map, map_ and foreach: which of them write, and what becomes of None."""

from __future__ import annotations

import pytest
import torch
from grads_samples import close, two

from torchzygote import GradDict


def test_map_is_out_of_place_and_map_in_place() -> None:
    w, b, g, h = two()
    before = g.copy()
    close(g.map(lambda x, y: x.clamp(max=1) + y, h), {k: before[k].clamp(max=1) + h[k] for k in (w, b)})
    assert g == before
    assert g.map_(torch.sub, h) is g
    close(g, {k: before[k] - h[k] for k in (w, b)})
    g[b] = None
    assert g.map(lambda x: x + 1)[b] == 1
    assert g.map(lambda x: tuple(x.shape))[w] == (2, 3)
    now = g.copy()
    with pytest.raises(ZeroDivisionError):
        g.map_(lambda x: x * 2 if x.dim() else 1 / 0)
    assert g == now


def test_foreach_is_for_effects() -> None:
    w, b, g, h = two()
    before = g.copy()
    assert g.foreach(lambda x, y: x.clamp_(max=0.7).add_(y), h) is None
    close(g, {k: before[k].clamp(max=0.7) + h[k] for k in (w, b)})


def test_foreach_keeps_zeros_that_were_written_into() -> None:
    w, b = torch.ones(2), torch.ones(3)
    g = GradDict({w: None, b: None})
    seen = []
    g.foreach(lambda x: seen.append(x.clone()))
    assert torch.equal(torch.cat(seen), torch.zeros(5))
    assert g[w] is None
    g.foreach(lambda x: x.add_(1.0) if len(x) == 2 else None)
    assert torch.equal(g[w], torch.ones(2))
    assert g[b] is None
