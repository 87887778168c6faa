"""Scalar functions of a batch, and others, for the sums of each operation's curvature."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote import checkpointed, diaghessian, gradient

BATCH = 60
D = torch.float64
W = torch.linspace(-1, 1, 12, dtype=D).cos().view(3, 4)
C = torch.linspace(0.2, 1.7, BATCH, dtype=D)
CLASSES = torch.arange(BATCH) % 4


def points(*shape: int) -> Tensor:
    return (torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=D) * 40).sin().reshape(shape) + 1.3


def layers(inputs: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), act(), nn.Linear(8, 8), act(), nn.Linear(8, 1)).double()


NET = layers(3)
ONE = """
    tanh sigmoid exp sin cos sqrt log log1p expm1 reciprocal rsqrt square abs neg sinh cosh tan atan erf erfc
    lgamma exp2 log2 log10 sinc relu positive
""".split()  # noqa: SIM905 (a list of names would take thirty lines)
ACTIVATIONS = """
    silu gelu softplus elu celu selu mish leaky_relu hardswish softsign logsigmoid hardtanh
""".split()  # noqa: SIM905
# x has shape (BATCH, 3), between 0.3 and 2.3
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: (lambda x, name=name: getattr(torch, name)(x * 0.4).sum()) for name in ONE},
    **{f"F.{name}": (lambda x, name=name: getattr(F, name)((x - 1) * 2).sum()) for name in ACTIVATIONS},
    "a network": lambda x: NET(x).sum(),
    "squares of a network": lambda x: NET(x).square().mean(),
    "powers": lambda x: (x**3 + x**2 + x**0.5 - x**-1 + x**1 + x**0 + 2**x).sum(),
    "powers by a tensor": lambda x: (x ** C[:, None]).sum(),
    "columns": lambda x: (x[:, 0] * x[:, 1].sin() / x[:, 2]).sum(),
    "columns as slices": lambda x: (x[:, :2] * x[:, 1:]).exp().sum(),
    "columns as parts": lambda x: (lambda a, b, c: a * b.exp() * c)(*x.unbind(1)).sum(),
    "columns as splits": lambda x: (lambda a, b: a * b.sin()).__call__(*x.split([1, 2], 1)).sum(),
    "stacked": lambda x: torch.stack([x[:, 0], C, x[:, 2].exp()], 1).prod(1).log().sum(),
    "joined": lambda x: torch.cat([x.sin(), x[:, :1].cos()], 1).square().sum(),
    "joined with a constant": lambda x: torch.cat([x.sin(), C[:, None]], 1).square().sum(1).exp().sum(),
    "times itself": lambda x: (x * x * x).sum(),
    "over itself": lambda x: (x / (1 + x * x)).sum(),
    "over a sum of itself": lambda x: (x / x.sum(1, keepdim=True)).square().sum(),
    "a constant over it": lambda x: (2 / x - C[:, None] / x).sum(),
    "times a constant": lambda x: (C[:, None] * x.exp() * 3).sum(),
    "added and subtracted": lambda x: torch.add(torch.sub(x.sin(), x[:, :1], alpha=3), x**2, alpha=-2).sum(),
    "from a number": lambda x: (1 - x).square().sum(),
    "a matrix product": lambda x: (x @ W).sin().sum(),
    "a product read twice": lambda x: (lambda h: h.tanh().exp() + h.sin() * h)(x @ W).sum(),
    "a product and views of it": lambda x: (lambda h: h.view(-1, 2, 2).tanh().sum((1, 2)) * h[:, 0])(
        x @ W
    ).sum(),
    "a product that is summed up, too": lambda x: (lambda h: h.exp().sum() + h.sum())(x @ W),
    "a function of a function, read twice": lambda x: (lambda h: h.exp() * h + h.view(-1, 4))(
        (x @ W).tanh()
    ).sum(),
    "a matrix product, scaled": lambda x: torch.addmm(x[:, :1], x.exp(), W, beta=2, alpha=3).square().sum(),
    "a matrix from the left": lambda x: (W.t() @ x.t()).exp().sum(),
    "a product of matrices": lambda x: (x.view(-1, 3, 1) @ x.view(-1, 1, 3)).sin().sum(),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, None], x[:, :, None], x[:, None, :1], alpha=2).exp().sum(),
    "einsum": lambda x: torch.einsum("bi,ij,bk,kj->b", x, W, x, W).sin().sum(),
    "logsumexp": lambda x: (x @ W).logsumexp(1).square().sum(),
    "logsumexp, kept": lambda x: ((x @ W) - (x @ W).logsumexp(1, keepdim=True)).exp().square().sum(),
    "logsumexp of several": lambda x: (x[:, :, None] * W).logsumexp((1, 2)).sum(),
    "softmax": lambda x: ((x @ W).softmax(1) * (x @ W)).sum(),
    "log_softmax": lambda x: ((x @ W).log_softmax(-1) ** 2).sum(),
    "softmax in front": lambda x: ((x @ W).t().softmax(0) ** 2).sum(),
    "a norm": lambda x: torch.linalg.vector_norm(x @ W, dim=1).sum(),
    "a norm, kept": lambda x: (x / x.norm(dim=1, keepdim=True)).exp().sum(),
    "a norm of several": lambda x: (x[:, :, None] * W).norm(dim=(1, 2)).exp().sum(),
    "amax": lambda x: (x @ W).amax(1).square().sum(),
    "means": lambda x: (x.exp().mean(1) + x.mean(1, keepdim=True).square()[:, 0]).mean(),
    "cross entropy": lambda x: F.cross_entropy(x @ W, CLASSES),
    "mse": lambda x: F.mse_loss(x.sin(), C[:, None].expand(-1, 3)),
    "mse of each": lambda x: F.mse_loss(x.sin(), C[:, None].expand(-1, 3), reduction="none").exp().sum(),
    "bce": lambda x: F.binary_cross_entropy_with_logits(x[:, 0] * x[:, 1], (C > 1).double()),
    "huber": lambda x: F.huber_loss(x.sin() * 3, C[:, None].expand(-1, 3), reduction="sum"),
    "a choice": lambda x: torch.where(x > 1, x.sin(), x**3).sum(),
    "clamped": lambda x: (x.clamp(0.5, 1.8) ** 3).sum(),
    "masked": lambda x: (x.masked_fill(x > 2, 0.0).exp()).sum(),
    "flipped within": lambda x: (x.flip(1) * x).sin().sum(),
    "cumulated within": lambda x: x.cumsum(1).square().exp().log().sum(),
    "padded within": lambda x: F.pad(x, (1, 2), value=0.5).square().sum(),
    "repeated": lambda x: (x[:, :1].expand(-1, 4) * (x @ W)).sin().sum(),
    "views": lambda x: x.reshape(-1, 3, 1).squeeze(2).unsqueeze(0).exp()[0].t().contiguous().sum(),
    "permuted": lambda x: (x[:, :, None] * W).permute(2, 0, 1).sin().transpose(0, 2).square().sum(),
    "in place": lambda x: (x * 1.0).sin_().mul_(x).square_().sum(),
    "relu in place": lambda x: F.relu((x - 1) @ W, inplace=True).square().sum(),
    "linear in a column": lambda x: (x[:, 0] ** 2 + x[:, 1]).sum(),
    "a weighted sum": lambda x: C @ x.exp() @ torch.ones(3, dtype=D),
    "several sums": lambda x: x.exp().sum() - 2 * (x @ W).sin().mean() + (C[:, None] * x**3).sum() / 7,
    "twice the same sum": lambda x: (lambda s: s + s)(x.exp().sum()),
    "terms of terms": lambda x: (lambda s: s.sum() + s.square().sum() * 0.5 + (s * 2).sin().sum())(x.exp()),
    "linear, too": lambda x: x.exp().sum() + x[:, 1].sum() - 3 * x.sin().mean(),
    "a loss of a term": lambda x: (lambda s: s.sum() + F.mse_loss(s, C[:, None].expand(-1, 3)))(x.exp()),
    "a gradient inside": lambda x: gradient(lambda t: (t**3).sum(), x, create_graph=True)[0].pow(2).sum(),
    "a gradient of torch.func inside": lambda x: torch.func.grad(lambda t: (t**3).sum())(x).sin().sum(),
    "a diagonal inside": lambda x: diaghessian(lambda t: (t**5).sum(), x, create_graph=True)[0].pow(2).sum(),
    "a pushforward inside": lambda x: torch.func.jvp(torch.sin, (x,), (x.cos(),))[1].square().sum(),
    "times a scalar": lambda x: torch.ops.aten.mul.Scalar(x.sin(), 2.0).square().sum(),
    "over a scalar": lambda x: torch.ops.aten.div.Scalar(x.sin(), 2.0).square().sum(),
    "plus a scalar": lambda x: torch.ops.aten.add.Scalar(x.sin(), 2.0).square().sum(),
    "minus a scalar": lambda x: torch.ops.aten.sub.Scalar(x.sin(), 2.0, 0.5).square().sum(),
    "smooth cross entropy": lambda x: F.cross_entropy(
        (x @ W).sin(), CLASSES, weight=C[:4], label_smoothing=0.1, ignore_index=1, reduction="none"
    ).sum(),
    "a loss of a kink": lambda x: F.mse_loss((x - 1).abs(), C[:, None].expand(-1, 3)),
    "dropout": lambda x: F.dropout(x.exp(), 0.5).square().sum(),
}
# Not along samples, or without a rule: the other ways take over.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "prod": lambda x: x.prod(1).sin().sum(),
    "another norm": lambda x: torch.linalg.vector_norm(x, 3, dim=1).sum(),
    "complex inside": lambda x: torch.fft.fft(x, dim=1).abs().square().sum(),
    "samples meet": lambda x: (x.sum(0) ** 2).sum(),
    "a sum bent": lambda x: x.exp().sum().sin(),
    "attention": lambda x: F.scaled_dot_product_attention(
        x.view(-1, 3, 1), x.view(-1, 3, 1).sin(), x.view(-1, 3, 1).exp()
    ).sum(),
    "a checkpoint": lambda x: checkpointed(lambda x: x.exp().sin(), x).sum(),
    "two dtypes": lambda x: (x.float() ** 2).double().sum(),
    "a rounded quotient": lambda x: (torch.div(x, 0.3, rounding_mode="floor") * x).sum(),
}
