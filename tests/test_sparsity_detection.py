"""Detection as a whole: known structures, what can't be seen, what must be left alone, budgets, growth."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchzygote
from torchzygote import _sight, native
from torchzygote.native import index_sets, reference_sets
from torchzygote.sparsity._sets import ID, IndexSets
from torchzygote.sparsity.detect import (
    detect_hessian,
    detect_jacobian,
    hessian_sparsity,
    jacobian_sparsity,
)


def true_jacobian(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    J = torch.autograd.functional.jacobian(f, x)
    return J.reshape(-1, x.numel()) != 0


def true_hessian(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(f, x).reshape(x.numel(), x.numel()).abs() > 1e-10


def covers(found: Tensor, expected: Tensor) -> bool:
    return not bool((expected & ~found).any())


def brusselator(n: int) -> Callable[[Tensor], Tensor]:
    def laplacian(v: Tensor) -> Tensor:
        return v.roll(1, 0) + v.roll(-1, 0) + v.roll(1, 1) + v.roll(-1, 1) - 4 * v

    def f(state: Tensor) -> Tensor:
        u, v = state.view(2, n, n)
        du = 1 + u * u * v - 4.4 * u + 0.02 * laplacian(u)
        dv = 3.4 * u - u * u * v + 0.02 * laplacian(v)
        return torch.stack([du, dv]).view(-1)

    return f


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def arrowhead(x: Tensor) -> Tensor:
    return (x[0] * x[1:]).sum() + (x**3).sum()


def powell(x: Tensor) -> Tensor:
    a, b, c, d = x.view(-1, 4).unbind(1)
    return ((a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4).sum()


def broyden(x: Tensor) -> Tensor:
    padded = F.pad(x, (1, 1))
    return ((3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1).square().sum()


def burgers(u: Tensor) -> Tensor:
    """Upwind differences: what is read depends on the sign, what may be read doesn't."""
    left, right = u - u.roll(1), u.roll(-1) - u
    return -u * torch.where(u > 0, left, right) + 0.1 * (right - left)


def minimal_surface(x: Tensor) -> Tensor:
    z = x.view(5, 5)
    across, down = z[:-1, :-1] - z[1:, 1:], z[:-1, 1:] - z[1:, :-1]
    return torch.sqrt(1 + across**2 + down**2).sum()


@pytest.mark.parametrize(
    ("f", "n"),
    [
        (rosenbrock, 12),
        (arrowhead, 6),
        (powell, 8),
        (broyden, 9),
        (minimal_surface, 25),
        (lambda x: brusselator(3)(x).square().sum(), 18),
        (lambda x: torch.logsumexp(x[:3], 0) + x[3:].prod(), 6),
        (lambda x: sum(x[i] * x[i + 2] for i in range(4)), 6),
    ],
)
def test_hessians_of_well_known_functions_are_found_exactly(f: Any, n: int) -> None:
    x = torch.rand(n, dtype=torch.float64) + 0.2
    (pattern,) = detect_hessian(f, [x])
    assert torch.equal(pattern.to_dense(), true_hessian(f, x))
    assert not pattern.is_local
    assert pattern.unknown == ()


@pytest.mark.parametrize(
    "f", [brusselator(5), lambda x: x.view(5, 10) @ torch.ones(10).double(), torch.cumsum]
)
def test_jacobians_are_found_exactly(f: Any) -> None:
    g = (lambda x: torch.cumsum(x, 0)) if f is torch.cumsum else f
    x = torch.rand(50, dtype=torch.float64) + 0.2
    (pattern,) = detect_jacobian(g, [x])
    assert torch.equal(pattern.to_dense(), true_jacobian(g, x))


def test_a_computed_condition_lists_both_branches() -> None:
    x = torch.rand(6, dtype=torch.float64) - 0.5
    (pattern,) = detect_jacobian(burgers, [x])
    expected = sum(torch.eye(6).roll(k, 1) for k in (-1, 0, 1)) > 0
    assert torch.equal(pattern.to_dense(), expected)
    assert not pattern.is_local


def test_points_through_a_network_couple_only_within_each_point() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1)).double()
    x = torch.rand(7, 2, dtype=torch.float64)
    (pattern,) = detect_hessian(lambda x: net(x).sum(), [x])
    assert torch.equal(pattern.to_dense(), torch.block_diag(*[torch.ones(2, 2)] * 7) > 0)


def test_second_derivatives_inside_f_are_followed() -> None:
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def residual(x: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad[:, 0].sum(), x, create_graph=True)
        return second[:, 0] - grad[:, 1] ** 2

    x = torch.rand(4, 2, dtype=torch.float64)
    (pattern,) = detect_jacobian(residual, [x])
    assert torch.equal(pattern.to_dense(), torch.block_diag(*[torch.ones(1, 2)] * 4) > 0)
    assert pattern.unknown == ()


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
    "normalised": (lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Softmax(-1)), (3, 4)),
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


def test_a_recurrence_in_python_is_followed() -> None:
    def f(x: Tensor) -> Tensor:
        state, out = x[0], []
        for k in range(1, 6):
            state = torch.sin(state) * 0.9 + x[k] if k % 2 else x[k] ** 2
            out.append(state)
        return torch.stack(out)

    x = torch.rand(6, dtype=torch.float64)
    (pattern,) = detect_jacobian(f, [x])
    assert torch.equal(pattern.to_dense(), true_jacobian(f, x))


# ---------------------------------------------------------------------------------------------------------
# local structure


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * 2 if x[0] > 0 else x.sum(),
        lambda x: x * x[0].item(),
        lambda x: x[x > 0],
        lambda x: x[x.argmax()],
        lambda x: x.sort().values,
        lambda x: x.max(),
        lambda x: x[: int(x.sum().abs()) + 1],
        lambda x: x.index_select(0, (x > 0.5).nonzero()[:, 0]),
        lambda x: x.gather(0, x.detach().argsort()),
    ],
)
def test_structure_that_hangs_on_values_says_so(f: Any) -> None:
    x = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64)
    (pattern,) = detect_jacobian(f, [x])
    assert pattern.is_local
    assert torch.equal(pattern.to_dense(), true_jacobian(f, x))
    assert jacobian_sparsity(f, x)[0].is_local


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x[torch.tensor([2, 0])],
        lambda x: torch.relu(x).abs(),
        lambda x: torch.where(x > 0.5, x, -x),
        lambda x: x * (x > 0.5),
        lambda x: x[:2] if x.shape[0] > 2 else x,
        lambda x: x[torch.tensor([True, False, True])],
        lambda x: x * torch.randn(1).item(),
        lambda x: F.max_pool1d(x[None], 2),
    ],
)
def test_structure_that_does_not_says_so_too(f: Any) -> None:
    x = torch.tensor([0.7, 0.2, 0.9], dtype=torch.float64)
    assert not detect_jacobian(f, [x])[0].is_local


# ---------------------------------------------------------------------------------------------------------
# what can't be seen is dense


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Mixing(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(0)


@pytest.mark.parametrize("function", [StraightThrough, Mixing])
def test_a_custom_function_counts_as_dense(function: Any) -> None:
    x = torch.rand(4, dtype=torch.float64)
    (pattern,) = detect_jacobian(lambda x: function.apply(x) * 2, [x])
    assert pattern.dense
    (pattern,) = detect_hessian(lambda x: (function.apply(x) ** 2).sum(), [x])
    assert pattern.dense


def test_a_custom_function_that_the_result_does_not_depend_on_is_no_matter() -> None:
    def f(x: Tensor) -> Tensor:
        StraightThrough.apply(x)
        return x * 2

    assert detect_jacobian(f, [torch.rand(3)])[0].nnz == 3


def test_gradients_bent_by_hooks_count_as_dense() -> None:
    def hooked(x: Tensor) -> Tensor:
        y = x * 2
        y.register_hook(lambda g: g.flip(0))
        return y * 3

    def noted(x: Tensor) -> Tensor:
        _sight.out_of_sight("something")
        return x * 2

    x = torch.rand(4)
    assert detect_jacobian(hooked, [x])[0].dense
    assert detect_jacobian(noted, [x])[0].dense


def test_checkpointed_functions_are_seen_through() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: x[1:] * x[:-1], x, use_reentrant=False)

    def reentrant(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(lambda x: x[1:] * x[:-1], x, use_reentrant=True)

    x = torch.rand(5, dtype=torch.float64)
    expected = true_jacobian(lambda x: x[1:] * x[:-1], x)
    for g in (f, reentrant):
        assert torch.equal(detect_jacobian(g, [x])[0].to_dense(), expected)


@torch.library.custom_op("torchzygote_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_autograd(lambda ctx, g: 2 * g)


def test_an_unknown_operator_is_dense_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    class Plain(torch.utils._python_dispatch.TorchDispatchMode):
        pass

    x = torch.rand(4, dtype=torch.float64)
    with caplog.at_level(logging.DEBUG, logger="torchzygote"):
        for _ in range(2):
            (pattern,) = detect_jacobian(lambda x: torch.special.hermite_polynomial_h(x[:2], 2), [x])
    assert pattern.to_dense()[:, :2].all()
    assert not pattern.to_dense()[:, 2:].any()
    assert len(pattern.unknown) == 1
    assert "hermite" in pattern.unknown[0]
    assert sum("has no rule" in record.message for record in caplog.records) == 1


def test_a_custom_operator_is_dense() -> None:
    (pattern,) = detect_jacobian(lambda x: double(x), [torch.rand(3)])
    assert pattern.to_dense().all()


def test_an_in_place_operator_without_a_rule_taints_what_it_writes() -> None:
    def f(x: Tensor) -> Tensor:
        a = torch.zeros(3)
        torch._foreach_add_([a], [x * 2])
        return a

    x = torch.rand(3)
    assert covers(detect_jacobian(f, [x])[0].to_dense(), torch.eye(3) > 0)


def test_a_rule_that_fails_counts_as_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchzygote.sparsity import rules

    def broken(ctx: Any, call: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setitem(rules.RULES, "sin", rules.Rule(broken))
    (pattern,) = detect_jacobian(torch.sin, [torch.rand(3)])
    assert pattern.to_dense().all()
    assert pattern.unknown == ("aten.sin.default",)


def test_errors_of_f_are_its_own() -> None:
    def f(x: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        detect_jacobian(f, [torch.rand(3)])
    with pytest.raises(KeyError, match="mine"):
        hessian_sparsity(f, torch.rand(3))


# ---------------------------------------------------------------------------------------------------------
# inputs


def test_each_input_has_its_pattern() -> None:
    a, b = torch.rand(3), torch.rand(2, 3)
    first, second = detect_jacobian(lambda a, b: (b * a).sum(0), [a, b])
    assert torch.equal(first.to_dense(), torch.eye(3) > 0)
    assert torch.equal(second.to_dense(), torch.cat([torch.eye(3), torch.eye(3)], 1) > 0)
    first, second = detect_hessian(lambda a, b: (b * a**2).sum() + (b**2).sum(), [a, b])
    assert torch.equal(first.to_dense(), torch.eye(3) > 0)
    assert torch.equal(second.to_dense(), torch.eye(6) > 0)
    (only,) = detect_hessian(lambda a, b: (b * a**2).sum() + (b**2).sum(), [a, b], which=[1])
    assert only == second


def test_an_input_that_f_also_closes_over_is_told_apart() -> None:
    x = torch.rand(3)
    assert detect_hessian(lambda y: (y * x).sum(), [x])[0].nnz == 0


def test_inputs_found_by_identity() -> None:
    weight = torch.rand(3, requires_grad=True)
    (pattern,) = detect_jacobian(lambda w: weight[1:] * weight[:-1], [weight], owned=[False])
    assert pattern.nnz == 4


def test_expanded_and_strided_inputs() -> None:
    x = torch.rand(1).expand(3)
    assert torch.equal(detect_jacobian(lambda x: x * 2, [x])[0].to_dense(), torch.eye(3) > 0)
    x = torch.rand(3, 2).t()
    (pattern,) = detect_jacobian(lambda x: x[0], [x])
    assert pattern.indices.tolist() == [0, 1, 2]


def test_complex_inputs() -> None:
    x = torch.rand(3, dtype=torch.complex128)
    (pattern,) = detect_jacobian(lambda z: (z * z).real, [x])
    assert torch.equal(pattern.to_dense(), torch.eye(3) > 0)


def test_results_that_depend_on_nothing() -> None:
    x = torch.rand(3)
    weight = nn.Parameter(torch.rand(2))
    for f in (lambda x: torch.ones(2), lambda x: weight * 2, lambda x: (x > 0).float()[:2]):
        assert detect_jacobian(f, [x])[0].nnz == 0
        assert detect_jacobian(f, [x])[0].shape == (2, 3)
    assert detect_hessian(lambda x: 3.0, [x])[0].nnz == 0
    assert detect_jacobian(lambda x: x[:0], [x])[0].shape == (0, 3)
    assert detect_jacobian(lambda x: x.sum(), [torch.rand(0)])[0].shape == (1, 0)


# ---------------------------------------------------------------------------------------------------------
# what must be left alone


def test_random_numbers_statistics_and_flags_are_left_as_they_were() -> None:
    layer = nn.BatchNorm1d(3)
    x = torch.rand(4, 3)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    state = torch.get_rng_state()
    detect_jacobian(lambda x: F.dropout(layer(x)), [x])
    assert torch.equal(state, torch.get_rng_state())
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])
    assert not x.requires_grad
    assert x.grad is None


def test_memory_that_f_writes_into_is_put_back() -> None:
    memory = torch.zeros(3)

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            memory.add_(1)
            memory.copy_(x.detach())
        return x * 2

    detect_jacobian(f, [torch.rand(3)])
    assert torch.equal(memory, torch.zeros(3))


def test_values_of_a_random_mask_are_not_taken_for_structure() -> None:
    (pattern,) = detect_jacobian(lambda x: F.dropout(x, 0.9), [torch.rand(50)])
    assert pattern.nnz == 50


def test_zeros_of_a_trainable_matrix_are_not_taken_for_structure() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    (pattern,) = detect_jacobian(layer, [torch.rand(3)])
    assert pattern.nnz == 6
    plain = layer.weight.detach().clone()
    assert detect_jacobian(lambda x: plain @ x, [torch.rand(3)])[0].nnz == 0


def test_the_utilities_of_this_package() -> None:
    def buffered(x: Tensor) -> Tensor:
        buffer = torchzygote.Buffer(x)
        buffer[0] = x[0]
        for i in range(1, 4):
            buffer[i] = x[i] * x[i - 1]
        return buffer.copy()

    x = torch.rand(4, dtype=torch.float64)
    (pattern,) = detect_jacobian(buffered, [x])
    assert torch.equal(pattern.to_dense(), true_jacobian(buffered, x))
    assert detect_jacobian(lambda x: torchzygote.hook(torch.neg, x) * 2, [x])[0].dense
    (pattern,) = detect_jacobian(lambda x: torchzygote.checkpointed(torch.sin, x), [x])
    assert torch.equal(pattern.to_dense(), torch.eye(4) > 0)
    (pattern,) = detect_jacobian(lambda x: torchzygote.gradient(lambda x: (x**3).sum(), x)[0], [x])
    assert torch.equal(pattern.to_dense(), torch.eye(4) > 0)


# ---------------------------------------------------------------------------------------------------------
# budgets and cost


def test_a_budget_ends_detection_with_dense() -> None:
    x = torch.rand(100)
    assert detect_jacobian(brusselator(5), [torch.rand(50)], budget=100)[0].dense
    assert detect_hessian(lambda x: x.sum() ** 2, [x], budget=5000)[0].dense
    assert detect_hessian(lambda x: x.sum() ** 2, [x], budget=20000)[0].nnz == 10000
    assert detect_jacobian(lambda x: x.cumsum(0), [x], budget=1000)[0].dense
    assert detect_jacobian(lambda x: x * 2, [x], budget=1000)[0].nnz == 100


def test_a_long_sum_costs_no_set() -> None:
    x = torch.rand(20000)
    (pattern,) = detect_hessian(lambda x: (x**2).sum() * 0.5 + x.mean(), [x], budget=100_000)
    assert pattern.nnz == 20000


def test_couplings_within_larger_ones_cost_nothing() -> None:
    """Every step couples what the next one couples again: only the last couplings are written out."""

    def heat(x: Tensor) -> Tensor:
        for _ in range(20):
            x = x + 0.1 * (x.roll(1) - 2 * x + x.roll(-1)) + 0.01 * x**3
        return x.square().sum()

    x = torch.rand(100)
    (pattern,) = detect_hessian(heat, [x], budget=100 * 81**2)
    assert pattern.nnz == 100 * 81


def test_equal_sets_do_not_take_each_other_for_larger_ones() -> None:
    sets = IndexSets(3, 1000, nested=True)
    ids = torch.tensor([[1, 2], [2, 3], [1, 3]], dtype=ID)
    a = sets.unite(sets.unite(ids[:1, 0], ids[:1, 1]), ids[1:2, 1])
    b = sets.unite(sets.unite(ids[1:2, 0], ids[1:2, 1]), ids[:1, 0])
    sets.unite(a, b)
    sets.unite(b, a)
    coupled = torch.zeros(sets.count, dtype=torch.bool)
    coupled[[int(a), int(b), 1, 2]] = True
    outermost = sets.outermost(coupled)
    assert members(sets, outermost[[int(a)]]) == [frozenset({0, 1, 2})]
    assert members(sets, outermost[[1, 2]]) == [frozenset({0, 1, 2})] * 2


def test_cost_grows_in_proportion() -> None:
    def seconds(n: int) -> float:
        x = torch.rand(2 * n * n)
        detect_jacobian(brusselator(n), [x])
        start = time.process_time()
        detect_jacobian(brusselator(n), [x])
        return time.process_time() - start

    # Sixteen times the size; the bound is loose, since machines are busy.
    assert seconds(128) < 60 * max(seconds(32), 2e-3)


# ---------------------------------------------------------------------------------------------------------
# sets


def members(sets: IndexSets, ids: Tensor) -> list[frozenset[int]]:
    bounds = sets.ptr.tolist()
    return [frozenset(sets.members[bounds[i] : bounds[i + 1]].tolist()) for i in ids.reshape(-1).tolist()]


@pytest.mark.parametrize("compiled", [True, False])
def test_unions_against_python_sets(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiled and not native.info()["devices"]:
        pytest.skip("the native library is not there")
    if not compiled:
        for name in ("unite_pairs", "unite_groups", "expand_pairs"):
            monkeypatch.setattr(index_sets, name, getattr(reference_sets, name))
    for trial in range(30):
        torch.manual_seed(trial)
        sets = IndexSets(trial % 9 + 1, 10**6)
        for _ in range(4):
            a = torch.randint(0, sets.count, (5, 4)).to(ID)
            b = torch.randint(0, sets.count, (4,)).to(ID)
            expected = [x | y for x, y in zip(members(sets, a), members(sets, b.expand(5, 4)), strict=True)]
            assert members(sets, sets.unite(a, b)) == expected
            found = members(sets, a)
            columns = [frozenset().union(*found[j::4]) for j in range(4)]
            assert members(sets, sets.unite_dims(a, [0])) == columns
        everything = [sets.members[sets.ptr[i] : sets.ptr[i + 1]].tolist() for i in range(sets.count)]
        assert everything == [sorted(set(each)) for each in everything]


@pytest.mark.parametrize("blocks", [[0, 9], [0, 4, 9], [0, 3, 3, 6, 9]])
@pytest.mark.parametrize("compiled", [True, False])
def test_couplings_against_a_dense_matrix(blocks: list[int], compiled: bool) -> None:
    expand = index_sets.expand_pairs if compiled else reference_sets.expand_pairs
    for trial in range(20):
        torch.manual_seed(trial)
        sets = IndexSets(9, 10**6)
        sets.unite(torch.randint(0, 10, (30,)).to(ID), torch.randint(0, 10, (30,)).to(ID))
        sets.unite(torch.randint(0, sets.count, (9,)).to(ID), torch.randint(0, sets.count, (9,)).to(ID))
        a, b = torch.randint(0, sets.count, (2, 6))
        indptr, indices = expand(sets.ptr, sets.members, a, b, torch.tensor(blocks), 10**6)
        expected = torch.zeros(9, 9, dtype=torch.bool)
        for first, second in zip(members(sets, a), members(sets, b), strict=True):
            for i in first:
                for j in second:
                    if sum(i >= bound for bound in blocks) == sum(j >= bound for bound in blocks):
                        expected[i, j] = expected[j, i] = True
        rows = torch.repeat_interleave(torch.arange(9), indptr.diff())
        found = torch.zeros(9, 9, dtype=torch.bool)
        found[rows, indices] = True
        assert torch.equal(found, expected)
        assert indices.numel() == int(expected.sum())
        assert expand(sets.ptr, sets.members, a, b, torch.tensor(blocks), 0)[0].numel() in (0, 10)


def test_compiled_couplings_refuse_what_does_not_fit() -> None:
    if not native.info()["devices"]:
        pytest.skip("the native library is not there")
    ptr, m, bounds = torch.tensor([0, 0, 1]), torch.tensor([3], dtype=ID), torch.tensor([0, 2])
    one = torch.tensor([1])
    with pytest.raises(ValueError, match="set_members: expected values from 0 to 1, got 3"):
        index_sets.expand_pairs(ptr, m, one, one, bounds, 10)
    with pytest.raises(ValueError, match="first"):
        index_sets.expand_pairs(ptr, m, torch.tensor([5]), one, torch.tensor([0, 4]), 10)
    with pytest.raises(ValueError, match="second: expected shape"):
        index_sets.expand_pairs(ptr, m, one, torch.tensor([1, 1]), torch.tensor([0, 4]), 10)


# ---------------------------------------------------------------------------------------------------------
# the public functions


def test_public_results_are_boolean_csr_tensors_that_say_whether_they_are_local() -> None:
    a, b, text = jacobian_sparsity(lambda x, n, s: x[1:] * n, torch.rand(3), 2.0, "s")
    assert a.layout == torch.sparse_csr
    assert a.dtype == torch.bool
    assert torch.equal(a.to_dense(), torch.eye(3)[1:] > 0)
    assert b.shape == (2, 1)
    assert b.to_dense().all()
    assert text is None
    assert a.is_local is False
    h = hessian_sparsity(lambda x: x**3, 2.0)
    assert h.shape == (1, 1)
    assert h.to_dense().all()


def test_public_functions_refuse_what_they_must() -> None:
    x = torch.rand(3)
    with pytest.raises(
        ValueError, match="jacobian_sparsity: expected f to return an array or a number, got tuple"
    ):
        jacobian_sparsity(lambda x: (x, x), x)
    with pytest.raises(ValueError, match="hessian_sparsity: expected f to return a scalar"):
        hessian_sparsity(lambda x: x, x)
    with pytest.raises(TypeError, match="hessian_sparsity: expected x to be a number or an array, got dict"):
        hessian_sparsity(lambda x: x, {"x": x})
    with pytest.raises(RuntimeError, match="jacobian_sparsity: expected a plain call"):
        torch.func.vmap(lambda x: jacobian_sparsity(lambda x: x, x)[0].to_dense())(torch.rand(2, 3))
