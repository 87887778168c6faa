"""Layers of torch.nn: covered by rules, their structure found, examples of a batch apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from detection import detect_hessian, detect_jacobian
from oracles import covers, true_hessian, true_jacobian
from torch import Tensor, nn

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4).eval(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 2, 6, 6),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(), (2, 3, 4)),
    "transformer, dropping out": (lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
    "decoder": (lambda: _Decoder(), (2, 3, 4)),
    "LSTM": (lambda: _Recurrent(nn.LSTM), (3, 2, 2)),
    "GRU": (lambda: _Recurrent(nn.GRU), (3, 2, 2)),
    "RNN": (lambda: _Recurrent(nn.RNN), (3, 2, 2)),
    "LSTM cell": (lambda: _Cell(), (2, 3)),
    "U-net": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 2, stride=2),
            nn.GELU(),
            nn.ConvTranspose2d(2, 1, 2, stride=2),
            nn.Upsample(scale_factor=2),
        ),
        (1, 1, 4, 4),
    ),
    "normalized": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Softmax(-1)), (3, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
    "batch norm, training": (lambda: nn.BatchNorm1d(3), (4, 3)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).eval(), (2, 3)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), (2, 3)),
    "bilinear": (lambda: _Pair(nn.Bilinear(3, 3, 2)), (2, 3)),
}


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 8, batch_first=True).eval()

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(3).to(x.dtype)
        return self.layer(x, x * 0.5, tgt_mask=mask, tgt_is_causal=True)


class _Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layer = kind(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTMCell(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[1]


class _Pair(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(0))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_covered_by_rules(name: str) -> None:
    make, shape = LAYERS[name]
    layer = make().double()
    x = torch.rand(shape, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer(x)

    def loss(x: Tensor) -> Tensor:
        return f(x).square().sum()

    (J,) = detect_jacobian(f, [x])
    (H,) = detect_hessian(loss, [x])
    assert J.unknown == ()
    assert H.unknown == ()
    assert covers(J.to_dense(), true_jacobian(f, x))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert covers(H.to_dense(), true_hessian(loss, x))
    if (
        shape[0] > 1
        and name not in ("batch norm, training", "bilinear")
        and name[:3] not in ("LST", "GRU", "RNN")
    ):
        per = x[0].numel()  # examples of a batch don't mix
        assert not J.to_dense()[: J.shape[0] // shape[0], per:].any()
