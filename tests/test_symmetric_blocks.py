"""Blocks of a Hessian whose products check each other: right numbers, no product more, no wrong structure."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from torchzygote import checkpointed, diaghessian, gradient, hessian, jacobian, plan_hessian
from torchzygote._recorded import alignment as _alignment
from torchzygote._recorded import alignment_rules as _alignment_rules
from torchzygote.params import Params

BATCH = 300


@pytest.fixture(autouse=True)
def search_small_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchzygote._cost_model.LEAST_BYTES", 0)
    # It comes first, and needs fewer products.
    monkeypatch.setattr("torchzygote._dense_hessians.diagonals_by_curvature", lambda *_: None)


def network(inputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def points(*shape: int) -> Tensor:
    return torch.linspace(-1, 2, torch.Size(shape).numel(), dtype=torch.float64).sin().reshape(shape)


def by_torch_func(f: Callable[..., Tensor], *args: Tensor) -> list[Tensor]:
    """The diagonal by each argument, from whole Hessians."""
    H = torch.func.hessian(f, argnums=tuple(range(len(args))))(*args)
    return [H[i][i].reshape(x.numel(), x.numel()).diagonal().reshape(x.shape) for i, x in enumerate(args)]


FOUR = network(4)
# The argument's shape, and the function; the batch axis is where BATCH is.
FUNCTIONS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "two columns": ((BATCH, 2), lambda x: (x[:, 0] ** 3 * x[:, 1].exp()).sum()),
    "three columns": ((BATCH, 3), lambda x: (x.prod(1) + x.sum(1).sin()).sum()),
    "four columns": ((BATCH, 4), lambda x: FOUR(x).square().sum()),
    "batch axis last": ((3, BATCH), lambda x: (x[0] * x[1] ** 2 * x[2].cos()).sum()),
    "batch axis in between": ((2, BATCH, 2), lambda x: (x.sum((0, 2)) ** 3 + x[0, :, 1].exp()).sum()),
    "two batch axes": ((20, 2, 15), lambda x: (x[:, 0].sin() * x[:, 1] ** 2).sum()),
    "nothing mixed": ((BATCH, 2), lambda x: (x**4).sum(1).sum()),
    "one column is linear": ((BATCH, 2), lambda x: (x[:, 0] ** 2 + x[:, 1]).sum()),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_equal_torch_func(name: str) -> None:
    shape, f = FUNCTIONS[name]
    x = points(*shape)
    torch.testing.assert_close(diaghessian(f, x)[0], by_torch_func(f, x)[0])
    H = torch.func.hessian(f)(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(hessian(f, x), H)


@pytest.mark.parametrize("columns", [2, 3, 4])
def test_as_many_products_as_columns(columns: int, pulls: list[int]) -> None:
    x = points(BATCH, columns)
    diaghessian(lambda x: network(columns)(x).sum(), x)
    assert len(pulls) == 1 + columns  # the gradient first
    pulls.clear()
    diaghessian(lambda *xs: network(columns)(torch.stack(xs, 1)).sum(), *x.unbind(1))
    assert pulls == [columns] * (1 + columns)


@pytest.mark.parametrize("columns", [1, 5])
def test_other_blocks_take_one_product_more(columns: int, pulls: list[int]) -> None:
    x = points(BATCH, columns)
    diaghessian(lambda x: network(columns)(x).sum(), x, chunk_size=1)
    assert len(pulls) == 1 + columns + 1


def test_several_arguments_of_different_widths() -> None:
    f = lambda x, t, z: (x.sin() * t**3 * z.exp().sum(1)).sum()
    args = (points(BATCH), points(BATCH) + 2, points(BATCH, 2))
    for mine, theirs in zip(diaghessian(f, *args), by_torch_func(f, *args), strict=True):
        torch.testing.assert_close(mine, theirs)
        assert mine.untyped_storage().nbytes() == mine.nbytes  # no result keeps the others' memory


def test_params_and_their_hooks(pulls: list[int]) -> None:
    w = points(BATCH, 2).requires_grad_()
    loss = lambda: (w[:, 0] ** 3 * w[:, 1] ** 2).sum()
    (expected,) = by_torch_func(lambda w: (w[:, 0] ** 3 * w[:, 1] ** 2).sum(), w.detach())
    torch.testing.assert_close(diaghessian(loss, Params([w]))[w], expected)
    assert len(pulls) == 1 + 2
    pulls.clear()
    w.register_hook(lambda g: g)
    torch.testing.assert_close(diaghessian(loss, Params([w]))[w], expected)
    assert len(pulls) == 1 + 2  # a batch of two rows, and the check


def test_integers_come_out_exactly() -> None:
    x = torch.arange(2.0 * BATCH).reshape(BATCH, 2)
    (h,) = diaghessian(lambda x: (x[:, 0] ** 2 * 3 + x[:, 0] * x[:, 1]).sum(), x)
    assert torch.equal(h, torch.tensor([6.0, 0.0]).expand(BATCH, 2))


def test_results_are_differentiable_themselves() -> None:
    x = points(BATCH, 2)
    net = network(2)

    def laplacian(scale: Tensor) -> Tensor:
        return diaghessian(lambda x: net(x * scale).sum(), x)[0].sum(1).square().mean()

    def plain(scale: Tensor) -> Tensor:
        H = torch.func.vmap(torch.func.hessian(lambda x: net(x * scale)[0]))(x)
        return H.diagonal(dim1=1, dim2=2).sum(1).square().mean()

    scale = torch.tensor([1.3, 0.7], dtype=torch.float64)
    torch.testing.assert_close(gradient(laplacian, scale)[0], torch.func.grad(plain)(scale))
    matrix = lambda x: hessian(lambda x: net(x).sum(), x).square().sum()
    expected = lambda x: torch.func.vmap(torch.func.hessian(lambda x: net(x)[0]))(x).square().sum()
    torch.testing.assert_close(gradient(matrix, x)[0], torch.func.grad(expected)(x))


# What couples elements of different blocks, hidden from the walk by a wrong rule: (row, column) of a block
COUPLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "first with first": lambda x: (x[:, 0].flip(0) * x[:, 0]).sum() + x.prod(1).sum(),
    "second with second": lambda x: (x[:, 1].flip(0) * x[:, 1]).sum() + x.prod(1).sum(),
    "first with second": lambda x: (x[:, 0].flip(0) * x[:, 1]).sum() + x.prod(1).sum(),
    "all with all": lambda x: (x.flip(0) * x).sum() + x.prod(1).sum(),
    "sums of all before": lambda x: (x.cumsum(0) * x).sum() + x.prod(1).sum(),
    "in a few rows": lambda x: (x[:60].flip(0) * x[:60]).sum() + x.prod(1).sum(),
    "beside a large block": lambda x: (x.flip(0) * x).sum() + (beside_a_large_one(x) * x.prod(1)).sum(),
}


def beside_a_large_one(x: Tensor) -> Tensor:
    return torch.cat([x.new_ones(len(x) - 1), x.new_full((1,), 1e16)])


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_wrong_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**_alignment.RULES, **dict.fromkeys(["Flip", "Cumsum"], _alignment_rules._elementwise)}
    wrong["Slice"] = wrong["SliceBackward"] = lambda node, inputs, out: tuple(range(len(out)))
    monkeypatch.setattr(_alignment, "RULES", wrong)
    _alignment._rule.cache_clear()
    f, x = COUPLINGS[name], points(BATCH, 2)
    try:
        with pytest.warns(UserWarning, match="contradicts.*MulBackward0"):
            (h,) = diaghessian(f, x)
        with pytest.warns(UserWarning, match="contradicts"):
            H = hessian(f, x)
    finally:
        _alignment._rule.cache_clear()
    torch.testing.assert_close(h, by_torch_func(f, x)[0])
    torch.testing.assert_close(H, torch.func.hessian(f)(x).reshape(H.shape))


def test_a_function_with_a_state_runs_once() -> None:
    """Also where nothing can be told, or a check looks again."""
    runs: list[int] = []

    def f(x: Tensor) -> Tensor:
        runs.append(1)
        return len(runs) * (x[:, 0] ** 2 * x[:, 1] ** 3).sum()

    x = points(BATCH, 2)
    for value in (1.0, float("nan")):
        x[7, 1] = value
        runs.clear()
        (h,) = diaghessian(f, x)
        assert len(runs) == 1
        expected = torch.stack([2 * x[:, 1] ** 3, 6 * x[:, 0] ** 2 * x[:, 1]], 1)
        torch.testing.assert_close(h, expected, equal_nan=True)


BENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "mixes the batch": lambda g: g.flip(0),
    "depends on the norm": lambda g: g / g.norm(),
    "clamps": lambda g: g.clamp(max=0.5),
}


@pytest.mark.parametrize("name", BENDS)
def test_a_hook_that_bends_is_noticed(name: str) -> None:
    """Hooks may do with a pullback what they like, so that its rows must be those of the dense way."""

    def f(x: Tensor) -> Tensor:
        y = x * 2
        # The recorded gradient doesn't show it.
        y.register_hook(lambda g: g if torch.is_grad_enabled() else BENDS[name](g))
        return (y**3).sum()

    x = points(BATCH, 2)
    with pytest.warns(UserWarning, match="contradicts"):
        diaghessian(f, x)


def test_a_checkpointed_function_runs_again_once_for_each_chunk(pulls: list[int]) -> None:
    runs = []

    def inner(x: Tensor) -> Tensor:
        runs.append(1)
        return x.prod(1).sin()

    x = points(BATCH, 4)
    f = lambda x: checkpointed(inner, x).sum()
    (h,) = diaghessian(f, x)
    torch.testing.assert_close(h, by_torch_func(lambda x: x.prod(1).sin().sum(), x)[0])
    # f, the gradient, four rows at once, the check; a second derivative needs what the gradient needed too
    assert len(runs) <= 1 + 3 * 2
    assert len(pulls) == 1 + 1 + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_where_they_are(value: float) -> None:
    x = points(BATCH, 2)
    x[7, 1] = value
    f = lambda x: (x[:, 0] ** 2 * x[:, 1] ** 3).sum()
    (h,) = diaghessian(f, x)
    assert torch.equal(h.isfinite(), by_torch_func(f, x)[0].isfinite())


def test_half_precision_takes_the_other_check(pulls: list[int]) -> None:
    x = points(BATCH, 2).bfloat16()
    diaghessian(lambda x: (x[:, 0] ** 2 * x[:, 1]).sum(), x)
    assert len(pulls) == 1 + 1 + 1  # two rows at once


def test_progress_and_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    f, x = FUNCTIONS["two columns"][1], points(BATCH, 2)
    (h,) = diaghessian(f, x, chunk_size=1, progress=True)
    torch.testing.assert_close(h, by_torch_func(f, x)[0])
    assert "2/2" in capsys.readouterr().err


def test_many_cheap_elements_take_the_other_check(pulls: list[int]) -> None:
    """Drawing columns for so many takes longer than a product."""
    x = points(40_000, 2)
    (h,) = diaghessian(lambda x: (x[:, 0] ** 2 * x[:, 1]).sum(), x, chunk_size=1)
    torch.testing.assert_close(h, torch.stack([2 * x[:, 1], torch.zeros(40_000, dtype=x.dtype)], 1))
    assert len(pulls) == 1 + 2 + 1
    pulls.clear()
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    diaghessian(lambda x: net(x).sum(), x)
    assert len(pulls) == 1 + 2


def test_a_hook_on_what_was_computed_before_the_call() -> None:
    """It would see other sizes than the dense way's, and be neither linear nor visible in the graph."""

    def squared(w: Tensor) -> Tensor:
        t = w * 1.0
        t.register_hook(lambda g: g * g.abs())
        return t

    w = points(BATCH, 2).requires_grad_()
    t = squared(w)
    with pytest.warns(UserWarning, match="contradicts|please report"):
        h = diaghessian(lambda: (t**3).sum(1).sum(), Params([w]))[w]
    t = squared(w)
    (g,) = torch.autograd.grad((t**3).sum(), w, create_graph=True)
    for i in range(4):
        row = torch.zeros_like(w)
        row[i, 0] = 1
        torch.testing.assert_close(h[i, 0], torch.autograd.grad(g, w, row, retain_graph=True)[0][i, 0])


@pytest.mark.parametrize("columns", [1, 2, 3, 5])
def test_half_precision_inside_f_is_no_wrong_structure(columns: int) -> None:
    net = network(columns).float()

    def f(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x).sum()

    x = points(BATCH, columns).float()
    found, expected = diaghessian(f, x)[0], diaghessian(lambda x: net(x).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
    jacobian(lambda x: torch.tanh(x.bfloat16()).float(), x, sparse=True)
    plan_hessian(f, x[:20])(x[20:40])
