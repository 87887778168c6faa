"""What the GPU check runs: each native operator and each public derivative, with inputs made on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import torchzygote
from torchzygote import native

__all__ = ["DERIVATIVES", "OPERATORS", "Case"]


class Case(NamedTuple):
    """``run(*inputs())``, everything in it following the devices and dtypes of the inputs."""

    name: str
    inputs: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    exact: bool = False

    def tolerance(self, dtype: torch.dtype) -> float:
        """Largest difference from float64, over the largest value."""
        if self.exact:  # values are moved, not computed with
            return 0.0
        return (200 if dtype in (torch.float32, torch.float64) else 8) * torch.finfo(dtype).eps


def _seeds(like: Tensor, colors: Tensor) -> list[Tensor]:
    out = like.new_empty(40, 300)
    torch.ops.torchzygote.seed_rows_(out, 7, None)
    by_color = like.new_empty(5, colors.numel())
    torch.ops.torchzygote.seed_rows_(by_color, 2, colors)
    return [out, by_color]


def _scatter(first: Tensor, second: Tensor, third: Tensor) -> list[Tensor]:
    products = [first, second.permute(2, 1, 0), third[:, ::2], third[:1, :3].expand(first.shape[0], 3)]
    blocks = [first.new_zeros(first.shape[0] + 9, x[0].numel()) for x in products]
    native.scatter_rows_(blocks, products, 4)
    wide = [torch.zeros(block.shape, dtype=torch.float64, device=first.device) for block in blocks]
    native.scatter_rows_(wide, products, 4)
    return blocks + wide


def _gather(products: Tensor, colors: Tensor) -> list[Tensor]:
    out = products.new_zeros(products.shape[1])
    native.gather_diagonal(products, 1, out=out, colors=colors)
    apart = products.t().contiguous().t()
    return [native.gather_diagonal(products, 3), native.gather_diagonal(apart, 0), out]


def _decompress(products: Tensor, slot_row: Tensor, slot_column: Tensor) -> list[Tensor]:
    values = products.new_zeros(slot_row.numel())
    native.decompress(products, 2, slot_row, slot_column, values)
    place = torch.arange(slot_row.numel(), device=products.device)
    dense = products.new_zeros(slot_row.numel(), 3)
    native.decompress_dense(products, 2, slot_row, slot_column.int(), place, place % 3, dense)
    return [values, dense]


def _compress(matrix: Tensor, colors: Tensor) -> list[Tensor]:
    return [native.compress(matrix.to_sparse_csr(), colors, 6), native.compress(matrix, colors, 6)]


def _integers(high: int, size: int) -> Tensor:
    return torch.randint(-1, high, (size,))


OPERATORS = [
    Case("seed_rows", lambda: (torch.randn(1), _integers(9, 1000)), _seeds, exact=True),
    Case(
        "scatter_rows_",
        lambda: (torch.randn(33, 5, 7), torch.randn(40, 9, 33), torch.randn(33, 2000)),
        _scatter,
        exact=True,
    ),
    Case("gather_diagonal", lambda: (torch.randn(33, 700), _integers(40, 700)), _gather, exact=True),
    Case(
        "decompress",
        lambda: (torch.randn(8, 50), torch.randint(0, 12, (400,)), torch.randint(0, 50, (400,))),
        _decompress,
        exact=True,
    ),
    Case(
        "compress",
        lambda: (torch.randn(60, 80) * (torch.rand(60, 80) < 0.1), _integers(6, 80)),
        _compress,
    ),
]


def _layers(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(w @ torch.tanh(w @ x))


def _energy(x: Tensor, w: Tensor) -> Tensor:
    return _layers(x, w).square().sum()


def _chain(x: Tensor) -> Tensor:
    return (x[1:] * x[:-1].sin()) ** 2


def _vector() -> tuple[Tensor, Tensor]:
    return torch.randn(30), torch.randn(30, 30) / 5


def _with_buffer(x: Tensor) -> Tensor:
    buffer = torchzygote.Buffer(x, 3, x.numel())
    for i in range(3):
        buffer[i, :] = x ** (i + 1)
    return copy.copy(buffer).sum()


def _derivative(name: str, *args: Any, **options: Any) -> Any:
    function = getattr(torchzygote, name)
    return function(*args, **options)


def _implicit(x: Tensor, w: Tensor) -> list[Tensor]:
    params = torchzygote.Params([x, w])
    grads = torchzygote.gradient(lambda: _energy(x, w), params)
    jacobians = torchzygote.jacobian(lambda: _layers(x, w)[:5], params)
    return [grads[x], grads[w], jacobians[x], jacobians[w]]


def _layer_weights() -> tuple[Tensor, ...]:
    return torch.randn(300, 20), torch.randn(20, 30) / 5, torch.randn(30), torch.randn(30, 4) / 5


def _by_weights(data: Tensor, w: Tensor, b: Tensor, v: Tensor) -> list[Tensor]:
    """Large enough for the layers to be found: few products, one for each channel or output."""
    params = torchzygote.Params([w, b, v])
    outputs = lambda: torch.tanh(data @ w + b) @ v
    rows = torchzygote.jacobian(outputs, params, mode="reverse")
    curvature = torchzygote.diaghessian(lambda: outputs().exp().mean(), params)
    return [*rows.values(), *curvature.values()]


def _image_weights() -> tuple[Tensor, ...]:
    return (
        torch.randn(64, 2, 14, 14),
        torch.randn(6, 2, 3, 3) / 4,
        torch.randn(6),
        torch.randn(6),
        torch.randn(9, 6),
    )


def _rows_by_image(images: Tensor, w: Tensor, s: Tensor, b: Tensor, table: Tensor) -> list[Tensor]:
    """One product for all images, as large as it takes for the layers to be found."""
    words = torch.arange(len(images), device=images.device) % len(table)

    def losses() -> Tensor:
        found = F.group_norm(F.conv2d(images, w, stride=2), 2, s, b).tanh()
        return (found * F.embedding(words, table)[:, :, None, None]).mean((1, 2, 3))

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        rows = torchzygote.jacobian(losses, torchzygote.Params([w, s, b, table]), mode="reverse")
    return list(rows.values())


def _clipped(x: Tensor, w: Tensor) -> list[Tensor]:
    params = torchzygote.Params([x, w])
    grads = torchzygote.gradient(lambda: _energy(x, w), params)
    total = grads.clip_norm_(0.5)
    return [total, grads[x], grads[w]]


DERIVATIVES = [
    Case("gradient", _vector, lambda x, w: _derivative("gradient", _energy, x, w)),
    Case("withgradient", _vector, lambda x, w: _derivative("withgradient", _energy, x, w)),
    Case("pullback", _vector, lambda x, w: _derivative("pullback", _layers, x, w)[1](torch.ones_like(x))),
    Case("pushforward", _vector, lambda x, w: _derivative("pushforward", _layers, x, w)(x.cos(), w.sin())),
    Case("jacobian, reverse", _vector, lambda x, w: _derivative("jacobian", _layers, x, w, chunk_size=7)),
    Case(
        "jacobian, forward",
        _vector,
        lambda x, w: _derivative("jacobian", _layers, x, w, mode="forward", chunk_size=70),
    ),
    Case("withjacobian", _vector, lambda x, w: _derivative("withjacobian", _layers, x, w)),
    Case("jacobian, sparse", _vector, lambda x, w: _derivative("jacobian", _chain, x, sparse=True)),
    Case("hessian", _vector, lambda x, w: _derivative("hessian", lambda x: _energy(x, w), x)),
    Case("hessian_dual", _vector, lambda x, w: _derivative("hessian_dual", lambda x: _energy(x, w), x)),
    Case("hessian_reverse", _vector, lambda x, w: _derivative("hessian_reverse", lambda x: _energy(x, w), x)),
    Case("withhessian", _vector, lambda x, w: _derivative("withhessian", lambda x: _energy(x, w), x)),
    Case(
        "hessian, sparse",
        _vector,
        lambda x, w: _derivative("hessian", lambda x: _chain(x).sum(), x, sparse=True),
    ),
    Case("diaghessian", _vector, lambda x, w: _derivative("diaghessian", _energy, x, w, chunk_size=11)),
    Case("Params", _vector, _implicit),
    Case("weights of layers", _layer_weights, _by_weights),
    Case("weights of other layers", _image_weights, _rows_by_image),
    Case("Grads.clip_norm_", _vector, _clipped),
    Case("Buffer", _vector, lambda x, w: _derivative("gradient", _with_buffer, x)),
    Case(
        "checkpointed",
        _vector,
        lambda x, w: _derivative("gradient", lambda x, w: torchzygote.checkpointed(_energy, x, w), x, w),
    ),
    Case(
        "forwarddiff",
        _vector,
        lambda x, w: _derivative(
            "gradient", lambda x, w: torchzygote.forwarddiff(lambda a: (a**3).sum(), x) + w.sum(), x, w
        ),
    ),
    Case(
        "hook",
        _vector,
        lambda x, w: _derivative("gradient", lambda x, w: _energy(torchzygote.hook(torch.neg, x), w), x, w),
    ),
]
