"""Jacobians by weights of layers other than affine maps: the rows of all samples at once."""

from __future__ import annotations

from collections.abc import Callable

import factored_cases
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote import Params, jacobian
from torchzygote._recorded import layers as _layers
from torchzygote._recorded import windows as _windows
from torchzygote.checkpointing import checkpointed

Function = Callable[..., Tensor]

D = torch.float64
X = torch.linspace(-1, 1, 48, dtype=D).sin().view(8, 6)
X3 = torch.linspace(-2, 1, 72, dtype=D).cos().view(3, 4, 6)
IMAGES = torch.linspace(-2, 3, 5 * 4 * 6 * 7, dtype=D).sin().view(5, 4, 6, 7)
LINES = torch.linspace(-2, 3, 5 * 4 * 9, dtype=D).sin().view(5, 4, 9)
SOLIDS = torch.linspace(-2, 3, 3 * 2 * 4 * 5 * 4, dtype=D).sin().view(3, 2, 4, 5, 4)
WORDS = torch.tensor([[0, 1, 2, 1], [3, 3, 0, 4], [2, 2, 2, 2]])
SIX = torch.tensor([0.3, -0.7, 1.1, 0.2, -0.4, 0.9], dtype=D)


def total(h: Tensor) -> Tensor:
    """One number for each sample, which mixes all the rest."""
    h = h.flatten(1)
    return (h.tanh() * torch.linspace(0.5, 2, h.shape[1], dtype=h.dtype)).mean(1).exp()


def attention(w: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    h = F.embedding(WORDS, w) + w[:4]
    h = F.scaled_dot_product_attention(F.linear(h, q), h, h)
    return total(F.layer_norm(h + F.rms_norm(h, (6,), scale), (6,), scale))


def standardized(w: Tensor, s: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(w, (1, 2), keepdim=True)
    return total(F.conv1d(LINES, (w - mean) / deviation, s) * s.softmax(0)[:, None])


STATISTICS = (torch.linspace(-1, 1, 6, dtype=D), torch.linspace(0.5, 2, 6, dtype=D))
FILTERS = torch.linspace(-1, 1, 4 * 4 * 6, dtype=D).view(4, 4, 6)
S, V = (6,), (5, 6)
# the function, the shapes of its arguments, and how many products are taken besides the check; where weights
# are made of weights, those of a row for each sample through that alone, too
FEW: dict[str, tuple[Function, list[tuple[int, ...]], int]] = {
    "scale": (lambda s: total(X * s), [S], 1),
    "scale in front": (lambda s: total(s * X), [S], 1),
    "one scale": (lambda s: total(X * s), [()], 1),
    "scale of one channel": (lambda s: total(X3 * s), [(4, 1)], 1),
    "shift": (lambda s, b: total(X3 * s + b), [S, (4, 6)], 1),
    "shift, alpha": (lambda b: total(torch.sub(X3, b, alpha=3)), [(4, 6)], 1),
    "shift in front": (lambda b: total(b - X3), [(4, 6)], 1),
    "division": (lambda s: total(X / s), [S], 1),
    "division in front": (lambda s: total(s / (X + 3)), [S], 1),
    "prelu": (lambda s: total(F.prelu(X3, s)), [(4,)], 1),
    "prelu of one slope": (lambda s: total(F.prelu(X3, s)), [(1,)], 1),
    "token in front": (lambda t: total(torch.cat([t.expand(3, -1, -1), X3], 1).cumsum(1)), [(1, 1, 6)], 1),
    "token in front, repeated": (lambda t: total(torch.cat([t.repeat(3, 1, 1), X3], 1)), [(1, 1, 6)], 1),
    "row repeated": (lambda t: total(t.sin().repeat(8, 1) * X), [(6,)], 9),
    "several rows": (lambda s: (X3 * s).sin().cumsum(2), [S], 6),
    "samples last": (lambda s: (X.t() * s[:, None]).sin().sum(0), [S], 1),
    "tokens": (lambda s: (X3 * s).sin().cumsum(2) @ SIX, [S], 1),
    "layer norm": (lambda w, b: total(F.layer_norm(X, S, w, b)), [S, S], 1),
    "layer norm of two axes": (lambda w, b: total(F.layer_norm(X3, (4, 6), w, b)), [(4, 6), (4, 6)], 1),
    "layer norm, no bias": (lambda w: total(F.layer_norm(X3, S, w)), [S], 1),
    "rms norm": (lambda w: total(F.rms_norm(X, S, w)), [S], 1),
    "group norm": (lambda w, b: total(F.group_norm(IMAGES, 2, w, b)), [(4,), (4,)], 1),
    "instance norm": (lambda w, b: total(F.group_norm(LINES, 4, w, b)), [(4,), (4,)], 1),
    "batch norm": (lambda w, b: total(F.batch_norm(X, *STATISTICS, w, b)), [S, S], 1),
    "convolution": (lambda w, b: total(F.conv2d(IMAGES, w, b)), [(3, 4, 2, 3), (3,)], 1),
    "convolution, strides": (
        lambda w: total(F.conv2d(IMAGES, w, stride=(2, 3), padding=(1, 2), dilation=(2, 1))),
        [(3, 4, 2, 3)],
        1,
    ),
    "convolution, same": (lambda w: total(F.conv2d(IMAGES, w, padding="same")), [(3, 4, 3, 3)], 1),
    "convolution, groups": (lambda w: total(F.conv2d(IMAGES, w, groups=2)), [(6, 2, 3, 3)], 1),
    "convolution, rows": (lambda w: F.conv2d(IMAGES, w, groups=2).sum(3), [(6, 2, 3, 3)], 24),
    "convolution by channel": (lambda w: total(F.conv2d(IMAGES, w, groups=4)), [(4, 1, 3, 3)], 1),
    "convolution of lines": (lambda w, b: total(F.conv1d(LINES, w, b, stride=2)), [(3, 4, 2), (3,)], 1),
    "convolution of solids": (lambda w, b: total(F.conv3d(SOLIDS, w, b)), [(3, 2, 2, 1, 2), (3,)], 1),
    "transposed convolution": (
        lambda w, b: total(F.conv_transpose2d(IMAGES, w, b, stride=2, padding=1, output_padding=1)),
        [(4, 3, 3, 2), (3,)],
        1,
    ),
    "transposed convolution, groups": (
        lambda w: total(F.conv_transpose1d(LINES, w, groups=2, dilation=3, stride=2)),
        [(4, 3, 2)],
        1,
    ),
    "transposed convolution, padded": (
        lambda w: total(F.conv_transpose1d(LINES, w, dilation=3, stride=2, output_padding=2)),
        [(4, 3, 2)],
        1,
    ),
    "transposed convolution, rows": (lambda w: F.conv_transpose1d(LINES, w).sum(2), [(4, 3, 2)], 3),
    "filters used twice": (lambda w: total(F.conv1d(F.conv1d(LINES, w).sin(), w)), [(4, 4, 2)], 1),
    "embedding": (lambda w: total(F.embedding(WORDS, w).cumsum(1)), [V], 1),
    "embedding, padding": (lambda w: total(F.embedding(WORDS, w, padding_idx=2).cumsum(1)), [V], 1),
    "embedding, one word": (lambda w: total(F.embedding(WORDS[:, 0], w)), [V], 1),
    "embedding, words": (lambda w: F.embedding(WORDS, w).sin().cumsum(2) @ SIX, [V], 1),
    "embedding, rows": (lambda w: F.embedding(WORDS, w).sin().sum(1), [V], 6),
    "positions": (lambda w: total(X3 * F.embedding(torch.tensor([1, 1, 0, 3]), w)), [V], 1),
    "positions, padding": (
        lambda w: total(X3 + F.embedding(torch.tensor([1, 1, 0, 3]), w, padding_idx=1)),
        [V],
        1,
    ),
    "indexed": (lambda w: total(w[WORDS - 5].cumsum(1)), [V], 1),
    "indexed positions": (lambda w: total(X3 * w[[1, 1, -1, 3]]), [V], 1),
    "selected": (lambda w: total(w.index_select(0, torch.tensor([1, 4, 1]))), [V], 1),
    "selected positions": (lambda w: total(X3 + w.index_select(0, torch.tensor([1, 4, 1, 0]))), [V], 1),
    "looked up and layer": (lambda w: total(F.embedding(WORDS, w) @ w.t()), [V], 1),
    "pieces": (lambda p: total(F.layer_norm(X @ p[:36].view(6, 6), S, p[36:42], p[42:48])), [(50,)], 1),
    "a filter from a vector": (lambda p: total(F.conv1d(LINES, p[:24].view(3, 4, 2), p[24:])), [(27,)], 1),
    "pooled": (lambda w: total(F.max_pool2d(F.conv2d(IMAGES, w), 2)), [(3, 4, 2, 3)], 1),
    "averaged": (lambda w: total(F.adaptive_avg_pool2d(F.conv2d(IMAGES, w), (2, 2))), [(3, 4, 2, 3)], 1),
    "padded": (lambda w: total(F.pad(F.conv2d(IMAGES, w), (1, -1, 2, 0))), [(3, 4, 2, 3)], 1),
    "padded, reflected": (
        lambda w: total(F.pad(F.conv2d(IMAGES, w), (1, 1, 2, 0), "reflect")),
        [(3, 4, 2, 3)],
        1,
    ),
    "resized": (lambda w: total(F.interpolate(F.conv2d(IMAGES, w), scale_factor=2.0)), [(3, 4, 2, 3)], 1),
    "gated": (lambda w: total(F.glu(F.conv2d(IMAGES, w), 1)), [(2, 4, 2, 3)], 1),
    "cross entropies": (
        lambda w: F.cross_entropy(X3.mT * w, WORDS % 3, reduction="none").sum(1),
        [(6, 1)],
        1,
    ),
    "computed": (lambda w: total(F.conv1d(LINES, w.exp())), [(3, 4, 2)], 6),
    "standardized": (standardized, [(3, 4, 2), (3,)], 11),
    "weight norm": (lambda v, g: total(X @ (g * v / v.norm(dim=0))), [(6, 5), (5,)], 9),
    "computed and plain": (lambda w: total((X @ w).sin() @ w.exp().t()), [(6, 5)], 9),
    "of low rank": (lambda a, b: total(X @ (a @ b)), [(6, 2), (2, 5)], 9),
    "of low rank, same sizes": (lambda a, b: total((X @ (a @ b)).sin() * b.sum(0)), [(6, 8), (8, 8)], 17),
    "of both": (lambda a, b: total(X * (a * b) + a / b), [S, S], 17),
    "a number": (lambda s: total(X * s.exp()) * s, [()], 9),
    "both factors": (lambda a, b: F.linear(a.exp(), b).amax(1), [(3, 3), (3, 3)], 4),
    "numbers": (lambda w: total((torch.ops.aten.mul.Scalar(X @ w, 0.5) * 3 / 2).sin()), [(6, 5)], 1),
    "attention, plain": (lambda q: total(F.scaled_dot_product_attention(X3 @ q, X3, X3)), [(6, 6)], 1),
    "attention by queries": (
        lambda q: total(F.scaled_dot_product_attention(q.expand(3, -1, -1), X3, X3, attn_mask=q @ q.t())),
        [(4, 6)],
        4,
    ),
    "attention": (attention, [V, (6, 6), S], 1),
}
# Samples meet, or a piece tells samples apart itself: a product for each row.
PLAIN: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "weights of samples": (lambda s: (X * s).sin().sum(1), [(8, 1)]),
    "samples meet": (lambda s: (X * s).softmax(0).sum(1), [S]),
    "batch norm": (lambda w: F.batch_norm(X, None, None, w, training=True).exp().sum(1), [S]),
    "shifted": (lambda w: F.pad(X * w, (0, 0, 1, -1)).exp().sum(1), [S]),
    "elsewhere": (lambda s: total(X * s) + s.square().sum(), [S]),
    "checkpointed": (lambda s: checkpointed(total, X * s), [S]),
    "moved at the end": (lambda s, t: ((X * s).sin().view(48) * t).view(8, 6), [S, (48,)]),
    "rounded": (lambda s: total(torch.div(X, s, rounding_mode="floor") * X + X), [S]),
    "complex data": (lambda s: total((torch.complex(X, X.cos()) * s).sin().abs()), [S]),
    "complex weights": (lambda s: total((X * torch.complex(s, s.sin())).sin().abs()), [S]),
    "half of it": (lambda s: total((X.float() * s).double()) + total(X.half().double() * s.half()), [S]),
    "transformed": (lambda w: total(X * torch.fft.fft(w).abs() + (X * torch.fft.fft(w)).real), [S]),
    "counted words": (lambda w: total(F.embedding(WORDS, w, scale_grad_by_freq=True)), [V]),
    "columns selected": (lambda w: total(X3 * w.index_select(1, torch.tensor([1, 4, 1, 0, 0, 2]))), [(4, 6)]),
}


def arguments(shapes: list[tuple[int, ...]], dtype: torch.dtype = D) -> list[Tensor]:
    return [(x + 2).to(dtype) for x in factored_cases.arguments(shapes)]  # away from zero


def by_rows(f: Function, xs: list[Tensor]) -> list[Tensor]:
    """One plain backward pass for each row."""
    xs = [x.detach().requires_grad_() for x in xs]
    y = f(*xs).reshape(-1)
    found = [torch.autograd.grad(y[i], xs, retain_graph=True) for i in range(y.numel())]
    return [torch.stack(gs).reshape(len(y), -1) for gs in zip(*found, strict=True)]


@pytest.mark.parametrize("name", FEW)
def test_few_products_give_all_rows(name: str, rows: list[int]) -> None:
    f, shapes, few = FEW[name]
    xs = arguments(shapes)
    found = [J.reshape(len(J), -1) for J in jacobian(f, *xs, mode="reverse")]
    torch.testing.assert_close(found, by_rows(f, xs))
    assert sum(rows) == few


@pytest.mark.parametrize("name", PLAIN)
def test_other_functions_go_the_plain_way(name: str, rows: list[int]) -> None:
    f, shapes = PLAIN[name]
    xs = arguments(shapes)
    found = jacobian(f, *xs, mode="reverse")
    torch.testing.assert_close(list(found), by_rows(f, xs))
    assert sum(rows) >= found[0].shape[0]


@pytest.mark.parametrize("name", FEW)
def test_the_rows_are_differentiable(name: str, rows: list[int]) -> None:
    f, shapes, few = FEW[name]
    generator = torch.Generator().manual_seed(5)
    points = arguments(shapes)
    directions = [torch.randn(x.shape, generator=generator, dtype=D) for x in points]
    if "padding" in name:  # its row has no gradient, by definition
        directions[0][1:3] = 0

    def weighted(xs: list[Tensor], create_graph: bool) -> Tensor:
        found = jacobian(f, *xs, mode="reverse", create_graph=create_graph)
        return sum(((J.reshape(-1) * 0.1).sin().sum() for J in found), torch.zeros((), dtype=D))

    xs = [x.clone().requires_grad_() for x in points]
    value = weighted(xs, True)
    assert sum(rows) == few
    grads = torch.autograd.grad(value, xs, allow_unused=True) if value.requires_grad else ()
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=False) if g is not None)
    step = 1e-6
    moved = [[x + sign * step * d for x, d in zip(points, directions, strict=True)] for sign in (1, -1)]
    ahead, behind = (weighted(at, False) for at in moved)
    torch.testing.assert_close(
        torch.as_tensor(slope, dtype=D), (ahead - behind) / (2 * step), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", ["convolution, rows", "transposed convolution, rows", "embedding, rows"])
def test_rows_come_in_chunks(name: str, rows: list[int]) -> None:
    f, shapes, few = FEW[name]
    xs = arguments(shapes)
    found = jacobian(f, *xs, mode="reverse", chunk_size=2)
    torch.testing.assert_close(list(found), by_rows(f, xs))
    assert sum(rows) == few
    assert len(rows) == few // 2 + few % 2


@pytest.mark.parametrize("name", ["convolution, groups", "transposed convolution, groups"])
def test_windows_of_some_samples_at_a_time(
    name: str, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_windows, "_WINDOWS", 1)
    f, shapes, _ = FEW[name]
    xs = arguments(shapes)
    torch.testing.assert_close(list(jacobian(f, *xs, mode="reverse")), by_rows(f, xs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, rows: list[int]) -> None:
    xs = arguments([(3, 4, 2), (3,), (3,)], dtype)
    f = lambda w, s, b: F.group_norm(F.conv1d(LINES.to(w.dtype), w), 1, s, b).tanh().mean((1, 2))
    found = jacobian(f, *xs, mode="reverse")
    slack = 1e-5 if dtype == torch.float32 else 0.05
    for J, expected in zip(found, by_rows(f, [x.to(D) for x in xs]), strict=True):
        assert J.dtype == dtype
        torch.testing.assert_close(J.to(D), expected, rtol=slack, atol=slack)
    assert sum(rows) == 1


@pytest.mark.parametrize("name", ["scale", "convolution", "layer norm", "embedding", "looked up and layer"])
def test_a_wrong_rule_is_noticed(name: str, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    by_sample, put_back, some = _layers._by_sample, _layers._scattered, _windows._of_some
    monkeypatch.setattr(_layers, "_by_sample", lambda *args: by_sample(*args).roll(1, 0))
    monkeypatch.setattr(_layers, "_scattered", lambda *args: put_back(*args).roll(1, 0))
    monkeypatch.setattr(_windows, "_of_some", lambda *args: some(*args).roll(1, 0))
    f, shapes, _ = FEW[name]
    xs = arguments(shapes)
    with pytest.warns(UserWarning, match="contradicts"):
        found = jacobian(f, *xs, mode="reverse")
    torch.testing.assert_close(list(found), by_rows(f, xs))


def test_samples_that_change_places_in_between(rows: list[int]) -> None:
    f = lambda s, w: total((X * s).flip(0) * w)
    xs = arguments([S, S])
    torch.testing.assert_close(list(jacobian(f, *xs, mode="reverse")), by_rows(f, xs))
    assert sum(rows) == 1 + 8  # that of w, and the rows of s


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_norm_of_equal_numbers(dtype: torch.dtype, rows: list[int]) -> None:
    equal = torch.linspace(0.1, 3, 40).view(40, 1).expand(40, 100).to(dtype)
    xs = arguments([(100,), (100,)], dtype)
    f = lambda w, b: F.layer_norm(equal, (100,), w, b).sin().sum(1)
    found = jacobian(f, *xs, mode="reverse")
    assert sum(rows) == 1
    torch.testing.assert_close(list(found), by_rows(f, xs), rtol=1e-4, atol=1e-3)


NORMS = [S, S, S]
SHARED: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "added twice": (lambda a: (X3.sin() + a + a).sum((1, 2)), [(4, 6)]),
    "one after the other": (lambda a, b: (((X3 + a) + b) + a).sin().sum((1, 2)), [(4, 6), (4, 6)]),
    "two norms, one of them again": (
        lambda w, a, b: total(F.layer_norm(X, S, w, a) + F.layer_norm(X.sin(), S, w, b) + X.cos() * w + a),
        NORMS,
    ),
    "biases": (lambda w, a, b: (F.layer_norm(X, S, w, a) + F.layer_norm(X.sin(), S, w, a) + b).sum(1), NORMS),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", SHARED)
def test_values_that_autograd_gives_the_same_memory(name: str, verify: bool, rows: list[int]) -> None:
    f, shapes = SHARED[name]
    xs = arguments(shapes)
    found = jacobian(f, *xs, mode="reverse", verify=verify)
    expected = by_rows(f, xs)
    torch.testing.assert_close(list(found), expected)
    assert sum(rows) == 1
    for J in found:  # nor do the results share any
        assert J.is_contiguous()
        J.zero_()
    torch.testing.assert_close(list(jacobian(f, *xs, mode="reverse", verify=verify)), expected)
    assert len({J.data_ptr() for J in found}) == len(found)


def test_axes_of_the_same_size(rows: list[int]) -> None:
    square = torch.linspace(-1, 2, 36, dtype=D).view(6, 6).sin()
    for f in (
        lambda s: (square * s).sin().sum(1),
        lambda s: (square * s[:, None]).sin().sum(0),
        lambda s: (square @ s.diag()).sin().cumsum(0).sum(0),
        lambda s: (square[:, :, None] * s.view(1, 6, 1)).sin().sum((1, 2)),
        lambda s: (square[:, None, :] * s.view(1, 6, 1)).sin().sum((0, 1)),
    ):
        xs = arguments([S])
        torch.testing.assert_close(list(jacobian(f, *xs, mode="reverse")), by_rows(f, xs))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mixed = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.scale = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mixed(self.scale(x))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 32), nn.Embedding(7, 32)
        self.blocks = nn.Sequential(Block(32), Block(32))
        self.out = nn.Linear(32, 11, bias=False)

    def forward(self, words: Tensor) -> Tensor:
        h = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.out(self.blocks(h))


def network(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], int]:
    torch.manual_seed(0)
    if name == "language":
        words = torch.randint(11, (60, 7))
        losses = lambda net: F.cross_entropy(net(words).mT, words.roll(1, 1), reduction="none").mean(1)
        return Language(), losses, 60
    images, labels = torch.randn(40, 2, 10, 10), torch.arange(40) % 5
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.PReLU(6),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, groups=3),
        nn.BatchNorm2d(6).eval(),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    return net, lambda net: F.cross_entropy(net(images), labels, reduction="none"), 40


@pytest.mark.parametrize("name", ["language", "images"])
def test_losses_of_networks_take_one_product(name: str, products: list[int]) -> None:
    net, losses, samples = network(name)
    net = net.to(D)
    if name == "images":
        losses_of = losses
        losses = lambda net: losses_of(_WithDoubles(net))
    J = jacobian(lambda: losses(net), Params(net))
    assert sum(products) == 1
    y = losses(net)
    for i in range(0, samples, 7):
        grads = torch.autograd.grad(y[i], list(net.parameters()), retain_graph=True)
        for p, g in zip(net.parameters(), grads, strict=True):
            torch.testing.assert_close(J[p][i], g.reshape(-1))


class _WithDoubles(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(D))
