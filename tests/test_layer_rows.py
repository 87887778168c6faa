"""Jacobians by weights: the rows of all samples at once where the samples stay apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from factored_cases import arguments
from torch import Tensor, nn

from torchzygote import Params, _layer_rows, diaghessian, gradient, jacobian, withjacobian
from torchzygote._recorded import alignment as _alignment
from torchzygote._recorded import alignment_rules as _alignment_rules
from torchzygote.buffer import Buffer
from torchzygote.checkpointing import checkpointed
from torchzygote.hooks import hook

Function = Callable[..., Tensor]

D = torch.float64
X = torch.linspace(-1, 1, 48, dtype=D).sin().view(8, 6)
X3 = torch.linspace(-2, 1, 72, dtype=D).cos().view(3, 4, 6)
R = torch.tensor([0.3, -0.7, 1.1, 0.2, -0.4], dtype=D)
R3 = torch.linspace(-1, 1, 15, dtype=D).exp().view(5, 3)


T64 = torch.linspace(0, 1, 40, dtype=D).view(8, 5)


def pieces(p: Tensor) -> Tensor:
    w1, b1, w2, b2 = p[:30].view(6, 5), p[30:35], p[35:50].view(5, 3), p[50:53]
    return ((X @ w1 + b1).tanh() @ w2 + b2).square().mean(1)


W, WT, B = (5, 6), (6, 5), (5,)
# the function, the shapes of its arguments, and how many products are taken besides the check
FEW: dict[str, tuple[Function, list[tuple[int, ...]], int]] = {
    "losses": (lambda w, b: F.linear(X, w, b).tanh() @ R, [W, B], 1),
    "losses, from the left": (lambda w: R @ (w @ X.t()).tanh(), [W], 1),
    "outputs": (lambda w, b: F.linear(X, w, b).tanh() @ R3, [W, B], 3),
    "outputs, transposed": (lambda w, b: (F.linear(X, w, b).tanh() @ R3).t(), [W, B], 3),
    "outputs of a layer": (lambda w, b: F.linear(X, w, b), [W, B], 5),
    "generalized linear model": (lambda w: (X @ w).exp(), [(6,)], 1),
    "cross entropies": (
        lambda w, b: F.cross_entropy(F.linear(X, w, b), torch.arange(8) % 5, reduction="none"),
        [W, B],
        1,
    ),
    "tokens, summed": (lambda w, b: F.linear(X3, w, b).tanh().sum(1) @ R, [W, B], 1),
    "tokens": (lambda w, b: F.linear(X3, w, b).tanh() @ R, [W, B], 1),
    "tokens, transposed": (lambda w, b: (F.linear(X3, w, b).tanh() @ R).t(), [W, B], 1),
    "tokens that meet": (lambda w, b: F.linear(X3, w, b).softmax(1).square().sum(-1), [W, B], 4),
    "tied weights": (lambda w: (X @ w).tanh() @ w.t(), [WT], 6),
    "weights used twice": (lambda w: ((X @ w).tanh() @ w).sum(1), [(6, 6)], 1),
    "weights of two inputs": (lambda w: (X @ w).sin().sum(1) * (X.flip(0) @ w).cos().sum(1), [WT], 1),
    "pieces of a vector": (pieces, [(54,)], 1),
    "stacked": (lambda w: (X @ w[0]).sin().sum(1) * (X @ w[1]).cos().sum(1), [(2, 6, 5)], 1),
    "strided": (lambda w: (X @ w[::2] * (X @ w[1::2])).sum(1), [(12, 5)], 1),
    "addmm": (lambda w, b: torch.addmm(b, X, w, beta=0.5, alpha=2).exp().sum(1), [WT, B], 1),
    "einsum": (lambda w: torch.einsum("bk,ck->bc", X, w).exp().sum(1), [W], 1),
    "a number from a vector": (lambda p: (X @ p[:6] + p[6]).exp(), [(8,)], 1),
    "a number": (lambda w, b: (X @ w + b).exp(), [(6,), ()], 1),
}
# Samples meet, weights go elsewhere too, or something bends: a product for each row.
PLAIN: dict[str, tuple[Function, list[tuple[int, ...]]]] = {
    "samples meet": (lambda w: (X @ w).softmax(0).sum(1), [WT]),
    "batch norm": (lambda w: F.batch_norm(X @ w, None, None, training=True).exp().sum(1), [WT]),
    "elsewhere": (lambda w: (X @ w).tanh() @ R + w.sum(), [WT]),
    "checkpointed": (lambda w: checkpointed(lambda h: h.tanh() @ R, X @ w), [WT]),
}


def by_torch_func(f: Function, xs: list[Tensor]) -> list[Tensor]:
    found = torch.func.jacrev(f, argnums=tuple(range(len(xs))))(*xs)
    return [J.reshape(-1, x.numel()) for J, x in zip(found, xs, strict=True)]


@pytest.mark.parametrize("mode", ["reverse", "auto"])
@pytest.mark.parametrize("name", FEW)
def test_few_products_give_all_rows(name: str, mode: str, rows: list[int]) -> None:
    f, shapes, few = FEW[name]
    xs = arguments(shapes)
    found = [J.reshape(len(J), -1) for J in jacobian(f, *xs, mode=mode)]  # a number's is a vector
    torch.testing.assert_close(found, by_torch_func(f, xs))
    if mode == "reverse":
        assert sum(rows) == few


@pytest.mark.parametrize("name", PLAIN)
def test_other_functions_go_the_plain_way(name: str, rows: list[int]) -> None:
    f, shapes = PLAIN[name]
    xs = arguments(shapes)
    found = jacobian(f, *xs, mode="reverse")
    plain = f if name != "checkpointed" else lambda w: (X @ w).tanh() @ R
    torch.testing.assert_close(list(found), by_torch_func(plain, xs))
    assert sum(rows) >= found[0].shape[0]


def test_hooks_bend_every_row(rows: list[int]) -> None:
    f = lambda w: hook(lambda g: 2 * g, X @ w).tanh() @ R
    xs = arguments([WT])
    torch.testing.assert_close(jacobian(f, *xs)[0], 2 * by_torch_func(lambda w: (X @ w).tanh() @ R, xs)[0])


def test_a_tensor_hook_bends_every_row(rows: list[int]) -> None:
    def f(w: Tensor) -> Tensor:
        h = X @ w
        h.register_hook(lambda g: g.clamp(max=0.1))
        return h.tanh() @ R

    (J,) = jacobian(f, *arguments([WT]), mode="reverse")
    w = arguments([WT])[0].requires_grad_()
    y = f(w)
    expected = [torch.autograd.grad(y[i], w, retain_graph=True)[0].reshape(-1) for i in range(8)]
    torch.testing.assert_close(J, torch.stack(expected))


def test_some_inputs_by_row_and_some_at_once(rows: list[int]) -> None:
    f = lambda w, s: (X @ w).tanh() @ R * s.exp().sum()
    xs = arguments([WT, (20,)])
    torch.testing.assert_close(list(jacobian(f, *xs, mode="reverse")), by_torch_func(f, xs))
    assert sum(rows) == 1 + 8


def test_networks_by_params(rows: list[int]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)).to(D)
    value, J = withjacobian(lambda: net(X), Params(net))
    torch.testing.assert_close(value, net(X).detach())
    weights = {name: p.detach() for name, p in net.named_parameters()}
    plain = torch.func.jacrev(lambda w: torch.func.functional_call(net, w, (X,)))(weights)
    for name, expected in plain.items():
        torch.testing.assert_close(J[net.get_parameter(name)], expected.reshape(24, -1))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("name", ["outputs", "tokens, summed", "pieces of a vector", "tied weights"])
def test_the_rows_are_differentiable(name: str, rows: list[int]) -> None:
    f, shapes, _ = FEW[name]
    xs = [x.requires_grad_() for x in arguments(shapes)]
    found = jacobian(f, *xs, mode="reverse", create_graph=True)
    total = lambda Js: sum((J.sin().sum() for J in Js), torch.zeros((), dtype=D))
    grads = torch.autograd.grad(total(found), xs)
    plain = torch.func.grad(lambda *ys: total(by_torch_func(f, list(ys))), tuple(range(len(xs))))
    torch.testing.assert_close(grads, plain(*[x.detach() for x in xs]))
    assert all(not J.requires_grad for J in jacobian(f, *xs, mode="reverse"))


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_rows_come_in_chunks(chunk_size: int | None, rows: list[int]) -> None:
    f, shapes, _ = FEW["outputs"]
    xs = arguments(shapes)
    found = jacobian(f, *xs, mode="reverse", chunk_size=chunk_size)
    torch.testing.assert_close(list(found), by_torch_func(f, xs))
    assert rows == {1: [1, 1, 1], 2: [2, 1], None: [3]}[chunk_size]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype, rows: list[int]) -> None:
    xs = arguments([W, B], dtype)
    f = lambda w, b: F.linear(X.to(w.dtype), w, b).tanh() @ R.to(w.dtype)
    found = jacobian(f, *xs, mode="reverse")
    slack = 1e-5 if dtype == torch.float32 else 0.05
    for J, expected in zip(found, by_torch_func(f, [x.to(D) for x in xs]), strict=True):
        assert J.dtype == dtype
        torch.testing.assert_close(J.to(D), expected, rtol=slack, atol=slack)
    assert sum(rows) == 1


@pytest.mark.parametrize("verify", [True, False])
def test_a_wrong_rule_is_noticed(verify: bool, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**_alignment.RULES, "Softmax": _alignment_rules._elementwise}
    monkeypatch.setattr(_alignment, "RULES", wrong)
    _alignment._rule.cache_clear()
    f, xs = (lambda w: (X @ w).softmax(0) @ R), arguments([WT])
    expected = by_torch_func(f, xs)
    try:
        if verify:
            with pytest.warns(UserWarning, match="contradicts.*SoftmaxBackward"):
                found = jacobian(f, *xs, mode="reverse")
            torch.testing.assert_close(list(found), expected)
        else:
            assert not torch.allclose(jacobian(f, *xs, mode="reverse", verify=False)[0], expected[0])
    finally:
        _alignment._rule.cache_clear()


def test_results_share_no_memory(rows: list[int]) -> None:
    f = lambda w, b: F.linear(X, w, b)
    first = jacobian(f, *arguments([W, B]), mode="reverse")
    for J in first:
        assert J.is_contiguous()
        J.zero_()
    torch.testing.assert_close(
        list(jacobian(f, *arguments([W, B]), mode="reverse")), by_torch_func(f, arguments([W, B]))
    )


def test_a_complex_bias() -> None:
    data, w = torch.complex(X, X.cos()), torch.complex(*arguments([WT, WT]))
    (b,) = arguments([(5,)])
    f = lambda b: (data @ w + b).abs().sum(1)
    z = torch.complex(b, b.sin())
    rows = [torch.autograd.functional.jacobian(lambda z, i=i: f(z)[i], z) for i in range(8)]
    torch.testing.assert_close(jacobian(f, z)[0], torch.stack(rows))


def test_what_is_added_may_promote(rows: list[int]) -> None:
    (w,) = arguments([WT], torch.float32)
    f = lambda w: (X.float() @ w + T64).exp().sum(1)
    (J,) = jacobian(f, w, mode="reverse")
    assert J.dtype == D
    expected = by_torch_func(lambda w: (X @ w + T64).exp().sum(1), [w.to(D)])[0]
    torch.testing.assert_close(J, expected, rtol=1e-5, atol=1e-4)


def test_no_tokens(rows: list[int]) -> None:
    xs = arguments([W, B])
    data = torch.zeros(8, 0, 6, dtype=D)
    for J, x in zip(jacobian(lambda w, b: F.linear(data, w, b).tanh().sum((1, 2)), *xs), xs, strict=True):
        assert J.shape == (8, x.numel())
        assert not J.any()


def test_a_buffer_of_samples(rows: list[int]) -> None:
    def f(w: Tensor) -> Tensor:
        buf = Buffer(w, 8)
        h = (X @ w).tanh() @ R
        for i in range(8):
            buf[i] = h[i]
        return buf.copy()

    xs = arguments([WT])
    torch.testing.assert_close(list(jacobian(f, *xs)), by_torch_func(lambda w: (X @ w).tanh() @ R, xs))


def test_large_networks_take_as_many_products_as_outputs(products: list[int]) -> None:
    net = nn.Sequential(nn.Linear(10, 40), nn.Tanh(), nn.Linear(40, 2))
    x = torch.randn(300, 10)
    J = jacobian(lambda: net(x), Params(net))
    assert sum(products) == 2
    one = torch.func.vmap(torch.func.jacrev(lambda w, x: torch.func.functional_call(net, w, (x,))), (None, 0))
    expected = one({name: p.detach() for name, p in net.named_parameters()}, x)
    for name, p in net.named_parameters():
        torch.testing.assert_close(J[p], expected[name].reshape(600, -1))


def test_small_problems_do_not_look_for_affine_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layer_rows, "Entering", None)
    f, shapes, _ = FEW["outputs"]
    jacobian(f, *arguments(shapes), mode="reverse")


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6).eval()],
    ids=["layer norm", "group norm", "batch norm"],
)
def test_norms_under_autocast(norm: nn.Module, rows: list[int]) -> None:
    """Their weights are float32 beside values in bfloat16, which PyTorch can't batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), norm, nn.GELU(), nn.Linear(6, 4))
    x, y, ps = X.float(), torch.arange(8) % 4, Params(net)

    def losses() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = net(x)
        return F.cross_entropy(scores.float(), y, reduction="none")

    found = jacobian(losses, ps)
    assert rows[0] == 1  # of the network; the others only through what casts a weight
    for i, loss in enumerate(losses()):
        expected = torch.autograd.grad(loss, list(ps), retain_graph=True)
        for p, slope in zip(ps, expected, strict=True):
            torch.testing.assert_close(found[p][i], slope.reshape(-1), rtol=1e-2, atol=1e-3)


def laplacian(net: nn.Module, points: Tensor) -> Tensor:
    return diaghessian(lambda x: net(x).sum(), points)[0].sum(1)


def slope(net: nn.Module, points: Tensor) -> Tensor:
    return gradient(lambda x: net(x).sum(), points)[0][:, 0]


@pytest.mark.parametrize(("f", "by_one"), [(laplacian, 11), (slope, 6)])
def test_of_derivatives_by_the_points(
    f: Callable[[nn.Module, Tensor], Tensor], by_one: int, pulls: list[int]
) -> None:
    """Residuals of a physics-informed network; its last bias has no part in them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    points = torch.rand(500, 2, dtype=torch.float64)
    found = jacobian(lambda: f(net, points), Params(net))
    assert len(pulls) <= by_one
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def one(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        u = lambda x: torch.func.functional_call(net, weights, (x,))[0]
        return torch.func.hessian(u)(x).trace() if f is laplacian else torch.func.grad(u)(x)[0]

    expected = torch.func.vmap(torch.func.grad(one), (None, 0))(weights, points)
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[p], expected[name].reshape(500, -1))


# Networks, what goes in, and from how many samples on rows by layers were measured to take less time.
PAYING: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], int]] = {
    "linear": (
        lambda: nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        ),
        lambda n: torch.randn(n, 64),
        8,
    ),
    "wide": (
        lambda: nn.Sequential(
            nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        ),
        lambda n: torch.randn(n, 256),
        8,
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)
        ),
        lambda n: torch.randn(n, 3, 12, 12),
        6,
    ),
    "embedding": (
        lambda: nn.Sequential(
            nn.Embedding(1000, 32), nn.Flatten(), nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 10)
        ),
        lambda n: torch.arange(6 * n).view(n, 6),
        8,
    ),
}


@pytest.mark.parametrize("samples", [2, 3, 6, 8, 16, 32])
@pytest.mark.parametrize("name", PAYING)
def test_rows_by_layers_are_taken_where_they_take_less_time(
    name: str, samples: int, products: list[int]
) -> None:
    make, inputs, least = PAYING[name]
    net = make()
    x = inputs(samples)
    jacobian(lambda: net(x), Params(net))
    assert (sum(products) == 10) == (samples >= least)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_terms_of_one_input_are_added_up_in_chunks(chunk_size: int, rows: list[int]) -> None:
    X = torch.linspace(-1, 1, 48, dtype=D).sin().view(8, 6)
    R3 = torch.linspace(-1, 1, 15, dtype=D).exp().view(5, 3)
    f = lambda w: (X @ w).sin() @ R3 + (X.flip(0) @ w).cos() @ R3
    w = torch.linspace(-1, 2, 30, dtype=D).view(6, 5)
    found = jacobian(f, w, mode="reverse", chunk_size=chunk_size)[0]
    torch.testing.assert_close(found, torch.func.jacrev(f)(w).reshape(24, 30))
    assert sum(rows) == 3
