"""Diagonals as sums of each operation's curvature: right numbers, no more work, no wrong structure."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from alignment_cases import RULES, SEVERAL_RESULTS
from curvature_cases import BATCH, FUNCTIONS, NET, OTHERS, D, W, layers, points
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from torchzygote import (
    diaghessian,
    gradient,
    hook,
)
from torchzygote._curvature import linear, summed
from torchzygote.params import Params


@pytest.fixture(autouse=True)
def search_small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that steps were found, whether their result was."""
    seen: list[bool] = []
    worker = summed.diagonals

    def counting(*args: object, **options: object) -> list[Tensor] | None:
        found = worker(*args, **options)  # type: ignore[arg-type]
        seen.append(found is not None)
        return found

    monkeypatch.setattr(summed, "diagonals", counting)
    return seen


def by_rows(f: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """The diagonal by each argument, from one nested pullback for each element."""
    inputs = [x.detach().requires_grad_() for x in args]
    with sdpa_kernel(SDPBackend.MATH):  # the fused ones have no second derivatives
        y = f(*inputs)
    grads = torch.autograd.grad(y, inputs, create_graph=True, allow_unused=True)
    found = []
    for x, g in zip(inputs, grads, strict=True):
        h = torch.zeros(x.numel(), dtype=x.dtype)
        for i in range(x.numel() if g is not None and g.requires_grad else 0):
            assert g is not None
            (row,) = torch.autograd.grad(g.reshape(-1)[i], x, retain_graph=True, allow_unused=True)
            h[i] = 0.0 if row is None else row.reshape(-1)[i]
        found.append(h.view(x.shape))
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_equal_nested_pullbacks(name: str, taken: list[bool]) -> None:
    f, x = FUNCTIONS[name], points(BATCH, 3)
    before = x.clone()
    torch.manual_seed(1)
    (h,) = diaghessian(f, x)
    if name != "stacked":  # its prod has no rule
        assert taken == [True] * len(taken) != []
    torch.manual_seed(1)
    torch.testing.assert_close(h, by_rows(f, x)[0])
    assert torch.equal(x, before)
    assert h.is_contiguous()
    assert h.untyped_storage().nbytes() == h.nbytes


@pytest.mark.parametrize("name", OTHERS)
def test_what_has_no_rule_goes_other_ways(name: str, taken: list[bool]) -> None:
    f, x = OTHERS[name], points(BATCH, 3)
    tolerance = 1e-5 if name == "two dtypes" else 1e-10
    (h,) = diaghessian(f, x)
    torch.testing.assert_close(h, by_rows(f, x)[0], rtol=tolerance, atol=tolerance)
    assert True not in taken


LINEAR = ("neg", "positive")


# Not what is random, and what has no rule.
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("dropout", "stacked")])
def test_results_are_differentiable_themselves(name: str, taken: list[bool]) -> None:
    """By the argument, by what f closes over, and once more."""
    f = FUNCTIONS[name]
    x, v = points(BATCH, 3), torch.linspace(0.5, 1.5, BATCH * 3, dtype=D).view(BATCH, 3)

    def ours(x: Tensor, scale: Tensor) -> Tensor:
        return (diaghessian(lambda x: f(x * scale), x)[0] * v).sum()

    def theirs(x: Tensor, scale: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(f(x * scale), x, create_graph=True)
        rows = range(x.numel() if g.requires_grad else 0)
        if name in LINEAR:
            return 0 * (x.sum() + scale.sum())
        h = [torch.autograd.grad(g.reshape(-1)[i], x, create_graph=True)[0].reshape(-1)[i] for i in rows]
        return (torch.stack(h).view_as(x) * v).sum() if h else 0 * (x.sum() + scale.sum())

    scale = torch.tensor([1.1, 0.9, 0.8], dtype=D)
    leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
    expected = torch.autograd.grad(theirs(*leaves), leaves, allow_unused=True, materialize_grads=True)
    for mine, other in zip(gradient(ours, x, scale), expected, strict=True):
        torch.testing.assert_close(torch.zeros_like(other) if mine is None else mine, other)
    assert taken[-1]


ALIGNED: dict[str, Callable[[Tensor], Tensor]] = {
    **SEVERAL_RESULTS,
    **{name: f for name, (f, *_) in RULES.items()},
}


@pytest.mark.parametrize("name", ALIGNED)
def test_whatever_way_is_taken(name: str) -> None:
    """All operations that axes are followed through."""
    f = lambda x: ALIGNED[name](x).square().sum()
    x = torch.linspace(1, 99, 36, dtype=D).sin().view(6, 6)
    with warnings.catch_warnings():  # some go row by row
        warnings.simplefilter("ignore")
        (h,) = diaghessian(f, x)
    torch.testing.assert_close(h, by_rows(f, x)[0])


def test_one_pullback_and_one_run(taken: list[bool], pulls: list[int]) -> None:
    runs = []

    def f(x: Tensor, t: Tensor) -> Tensor:
        runs.append(1)
        return layers(2)(torch.stack([x, t], 1)).sum()

    x, t = points(BATCH), points(BATCH) + 0.4
    for mine, other in zip(diaghessian(f, x, t), by_rows(f, x, t), strict=True):
        torch.testing.assert_close(mine, other)
    assert (taken, pulls, len(runs)) == ([True], [], 1 + 1)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5])
def test_arguments_of_different_widths(chunk_size: int | None, taken: list[bool]) -> None:
    def f(x: Tensor, t: Tensor, z: Tensor, u: Tensor) -> Tensor:
        y = x.sin() * t[:, 0] ** 3 * z.exp().sum(1)
        return (y + (u * t[:, :, None]).exp().sum((1, 2))).sum()

    args = points(BATCH), points(BATCH, 1), points(BATCH, 3), points(BATCH, 2, 2) / 2
    found = diaghessian(f, *args, chunk_size=chunk_size)
    for mine, other in zip(found, by_rows(f, *args), strict=True):
        torch.testing.assert_close(mine, other)
        assert mine.untyped_storage().nbytes() == mine.nbytes
    assert taken == [True]


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "in front": ((BATCH, 2), lambda x: (x[:, 0] ** 3 * x[:, 1].exp()).sum()),
    "last": ((3, BATCH), lambda x: (x[0] * x[1] ** 2 * x[2].cos()).sum()),
    "in between": ((2, BATCH, 2), lambda x: (x.sum((0, 2)) ** 3 + x[0, :, 1].exp()).sum()),
    "two axes": ((20, 2, 15), lambda x: (x[:, 0].sin() * x[:, 1] ** 2).sum()),
    "two axes, swapped inside": ((10, 12, 2), lambda x: x.transpose(0, 1).exp().square().sum(2).sin().sum()),
    "two axes, folded": ((10, 12, 2), lambda x: (x.view(120, 2) @ W[:2]).sin().sum()),
    "all axes": ((20, 6), lambda x: (x**4).sum()),
    "one axis": ((BATCH,), lambda x: (x**4).sum()),
    "one of one": ((BATCH, 1), lambda x: (x**4).sum()),
}


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_wherever_the_axis_of_samples_is(name: str, chunk_size: int | None) -> None:
    shape, f = LAYOUTS[name]
    x = points(*shape)
    (h,) = diaghessian(f, x, chunk_size=chunk_size)
    torch.testing.assert_close(h, by_rows(f, x)[0])
    assert h.is_contiguous()


def test_a_bar_over_the_columns(capsys: pytest.CaptureFixture[str], taken: list[bool]) -> None:
    x = points(BATCH, 3)
    (h,) = diaghessian(lambda x: NET(x).sum(), x, chunk_size=2, progress=True)
    torch.testing.assert_close(h, by_rows(lambda x: NET(x).sum(), x)[0])
    assert "3/3" in capsys.readouterr().err
    assert taken == [True]


def test_params(taken: list[bool]) -> None:
    w = points(BATCH, 3).requires_grad_()
    found = diaghessian(lambda: NET(w).square().sum(), Params([w]))[w]
    torch.testing.assert_close(found, by_rows(lambda w: NET(w).square().sum(), w)[0])
    assert taken == [True]
    v = w * 2  # not where its graph begins
    torch.testing.assert_close(
        diaghessian(lambda: (v**3).sum(), Params([v]))[v], 6 * v.detach(), rtol=1e-12, atol=0
    )
    assert taken == [True]


def test_an_argument_that_is_unused_or_linear(taken: list[bool]) -> None:
    x, y, z = points(BATCH), points(BATCH), points(BATCH)
    a, b, c = diaghessian(lambda x, y, z: (x**3 + z).sum(), x, y, z)
    torch.testing.assert_close(a, 6 * x)
    assert not b.any()
    assert not c.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_non_finite_derivatives_stay_where_they_are(value: float, taken: list[bool]) -> None:
    x = points(BATCH, 2)
    x[7, 1] = value
    f = lambda x: (x[:, 0] ** 2 * x[:, 1].sqrt()).sum()
    (h,) = diaghessian(f, x)
    expected = by_rows(f, x)[0]
    assert torch.equal(h.isfinite(), expected.isfinite())
    torch.testing.assert_close(h, expected, equal_nan=True)
    assert True not in taken


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "flipped": lambda t: t.flip(1),
    "scaled": lambda t: t * 1.01,
    "a column lost": lambda t: torch.cat([torch.zeros_like(t[:, :, :1]), t[:, :, 1:]], 2),
    "a sample lost": lambda t: torch.cat([torch.zeros_like(t[:, :1]), t[:, 1:]], 1),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tangents_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    right = linear.MOVES["Neg"]
    monkeypatch.setitem(linear.MOVES, "Neg", lambda *args: (WRONG[name](right(*args)[0]), None))
    f, x = (lambda x: ((-x).exp() * x.sum(1, keepdim=True)).sum()), points(BATCH, 3)
    (h,) = diaghessian(f, x)
    torch.testing.assert_close(h, by_rows(f, x)[0])
    assert taken == [False]


def test_samples_at_an_optimum_are_no_mismatch(taken: list[bool]) -> None:
    """Their gradients are what is left of rounding."""
    x = torch.zeros(500, 6) + 1e-4 * torch.linspace(-1, 1, 500)[:, None]
    diaghessian(lambda x: ((x + 3).exp() - 20.085537 * x).sum(), x)
    target = torch.softmax(torch.linspace(-1, 1, 6), 0)
    x = torch.linspace(-1, 1, 6).expand(500, 6)
    diaghessian(lambda x: (x.logsumexp(1) - x @ target).sum(), x)
    assert taken == [True, True]


@pytest.mark.parametrize("layers", [2, 16])
def test_a_checkpoint_runs_again_a_few_times(layers: int, taken: list[bool]) -> None:
    """What it keeps is asked for in backward passes only, each of which runs it once."""
    runs = []

    def inner(x: Tensor) -> Tensor:
        runs.append(1)
        for _ in range(layers):
            x = (x @ W[:, :3]).tanh()
        return x

    x = points(BATCH, 3)
    (h,) = diaghessian(lambda x: checkpoint(inner, x, use_reentrant=False).pow(2).sum(), x)
    assert len(runs) <= 1 + 2 + 3  # forward; two gradients, and one pass for each column
    assert taken == []
    torch.testing.assert_close(h, by_rows(lambda x: inner(x).pow(2).sum(), x)[0])


def test_zero_crossings_are_no_mismatch(taken: list[bool]) -> None:
    """Derivatives that cancel up to rounding, in one column and in all."""
    x = torch.linspace(-3, 3, 4001).unsqueeze(1)
    net = layers(1).float()
    diaghessian(lambda x: net(x).sum(), x)
    diaghessian(lambda x: (x.cosh() - x).sum() + x.sum(), x)
    diaghessian(lambda x: x.cos().sum(), x.squeeze())
    assert taken == [True, True, True]


def test_hooks_see_what_they_saw(taken: list[bool]) -> None:
    seen: list[Tensor] = []
    x = points(BATCH, 3)

    def f(x: Tensor) -> Tensor:
        return (hook(seen.append, x.sin()) ** 2).sum()

    torch.testing.assert_close(diaghessian(f, x)[0], 2 * (2 * x).cos())
    assert taken == []
    assert seen


def test_a_function_with_a_backward_of_its_own(taken: list[bool]) -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)  # type: ignore[attr-defined]
            return x**3

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * g * ctx.saved_tensors[0] ** 2  # type: ignore[attr-defined]

    x = points(BATCH, 3)
    torch.testing.assert_close(diaghessian(lambda x: Cube.apply(x).sum(), x)[0], 4 * x)
    assert taken == []


def test_the_graph_is_given_back() -> None:
    x, kept = points(BATCH, 3), []

    def f(x: Tensor) -> Tensor:
        y = x.sin()
        kept.append(weakref.ref(y))
        return (y**2).sum()

    diaghessian(f, x)
    assert kept[0]() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    f, x = (lambda x: (x.sin() * x[:, :1]).exp().sum()), points(BATCH, 3)
    (h,) = diaghessian(f, x.to(dtype))
    assert h.dtype == dtype
    size = float(by_rows(f, x)[0].abs().max())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(h.double(), by_rows(f, x.to(dtype).double())[0], rtol=0, atol=60 * eps * size)


def test_small_squares_in_half_precision(taken: list[bool]) -> None:
    x = torch.full((64,), 1000.0, dtype=torch.float16)
    (h,) = diaghessian(lambda x: (x * 1e-3).sin().sum() * 1000, x)
    torch.testing.assert_close(h, torch.full_like(h, -8.415e-4), rtol=0.01, atol=0)
    assert taken == []


UNARY = ["sin", "exp", "tanh", "sigmoid", "square", "atan", "cos", "neg"]


@settings(max_examples=60)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Values combined at random, some of them several times, in random shapes."""
    columns = data.draw(st.integers(1, 3))
    lead = data.draw(st.sampled_from([(40,), (8, 6)]))
    x = points(*lead, columns)
    program = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from([*UNARY, "mul", "div", "add", "sub", "matmul", "softmax", "sum", "norm"]),
                st.integers(0, 9),
                st.integers(0, 9),
            ),
            min_size=1,
            max_size=8,
        )
    )

    def f(x: Tensor) -> Tensor:
        values = [x]
        for name, i, j in program:
            a, b = values[i % len(values)], values[j % len(values)]
            if name in UNARY:
                bounded = name in ("exp", "square")  # or all may be what is left of rounding
                values.append(getattr(torch, name)(a.tanh() if bounded else a))
            elif name in ("mul", "add", "sub"):
                values.append(getattr(torch, name)(a, b).tanh())
            elif name == "div":
                values.append(a / (1.5 + b.tanh()))
            elif name == "matmul":
                values.append((a @ W[:1].expand(a.shape[-1], 4)[:, :columns]).sin())
            elif name == "softmax":
                values.append(a.softmax(-1))
            elif name == "sum":
                values.append(a.sum(-1, keepdim=True).expand_as(a))
            else:
                values.append(a / (a.tanh() + 1.5).norm(dim=-1, keepdim=True))
        return sum((k + 1) * value.sum() for k, value in enumerate(values[-2:]))  # type: ignore[return-value]

    torch.testing.assert_close(diaghessian(f, x)[0], by_rows(f, x)[0], rtol=1e-7, atol=1e-8)
