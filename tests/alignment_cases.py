"""Functions whose axes run along with those of their argument, or don't, as each rule has it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = torch.float64
N = 6
EYE = torch.eye(N, dtype=D)
SPREAD = torch.linspace(1, 7, N, dtype=D).diag()
lstm = nn.LSTM(N, N).double()
kernel = torch.linspace(-1, 1, N, dtype=D).reshape(2, 1, 3)
T = torch.linspace(0.1, 0.9, N * N, dtype=D).view(N, N)
C = torch.tensor([5, 0, 3, 3, 1, 2])
PLACES = torch.tensor([[1, 0, 5, 2, 4, 3]]).expand(N, N)
BOTH, FIRST, SECOND = [(0, 0), (1, 1)], [(0, 0)], [(1, 1)]

# x has shape (6, 6); the axes of the result, and of the gradient of a sum of it, that run along with x's
RULES: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[int, int]], list[tuple[int, int]]]] = {
    "folded and unfolded": (lambda x: x.exp().view(36).sin().view(6, 6), BOTH, BOTH),
    "folded, unfolded elsewhere": (lambda x: x.exp().view(36).sin().view(3, 12), [], []),
    "folded behind": (lambda x: x.exp().view(6, 2, 3).sin().view(6, 6), FIRST, FIRST),
    "folded with an axis that is free": (
        lambda x: x.exp().expand(4, 6, 6).reshape(24, 6).sin().view(2, 2, 6, 6),
        [(2, 0), (3, 1)],
        BOTH,
    ),
    "transposed, folded": (lambda x: x.t().reshape(36).exp().view(6, 6), [(0, 1), (1, 0)], BOTH),
    "folded, times a matrix": (
        lambda x: (x.view(1, 6, 6).view(6, 6).exp() @ T).view(1, 6, 6),
        [(1, 0)],
        FIRST,
    ),
    "flip": (lambda x: x.exp().flip(0), SECOND, SECOND),
    "flip of both": (lambda x: x.exp().flip(0, -1), [], []),
    "diagonal": (
        lambda x: (x.exp().unsqueeze(2) * x.unsqueeze(1)).diagonal(0, 1, 2).sin(),
        FIRST,
        [],
    ),
    "diagonal of other axes": (
        lambda x: (x.exp().unsqueeze(2) * x.unsqueeze(1)).diagonal(1, 0, -1),
        [],
        [],
    ),
    "roll": (lambda x: x.exp().roll(1, 0) * x.roll((2, 0), (0, 0)), SECOND, SECOND),
    "roll of all": (lambda x: x.exp().roll(1), [], []),
    "index_select": (lambda x: x.exp().index_select(1, PLACES[0, :4]), FIRST, FIRST),
    "index": (lambda x: x.exp()[:, PLACES[0]], FIRST, FIRST),
    "index in front": (lambda x: x.exp()[C], SECOND, SECOND),
    "index with a matrix": (lambda x: x.exp()[:, PLACES[:2, :3]], FIRST, FIRST),
    "index with a matrix in front": (lambda x: x.exp()[PLACES[:2, :3]], [(2, 1)], SECOND),
    "index, mask": (lambda x: x.exp()[:, C > 1], FIRST, FIRST),
    "index, mask in front": (lambda x: x.exp()[C > 1], SECOND, SECOND),
    "index, mask of both": (lambda x: x.exp()[T > 0.3], [], []),
    "index with two": (lambda x: x.exp()[C, PLACES[0]], [], []),
    "gather": (lambda x: x.exp().gather(1, PLACES), FIRST, FIRST),
    "gather some": (lambda x: x.exp().gather(0, PLACES[:2, :3]), [], []),
    "scatter": (lambda x: x.exp().scatter(0, PLACES.t(), x.sin()), SECOND, SECOND),
    "scatter_add": (lambda x: T.scatter_add(1, PLACES, x.exp()), FIRST, FIRST),
    "max": (lambda x: x.exp().max(1).values, FIRST, FIRST),
    "min in front": (lambda x: x.exp().min(0, keepdim=True).values, SECOND, SECOND),
    "max of all": (lambda x: x.exp().max(), [], BOTH),
    "variance": (lambda x: x.var(1), FIRST, FIRST),
    "deviation": (lambda x: x.exp().std(0), [(0, 1)], SECOND),
    "deviation of all": (lambda x: x.exp().std(), [], []),
    "mse": (lambda x: F.mse_loss(x.sin(), T), [], BOTH),
    "mse of each": (lambda x: F.mse_loss(x.sin(), T, reduction="none"), BOTH, BOTH),
    "mse to a part of itself": (lambda x: F.mse_loss(x.sin(), x[:, :1].expand(6, 6)), [], FIRST),
    "huber": (lambda x: F.huber_loss(x.sin(), T, delta=0.5), [], BOTH),
    "smooth l1": (lambda x: F.smooth_l1_loss(x.sin(), T), [], BOTH),
    "soft margin": (lambda x: F.soft_margin_loss(x.sin(), T), [], BOTH),
    "binary cross entropy": (lambda x: F.binary_cross_entropy(x.sigmoid(), T), [], BOTH),
    "cross entropy": (lambda x: F.cross_entropy(x, C), [], FIRST),
    "cross entropy of each": (lambda x: F.cross_entropy(x, C, reduction="none"), FIRST, FIRST),
    "cross entropy, smooth": (lambda x: F.cross_entropy(x, C, label_smoothing=0.1), [], FIRST),
    "likelihood of a row": (lambda x: F.nll_loss(x[0].log_softmax(0), C[0]), [], []),
    "likelihoods times columns": (
        lambda x: F.nll_loss(x.log_softmax(1), C, reduction="none") * x[0],
        [],
        [],
    ),
    "prelu": (lambda x: F.prelu(x.exp() - 1, T[0]), BOTH, BOTH),
    "activations": (
        lambda x: F.mish(x) + F.celu(x) * F.hardswish(x) + F.softshrink(x) ** 2 + F.hardshrink(x) ** 2,
        BOTH,
        BOTH,
    ),
    "batch norm, given statistics": (
        lambda x: F.batch_norm(x.exp(), T[0].clone(), T[1].clone(), T[2], T[3]),
        BOTH,
        BOTH,
    ),
    "batch norm": (lambda x: F.batch_norm(x.exp(), None, None, T[2], T[3], training=True), SECOND, SECOND),
    "batch norm with weights": (lambda x: F.batch_norm(T, T[0].clone(), T[1].clone(), x[0]), [(1, 1)], []),
    "layer norm": (lambda x: F.layer_norm(x.exp(), (6,), T[0], T[1]), FIRST, FIRST),
    "layer norm of both": (lambda x: F.layer_norm(x.exp(), (6, 6), T, T), [], []),
}

# x has shape (6, 6, 6, 6): batch, heads, positions, features
ATTENTION: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[int, int]]]] = {
    "of itself": (lambda x: F.scaled_dot_product_attention(x, x, x), BOTH),
    "queries": (lambda x: F.scaled_dot_product_attention(x, Q, Q.sin()), BOTH),
    "keys": (lambda x: F.scaled_dot_product_attention(Q, x, Q.sin()), BOTH),
    "causal": (lambda x: F.scaled_dot_product_attention(Q, x, x.exp(), is_causal=True), BOTH),
    "masked": (lambda x: F.scaled_dot_product_attention(x, Q, Q, attn_mask=T > 0.3), BOTH),
    "bias": (lambda x: F.scaled_dot_product_attention(Q, Q, Q, attn_mask=x), [*BOTH, (2, 2)]),
    "another batch": (lambda x: F.scaled_dot_product_attention(Q, x.transpose(0, 2), Q), [(0, 2), (1, 1)]),
    "shared keys": (lambda x: F.scaled_dot_product_attention(Q, x[:, :3], Q[:, :3], enable_gqa=True), []),
}
Q = torch.linspace(0, 40, N**4, dtype=D).cos().view(N, N, N, N)
IMAGES: dict[str, tuple[Callable[[Tensor], Tensor], list[tuple[int, int]]]] = {
    "convolution": (lambda x: F.conv2d(x, Q[:, :, :3, :3], padding=1), FIRST),
    "filters": (lambda x: F.conv2d(Q, x[:, :, :3, :3], padding=1), []),
    "group norm": (lambda x: F.group_norm(x, 2, T[0], T[1]), FIRST),
    "weights of group norm": (lambda x: F.group_norm(Q, 2, x[0, 0, 0], T[1]), []),
    "max pool": (lambda x: F.max_pool2d(x, 3, 1, 1), BOTH),
    "max pool of solids": (lambda x: F.max_pool3d(x, 3, 1, 1), FIRST),
    "average pool": (lambda x: F.avg_pool2d(x, 3, 1, 1), BOTH),
    "average pool of solids": (lambda x: F.avg_pool3d(x, 3, 1, 1), FIRST),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x, (6, 6)), BOTH),
    "adaptive maximum": (lambda x: F.adaptive_max_pool2d(x, (6, 6)), BOTH),
    "resized": (lambda x: F.interpolate(x, size=(6, 9)), BOTH),
    "resized, bilinear": (lambda x: F.interpolate(x, size=(4, 6), mode="bilinear"), BOTH),
    "resized, bicubic": (lambda x: F.interpolate(x, size=(4, 6), mode="bicubic"), BOTH),
    "resized lines": (lambda x: F.interpolate(x[0], size=6, mode="linear"), [(0, 1), (1, 2)]),
    "padded": (lambda x: F.pad(x.exp(), (1, 1)), [*BOTH, (2, 2)]),
    "padded and cut": (lambda x: F.pad(x.exp(), (0, 0, 1, -1)), [*BOTH, (3, 3)]),
    "padded by a mirror": (lambda x: F.pad(x, (1, 2, 0, 1), "reflect"), BOTH),
    "padded by copies": (lambda x: F.pad(x, (1, 2, 0, 1), "replicate"), BOTH),
    "repeated": (lambda x: x.exp().repeat(1, 1, 2, 1), [*BOTH, (3, 3)]),
    "repeated in front": (lambda x: x[0].exp().repeat(6, 1, 1, 1), [(1, 1), (2, 2), (3, 3)]),
    "gated": (lambda x: F.glu(x, 1), [(0, 0), (2, 2), (3, 3)]),
    "lower triangle": (lambda x: x.exp().tril(1), [*BOTH, (2, 2), (3, 3)]),
    "likelihoods": (lambda x: F.nll_loss(x, WORDS, reduction="none"), [(0, 0), (1, 2), (2, 3)]),
    "with a matrix in each": (lambda x: torch.baddbmm(Q[0], x[0], Q[1]), [(0, 1), (1, 2)]),
    "matrix and vector": (lambda x: torch.addmv(Q[0, 0, 0], x[0, 0], Q[0, 0, 1])[None], [(1, 2)]),
    "binary cross entropies": (
        lambda x: F.binary_cross_entropy_with_logits(x, Q.abs(), reduction="none"),
        [*BOTH, (2, 2), (3, 3)],
    ),
}
WORDS = C.expand(N, N, N)


def symmetric(x: Tensor) -> Tensor:
    return x + x.t() + 10 * SPREAD


# x has shape (6, 6), and so have most results: a mistaken axis doesn't show in the shapes
SEVERAL_RESULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "eigenvalues": lambda x: torch.linalg.eigh(symmetric(x))[0] * 2,
    "eigenvectors": lambda x: torch.linalg.eigh(symmetric(x))[1] * 2,
    "singular values": lambda x: torch.linalg.svd(x + SPREAD)[1].sin(),
    "q": lambda x: torch.linalg.qr(x + SPREAD)[0].sin(),
    "r": lambda x: torch.linalg.qr(x + SPREAD)[1].sin(),
    "lu": lambda x: torch.linalg.lu_factor(x + SPREAD)[0].sin(),
    "slogdet": lambda x: torch.linalg.slogdet(x + SPREAD)[1] * x,
    "outputs of an lstm": lambda x: lstm(x.unsqueeze(1))[0].sin(),
    "first state of an lstm": lambda x: lstm(x.unsqueeze(1))[1][0].sin(),
    "second state of an lstm": lambda x: lstm(x.unsqueeze(1))[1][1] * 2,
    "second state beside the batch": lambda x: lstm(x.unsqueeze(0))[1][1] * 2,
    "mean beside variance": lambda x: torch.var_mean(x, 0)[1] * 2,
    "variance": lambda x: torch.var_mean(x, 0)[0] * x,
    "largest": lambda x: x.max(0)[0] * x,
    "second half": lambda x: x.sin().split(3)[1] * 2,
    "second half behind": lambda x: x.sin().split([2, 4], 1)[1] * 2,
    "unsafe split": lambda x: torch.unsafe_split(x.sin(), 2, 1)[1] * 2,
    "second row": lambda x: x.sin().unbind(0)[1] * 2,
    "two rows": lambda x: x.sin().unbind(0)[1] * x.cos().unbind(1)[2],
    "convolution": lambda x: F.conv1d(x.unsqueeze(1), kernel, x[0, :2]).sin(),
    "kernel": lambda x: F.conv1d(EYE.unsqueeze(1), x[:, :3].unsqueeze(1)).sin(),
    "layer norm": lambda x: F.layer_norm(x, (6,), x[0], x[:, 1]).sin(),
    "batch norm": lambda x: F.batch_norm(x, None, None, x[0], x[:, 1], training=True).sin(),
    "group norm": lambda x: F.group_norm(x, 2, x[0], x[:, 1]).sin(),
    "squeeze of no axis": lambda x: x.unsqueeze(1).squeeze(dim=()).sin(),
    "transposed number": lambda x: x.sum().transpose(0, 0) * x,
    "swapped axes of a number": lambda x: torch.swapaxes(x.sum(), 0, -1) * x,
}


def off_axes(J: Tensor, p: int, q: int) -> Tensor:
    """Where the index on axis ``p`` isn't that on axis ``q``."""
    a, b = (
        torch.arange(J.shape[axis]).view([-1 if i == axis else 1 for i in range(J.dim())]) for axis in (p, q)
    )
    return J[(a != b).expand(J.shape)]
