"""Derivatives by distances: what must not go this way, and how the rest is checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stencil_cases import D, X, rosenbrock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torchzygote as tz
from torchzygote import _stencil_sums, diaghessian, hessian
from torchzygote._curvature import elementwise, stencil_program
from torchzygote._curvature.elementwise import Function, Slopes

pytestmark = pytest.mark.usefixtures("grids_read_at_once")


class Doubled(torch.autograd.Function):
    """Its derivative isn't what it looks like."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * g


def bent(x: Tensor) -> Tensor:
    y = x[1:] * x[:-1]
    y.register_hook(lambda g: 2 * g)
    return y.sum()


@pytest.mark.parametrize(
    ("f", "factor"),
    [
        (bent, 2),
        (lambda x: tz.hook(lambda g: 3 * g, x[1:] * x[:-1]).sum(), 3),
        (lambda x: Doubled.apply(x[1:] * x[:-1]).sum(), 3),
    ],
)
def test_what_bends_the_gradient_is_seen(f: Callable[[Tensor], Tensor], factor: int) -> None:
    plain = torch.func.hessian(lambda x: (x[1:] * x[:-1]).sum())(X)
    for _ in range(2):
        torch.testing.assert_close(hessian(f, X), factor * plain)
        torch.testing.assert_close(diaghessian(f, X)[0], torch.zeros(42, dtype=D))
    (J,) = tz.jacobian(lambda x: f(x) + x[1:] * 0, X)
    torch.testing.assert_close(J, (factor * (plain @ X)).expand(41, 42))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_run_as_often_as_a_product_asks(reentrant: bool) -> None:
    runs: list[Tensor] = []

    def part(x: Tensor) -> Tensor:
        runs.append(x)
        return (x[1:] * x[:-1]).sin()

    f = lambda x: checkpoint(part, x, use_reentrant=reentrant).sum()
    expected = torch.func.hessian(lambda x: part(x).sum())(X)
    for ours in (f, lambda x: tz.checkpointed(part, x).sum()):
        runs.clear()
        torch.testing.assert_close(hessian(ours, X), expected)
        assert len(runs) <= 4


def test_saved_tensors_on_other_devices_are_unpacked() -> None:
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        H = hessian(rosenbrock, X)
    torch.testing.assert_close(H, torch.func.hessian(rosenbrock)(X))
    assert packed
    torch.testing.assert_close(hessian(rosenbrock, X), torch.func.hessian(rosenbrock)(X))


def test_what_was_written_over_is_an_error() -> None:
    def f(x: Tensor) -> Tensor:
        y = x[1:] * 1
        z = (y**3).sum()
        y.mul_(2)
        return z

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hessian(f, X)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 5}, {"create_graph": True}, {"mode": "reverse_over_reverse"}]
)
def test_what_is_asked_for_by_name_is_done(
    options: dict[str, Any], grids_taken: list[bool], chunks: list[int]
) -> None:
    torch.testing.assert_close(hessian(rosenbrock, X, **options), torch.func.hessian(rosenbrock)(X))
    assert True not in grids_taken
    assert sum(chunks) == 42


def test_inside_transforms(grids_taken: list[bool]) -> None:
    xs = torch.stack([X, X + 0.1])
    expected = torch.func.vmap(torch.func.hessian(rosenbrock))(xs)
    torch.testing.assert_close(torch.func.vmap(lambda x: hessian(rosenbrock, x))(xs), expected)
    total = lambda x: hessian(rosenbrock, x).square().sum()
    torch.testing.assert_close(
        torch.func.grad(total)(X),
        torch.func.grad(lambda x: torch.func.hessian(rosenbrock)(x).square().sum())(X),
    )
    assert True not in grids_taken


def test_of_a_differentiated_argument() -> None:
    """By what a parameter gives, with the graph that leads there."""
    w = torch.tensor(1.5, dtype=D, requires_grad=True)
    f = lambda x: ((w * x).diff() ** 3).sum()
    H = hessian(f, X)
    assert not H.requires_grad
    torch.testing.assert_close(H, torch.func.hessian(lambda x: ((1.5 * x).diff() ** 3).sum())(X))
    assert hessian(f, X, create_graph=True).requires_grad


# ---- checks ------------------------------------------------------------------------------------------------


def wrong(slope: float, weight: float) -> Function:
    """The square, but for these factors."""
    right = elementwise._SQUARE

    def derivatives(*args: Any) -> Slopes:
        found = right.derivatives(*args)
        return found._replace(
            slope=found.slope * slope, weight=None if found.weight is None else found.weight * weight
        )

    return Function(derivatives, right.scale)


@pytest.mark.parametrize("n", [42, 400])
def test_wrong_tangents_are_noticed(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_SQUARE", wrong(1.01, 1))
    x = torch.linspace(0.3, 1.9, n, dtype=D)
    torch.testing.assert_close(hessian(rosenbrock, x), torch.func.hessian(rosenbrock)(x))
    torch.testing.assert_close(diaghessian(rosenbrock, x)[0], torch.func.hessian(rosenbrock)(x).diagonal())
    f = lambda x: x[1:] ** 2 - x[:-1]
    torch.testing.assert_close(tz.jacobian(f, x)[0], torch.func.jacrev(f)(x))


@pytest.mark.parametrize("n", [42, 400])
def test_wrong_curvature_is_noticed_and_told(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_SQUARE", wrong(1, 1.01))
    x = torch.linspace(0.3, 1.9, n, dtype=D)
    expected = torch.func.hessian(rosenbrock)(x)
    with pytest.warns(UserWarning, match="hessian: the Hessian that was summed up.*please report that"):
        torch.testing.assert_close(hessian(rosenbrock, x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(hessian(rosenbrock, x), expected)  # once is enough
        torch.testing.assert_close(hessian(rosenbrock, x, verify=False), expected)
        stencil_program._programs.clear()
        assert not torch.allclose(hessian(rosenbrock, x, verify=False), expected)


@pytest.mark.parametrize(("most", "products"), [(1 << 16, [1, 0, 0]), (100, [1, 1])])
def test_one_product_for_each_program(
    most: int, products: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ones aren't kept."""
    monkeypatch.setattr(stencil_program, "_MOST_KEPT", most)
    made: list[Tensor] = []
    original = _stencil_sums._product

    def counted(second: Any, vector: Tensor) -> Tensor | None:
        made.append(vector)
        return original(second, vector)

    monkeypatch.setattr(_stencil_sums, "_product", counted)
    counts = []
    for _ in products:
        made.clear()
        hessian(rosenbrock, X)
        counts.append(len(made))
    assert counts == products
    stencil_program._programs.clear()
    made.clear()
    hessian(rosenbrock, X, verify=False)
    assert made == []


def test_small_ones_are_read_the_second_time(monkeypatch: pytest.MonkeyPatch, chunks: list[int]) -> None:
    monkeypatch.setattr(stencil_program, "_AT_ONCE", 256)
    for n in (42, 41):
        found = [hessian(rosenbrock, X[:n]) for _ in range(3)]
        assert chunks == [n]
        chunks.clear()
        for one in found:
            torch.testing.assert_close(one, torch.func.hessian(rosenbrock)(X[:n]))
    assert len(stencil_program._seen) == 2
    for i in range(100):
        hessian(lambda x, i=i: (x.roll(i) * x).sum(), X)
    assert len(stencil_program._seen) <= 32
    chunks.clear()
    hessian(rosenbrock, torch.linspace(0, 1, 256, dtype=D))
    assert chunks == []


CANCELLING: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.log().exp().sum(),
    lambda x: x.atan().tan().sum(),
    lambda x: (1 / (1 / x)).sum(),
    lambda x: ((x.roll(1) * x).exp().log() - x.roll(1) * x).sum(),
    lambda x: (x.diff().sin() ** 2 + x.diff().cos() ** 2).sum(),
    lambda x: (x[1:] / x[:-1] * x[:-1]).sum(),
    lambda x: (1 + (40 * (x[1:] + x[:-1])).exp()).log().sum(),
    lambda x: (x.diff() ** 2 + 1e-10).sqrt().sum(),
]


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("f", CANCELLING)
def test_curvatures_that_cancel_are_no_mistakes(
    f: Callable[[Tensor], Tensor], dtype: torch.dtype, grids_taken: list[bool]
) -> None:
    """Entries of nothing but rounding noise are as good as any others."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        stencil_program._programs.clear()
        x = (torch.rand(42, generator=generator, dtype=D) + 0.3).to(dtype)
        hessian(f, x)  # warnings are errors
    assert grids_taken == [True] * 10 or dtype == torch.float32  # where numbers overflow


def test_gradients_that_are_not_finite_are_left_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchzygote._curvature import stencil_hessians

    monkeypatch.setattr(stencil_hessians._GridPass, "run", lambda self: pytest.fail("tangents were pushed"))
    x = torch.ones(42, dtype=D)
    H = hessian(lambda x: (x.diff() ** 2).sqrt().sum(), x)
    assert H.isnan().any()


SPECIAL = X.clone()
SPECIAL[[3, 17]] = 0.0


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x.sqrt() * x.roll(1)).sum(),
        lambda x: x.diff().abs().sqrt().sum() + (x.roll(1) * x).sum(),
        lambda x: (x[1:] / x[:-1]).sum(),
        lambda x: (x.log() * x.roll(1) ** 2).sum(),
        lambda x: (x.roll(1) ** 1.5 * x).sum(),
        lambda x: torch.where(x.roll(1) > 0, x * x.roll(1).log(), x).sum(),
    ],
)
def test_what_is_not_finite_is_what_products_give(f: Callable[[Tensor], Tensor]) -> None:
    H = hessian(f, SPECIAL)
    torch.testing.assert_close(H, hessian(f, SPECIAL, mode="reverse_over_reverse"), equal_nan=True)


def test_large_numbers_that_cancel() -> None:
    """Gradients that are small remainders of large terms aren't taken for mistakes."""
    x = torch.linspace(0, 1, 300, dtype=D)
    f = lambda x: (1e8 * (x.diff() - 1 / 299) ** 2).sum()
    H = hessian(f, x)
    torch.testing.assert_close(H, torch.func.hessian(f)(x))
    single = hessian(f, x.float())
    torch.testing.assert_close(single, torch.func.hessian(f)(x.float()))
