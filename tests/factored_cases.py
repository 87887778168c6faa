"""Losses as functions of weights: those of which affine maps give the second derivatives, and others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchzygote import _affine_products, _dense_hessians, _factored, _separable
from torchzygote.checkpointing import checkpointed
from torchzygote.hooks import hook

Loss = Callable[..., Tensor]

D = torch.float64
X, X3 = (
    torch.linspace(-1, 1, 48, dtype=D).sin().view(8, 6),
    torch.linspace(-2, 1, 72, dtype=D).cos().view(3, 4, 6),
)
R = torch.tensor([0.3, -0.7, 1.1, 0.2, -0.4], dtype=D)
T = torch.linspace(-1, 1, 60, dtype=D).view(2, 6, 5)
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def head(h: Tensor) -> Tensor:
    """Mixes the channels, not the samples."""
    return (h.tanh() @ R).exp().mean()


def pieces(p: Tensor) -> Tensor:
    w1, b1, w2, b2 = p[:30].view(6, 5), p[30:35], p[35:50].view(5, 3), p[-3:]
    return ((X @ w1 + b1).tanh() @ w2 + b2).square().mean()


def split(p: Tensor) -> Tensor:
    w1, b1, w2, b2 = p.split([30, 5, 15, 3])
    h = F.linear(X, w1.view(5, 6), b1).sin()
    return F.cross_entropy(F.linear(h, w2.view(3, 5), b2), LABELS % 3)


def some_by_row(p: Tensor) -> Tensor:
    w1, scale, w2 = p[:30].view(6, 5), p[30:35], p[35:].view(5, 3)
    return (((X @ w1).tanh() * scale.exp()) @ w2).square().mean()


# the function, the shapes of its arguments, and how many products are taken besides the checks
FACTORED: dict[str, tuple[Loss, list[tuple[int, ...]], int]] = {
    "matrix": (lambda w: head(X @ w), [(6, 5)], 5),
    "transposed": (lambda w: head(X @ w.t()), [(5, 6)], 5),
    "from the left": (lambda w: head((w @ X.t()).t()), [(5, 6)], 5),
    "from the left, transposed": (lambda w: head((w.mT @ X.mT).mT), [(6, 5)], 5),
    "reshaped": (lambda w: head(X @ w.view(6, 5)), [(30,)], 5),
    "permuted": (lambda w: head(X @ w.permute(1, 2, 0).reshape(6, 5)), [(5, 2, 3)], 5),
    "linear layer": (lambda w, b: head(F.linear(X, w, b)), [(5, 6), (5,)], 5),
    "bias added": (lambda w, b: head(X @ w + b), [(6, 5), (5,)], 5),
    "bias in front": (lambda w, b: head(b + X @ w), [(6, 5), (1, 5)], 5),
    "bias of rows": (lambda w, b: head((w @ X.t() + b[:, None]).t()), [(5, 6), (5,)], 5),
    "bias times two": (lambda w, b: head(torch.add(X @ w, b, alpha=2)), [(6, 5), (5,)], 5),
    "addmm": (lambda w, b: head(torch.addmm(b, X, w, beta=0.5, alpha=2)), [(6, 5), (5,)], 5),
    "three axes": (lambda w, b: head(F.linear(X3, w, b)), [(5, 6), (5,)], 5),
    "three axes, no bias": (lambda w: head(F.linear(X3, w)), [(5, 6)], 5),
    "three axes, bias added": (lambda w, b: head(X3 @ w + b), [(6, 5), (5,)], 5),
    "one sample": (lambda w, b: head(F.linear(X[0], w, b)), [(5, 6), (5,)], 5),
    "matrix times vector": (lambda w: head(w @ X[0]), [(5, 6)], 5),
    "addmv": (lambda w, b: head(torch.addmv(b, w, X[0], beta=2, alpha=0.5)), [(5, 6), (5,)], 5),
    "row times matrix": (lambda w: head(X[0] @ w), [(6, 5)], 5),
    "einsum": (lambda w: head(torch.einsum("bk,ck->bc", X, w)), [(5, 6)], 5),
    "generalized linear model": (lambda w: F.softplus(X @ w).sum(), [(6,)], 1),
    "dot": (lambda w: (X[0] @ w).exp(), [(6,)], 1),
    "one channel": (lambda w, b: F.linear(X, w, b).squeeze(-1).exp().mean(), [(1, 6), (1,)], 1),
    "cross entropy": (lambda w, b: F.cross_entropy(F.linear(X, w, b), LABELS), [(5, 6), (5,)], 5),
    "layer norm": (lambda w, b: head(F.layer_norm(F.linear(X, w, b), (5,))), [(5, 6), (5,)], 5),
    "mean squares": (lambda w: F.mse_loss((X @ w).sin() @ R, X[:, 0]), [(6, 5)], 5),
    "linear but for a penalty": (lambda w: (X @ w).sum() + w.pow(3).sum(), [(6, 5)], 0),
    "penalty": (lambda w: head(X @ w) + 0.1 * w.square().sum(), [(6, 5)], 6),
    "penalty, a product": (lambda w: F.softplus(X @ w).sum() + (w * w).sum(), [(6,)], 2),
    "penalty, absolute": (lambda w: head(X @ w) + w.abs().sum(), [(6, 5)], 6),
    "penalty of both": (
        lambda w, b: head(F.linear(X, w, b)) + w.pow(4).sum() + b.cos().sum(),
        [(5, 6), (5,)],
        7,
    ),
    "penalty that mixes": (lambda w: head(X @ w) + w.sum(1).exp().sum(), [(6, 5)], 10),
    "penalty, repeated": (
        lambda w, b: head(X @ w + b) + (w * T).sum() + (b * w.detach()).square().sum(),
        [(6, 5), (5,)],
        6,
    ),
    "pieces": (pieces, [(53,)], 6),
    "split": (split, [(53,)], 8),
    "split, penalty": (lambda p: split(p) + p.square().sum(), [(53,)], 9),
    "rest by row": (some_by_row, [(50,)], 11),
    "strided": (lambda w: head(X @ w[::2]) + (X @ w[1::2]).sin().sum(), [(12, 5)], 6),
    "stacked": (lambda w: head(X @ w[0]) * head(X @ w[1]), [(2, 6, 5)], 10),
    "unbound": (lambda w: head(X @ w.unbind(2)[0]) * head(X @ w.unbind(2)[1]), [(6, 5, 2)], 10),
    "a number from a vector": (lambda p: (X @ p[:6] + p[6]).exp().mean(), [(8,)], 1),
    "a number": (lambda w, b: (X @ w + b).exp().mean(), [(6,), ()], 1),
    "unused piece": (lambda p: head(X @ p[:30].view(6, 5)), [(40,)], 5),
    "both factors": (lambda a, b: torch.dot(a, b).sin(), [(6,), (6,)], 2),
    "both factors, halves": (lambda p: torch.dot(p[:6], p[6:]).sin(), [(12,)], 2),
    "both factors, layer": (lambda x, w, b: F.softplus(F.linear(x, w, b)).sum(), [(1, 6), (1, 6), (1,)], 2),
    "both factors, addmv": (
        lambda b, w, x: torch.addmv(b, w, x, alpha=2).exp().sum(),
        [(1,), (1, 6), (6,)],
        2,
    ),
    "both factors, batch": (lambda a, b: torch.bmm(a, b).sin().sum(), [(1, 1, 6), (1, 6, 1)], 2),
    "both factors, sum": (
        lambda a, b, c: (a @ b + X[0] @ c + c.sum() * 2 + 1).sin() + a.pow(3).sum(),
        [(6,), (6,), (6,)],
        9,
    ),
    "both factors, crosswise": (lambda p: (p[:6] @ p[6:12] + X[0] @ p[12:]).sin(), [(18,)], 2),
}
# An element that goes two ways, samples that meet, or hooks: the plain way.
PLAIN: dict[str, tuple[Loss, list[tuple[int, ...]]]] = {
    "twice": (lambda w: ((X @ w).tanh() @ w).exp().mean(), [(6, 6)]),
    "tied": (lambda w: ((X @ w).tanh() @ w.t() - X).square().sum(), [(6, 5)]),
    "times a penalty": (lambda w: head(X @ w) * w.square().sum(), [(6, 5)]),
    "factor depends on it": (lambda w: ((X * w.square()) @ w).sum(), [(6,)]),
    "factor depends on it, linear": (lambda w: (X @ w.diag() @ w).exp().sum(), [(6,)]),
    "product with itself": (lambda w: head(w @ w @ X[:5, :5]), [(5, 5)]),
    "overlapping pieces": (lambda w: head(X @ w[:6]) + (X @ w[1:7]).sin().sum(), [(7, 5)]),
    "batch norm": (lambda w: head(F.batch_norm(X @ w, None, None, training=True)), [(6, 5)]),
    "samples meet": (lambda w: head((X @ w).softmax(0)), [(6, 5)]),
    "tokens meet": (lambda w: head((X3 @ w).mean(1)), [(6, 5)]),
    "tensor hook": (lambda w: head(bent(X @ w)), [(6, 5)]),
    "hook": (lambda w: head(hook(lambda g: 2 * g, X @ w)), [(6, 5)]),
    "checkpointed": (lambda w: checkpointed(head, X @ w), [(6, 5)]),
}


def bent(h: Tensor) -> Tensor:
    h = h * 1
    if h.requires_grad and not torch._C._functorch.is_functorch_wrapped_tensor(h):
        h.register_hook(lambda g: g * 2)
    return h


def doubled(x: Tensor) -> Tensor:
    """``x`` with twice its gradient, as the hooks above have it."""
    return 2 * x - x.detach()


ORACLES: dict[str, Loss] = {
    "tensor hook": lambda w: head(doubled(X @ w)),
    "hook": lambda w: head(doubled(X @ w)),
    "checkpointed": lambda w: head(X @ w),
}


def arguments(shapes: list[tuple[int, ...]], dtype: torch.dtype = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=D).to(dtype) for shape in shapes]


def by_torch_func(f: Loss, xs: list[Tensor]) -> list[Tensor]:
    found = []
    for i, x in enumerate(xs):
        by_x = lambda v, i=i: f(*xs[:i], v, *xs[i + 1 :])
        found.append(torch.func.hessian(by_x)(x).reshape(x.numel(), -1).diagonal().reshape(x.shape))
    return found


def everything_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Affine maps are looked for whatever the size, and nothing else is before them."""
    for module in (_factored, _affine_products):
        monkeypatch.setattr(module, "LEAST_SAVING", 0)
    monkeypatch.setattr(_factored, "LEAST_ROWS", 1)
    monkeypatch.setattr(
        _dense_hessians, "diagonals_along_batch", lambda second, _: [None] * len(second.grads)
    )
    monkeypatch.setattr(_separable, "LEAST_ROWS", 1)
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)
    monkeypatch.setattr(_separable, "LEAST_SAVING", 0)
