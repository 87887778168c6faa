"""Derivatives by distances, without any product: Hessians of sums over a grid, diagonals, Jacobians."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvature_cases import ACTIVATIONS, ONE
from hypothesis import given
from hypothesis import strategies as st
from stencil_cases import SUMS, VALUES, ZERO, D, X, programs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torchzygote as tz
from torchzygote import _stencil_sums, diaghessian, hessian, withhessian
from torchzygote._curvature import elementwise, stencil_program
from torchzygote._curvature.elementwise import Function, Slopes

C = torch.linspace(-1, 2, 42, dtype=D)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def shared(x: Tensor) -> Tensor:
    """Of what the sums take, other operations take some, too."""
    h = x.exp()
    d = h[1:] - h[:-1]
    return h.sum() + 2 * d.mean() - (3 * h[1:]).sum() / 7 + (d * d).sum() + d.sum() + x.sum() * 0.5


TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: f for name, (f, _) in SUMS.items()},
    **{
        f"squares of {name}": (lambda x, f=f: f(x).square().sum())
        for name, (f, _) in VALUES.items()
        if name != "a limiter"  # maximum() has no rule where both vary
    },
    "rosenbrock": rosenbrock,
    "shared": shared,
    "each by itself": lambda x: (x.sin() * x).sum(),
    "in another shape": lambda x: (x.view(6, 7) ** 3).mean(),
    "quotients": lambda x: (x[1:] / x[:-1] - 2 / x[1:]).sum(),
    "a quotient by itself": lambda x: (x / (1 + x * x)).roll(3).cos().sum(),
    "times constants": lambda x: (C[1:] * x[1:] * x[:-1] / C[:-1].exp()).sum() * 3,
    "chosen": lambda x: torch.where(C > 0, x.exp(), x.roll(1) ** 2).sum(),
    "masked": lambda x: (x.masked_fill(C > 0, 2.0) * x.roll(1)).sum(),
    "without curvature": lambda x: x.diff().abs().sum() + x.diff().relu().sum(),
    "linear": lambda x: (3 * x[1:] - x[:-1]).sum(),
    "some of both": lambda x: x.diff().abs().sum() + (x[1:] * x[:-1]).tanh().sum(),
    "activations": lambda x: (x.diff().sigmoid() * F.softplus(x[1:])).sum() + F.gelu(x.diff() * 3).sum(),
    "powers": lambda x: (x.roll(1) ** 3 * x**0.5 + 2**x).sum(),
    "powers by a tensor": lambda x: (x.roll(2) ** C * x).sum(),
    "from a number": lambda x: (1 - x.roll(1)).sub(x, alpha=2).square().sum(),
    "rsub": lambda x: torch.rsub(x, x.roll(-1), alpha=3).square().sum(),
    "joined": lambda x: (torch.cat([x[:1].exp(), ZERO, x[2:] * x[:-2], x[-1:]]) ** 2).sum(),
    "joined twice": lambda x: (torch.cat([x, x.sin()]) ** 2).sum(),
    "rolled and cut": lambda x: (x.roll(5)[3:-2] * x[4:-1]).exp().sum(),
    "a matrix, rolled both ways": lambda x: (x.view(6, 7).roll((1, -2), (0, 1)) * x.view(6, 7)).sin().sum(),
    "moved all around": lambda x: (x.roll(21) * x).sum() + (x.roll(42) * x).sin().sum(),
    "three axes": lambda x: (x.view(2, 3, 7)[:, 1:] * x.view(2, 3, 7)[:, :-1] ** 2).sum(),
    "padded with numbers": lambda x: (F.pad(x, (1, 1), value=3.0)[2:] * x.exp()).sum(),
    "in float64 constants": lambda x: (x[1:] * torch.ones(41, dtype=D) * x[:-1]).sum(),
    "terms of weights that vary": lambda x: (x[1:] ** 2).sum() / 3 - (x[:-1].sin() * x[1:]).mean() * 2.5,
}
# Where two distances lead to one element, tangents times themselves are not all of the diagonal.
MEETING = ("moved all around", "squares of the same place twice")
# Not seen as such a sum, but no less right.
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "the gradient of a sum": lambda x: (tz.gradient(rosenbrock, x)[0] * C).sum(),
    "a product of sums": lambda x: (x[1:] ** 2).sum() * x.sin().sum(),
    "a root of a sum": lambda x: (x.diff() ** 2).sum().sqrt(),
    "partial sums": lambda x: (x.view(6, 7) ** 2).sum(1).exp().sum(),
    "a sum inside": lambda x: (x * x.sum()).sin().sum(),
    "every other one": lambda x: (x[::2] * x[1::2]).exp().sum(),
    "mirrored": lambda x: (x.flip(0) * x).sum(),
    "a repeated element": lambda x: (x[:1] * x).sin().sum(),
    "two dtypes": lambda x: (x.float()[1:] * x.float()[:-1]).double().sin().sum(),
    "a matrix": lambda x: ((torch.eye(42, dtype=D) + 1) @ x).square().sum(),
    "the larger ones": lambda x: torch.maximum(x[1:] ** 2, x[:-1] ** 3).sum(),
    "all of all": lambda x: sum((x.roll(i) for i in range(42)), x).sin().sum(),
    "nothing": lambda x: torch.ones(3, dtype=D).sum(),
    "an element": lambda x: x[3].exp(),
    "random": lambda x: (F.dropout(x[1:] * x[:-1], 0.5) ** 2).sum(),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each time that a sum was looked for, whether the result was taken from it."""
    seen: list[bool] = []
    worker = _stencil_sums._attempt

    def noted(way: Callable[[], Any]) -> Any:
        found = worker(way)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(_stencil_sums, "_attempt", noted)
    return seen


@pytest.fixture(autouse=True)
def forget_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test begins with graphs that nobody has seen, and reads them at once."""
    for kept in ("_programs", "_seen"):
        monkeypatch.setattr(stencil_program, kept, type(getattr(stencil_program, kept))())
    monkeypatch.setattr(stencil_program, "_AT_ONCE", 0)
    monkeypatch.setattr(_stencil_sums, "LEAST_OF_A_JACOBIAN", 0)


def check(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Against nested reverse mode, twice: once read, once recognized."""
    for point in (x, x.flip(0)):
        before = point.clone()
        expected = torch.func.jacrev(torch.func.grad(f))(point).reshape(x.numel(), x.numel())
        val, grad, H = withhessian(f, point)
        torch.testing.assert_close(H, expected)
        torch.testing.assert_close(val, f(point))
        torch.testing.assert_close(grad, torch.func.grad(f)(point))
        assert [one.requires_grad for one in (val, grad, H)] == [False] * 3
        assert H.is_contiguous()
        torch.testing.assert_close(hessian(f, point), expected)
        (h,) = diaghessian(f, point)
        torch.testing.assert_close(h, expected.diagonal().reshape(x.shape))
        assert torch.equal(point, before)


@pytest.mark.parametrize("name", TAKEN)
def test_without_any_product(name: str, taken: list[bool], chunks: list[int]) -> None:
    check(TAKEN[name], X)
    if name in MEETING:
        assert taken == [True, True, False] * 2
        return
    assert taken == [True] * len(taken) != []
    assert chunks == []


@pytest.mark.parametrize("name", [*ONE, *ACTIVATIONS])
def test_functions_of_one_element(name: str, chunks: list[int]) -> None:
    act = getattr(F, name) if name in ACTIVATIONS else getattr(torch, name)
    check(lambda x: (act(0.3 * x[1:] + 0.2 * x[:-1]) * x[1:]).sum() + act(x.roll(1) * 0.4).mean(), X)
    assert chunks == []


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "random"])
def test_what_is_not_seen_as_a_sum_goes_other_ways(name: str, taken: list[bool]) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if name == "two dtypes" else {}
    f = OTHERS[name]
    if name == "nothing":
        assert torch.equal(hessian(f, X), torch.zeros(42, 42, dtype=D))
    else:
        torch.testing.assert_close(hessian(f, X), torch.func.hessian(f)(X), **tolerance)  # type: ignore[arg-type]
    assert True not in taken


def test_random_functions_are_drawn_once() -> None:
    torch.manual_seed(0)
    H = hessian(OTHERS["random"], X)
    torch.manual_seed(0)
    mask = F.dropout(torch.ones(41, dtype=D), 0.5)
    torch.testing.assert_close(H, torch.func.hessian(lambda x: ((x[1:] * x[:-1] * mask) ** 2).sum())(X))


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("shape", [(42,), (6, 7), (2, 3, 7)])
def test_arguments_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype, taken: list[bool]) -> None:
    x = X.to(dtype).reshape(shape)
    f = lambda x: ((x[1:] - x[:-1]) ** 2).sum() + (x.roll(1, -1) * x).sin().mean()
    check(f, x)
    assert False not in taken


def test_half_precision_goes_other_ways(taken: list[bool]) -> None:
    x = X.to(torch.bfloat16)
    torch.testing.assert_close(hessian(rosenbrock, x), torch.func.hessian(rosenbrock)(x))
    assert True not in taken


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_short_ones(n: int) -> None:
    x = X[:n]
    for f in (
        lambda x: (x.roll(1) * x).sin().sum(),
        lambda x: (x[1:] * x[:-1]).exp().sum(),
        lambda x: (x.roll(1) * x.roll(2) * x.roll(-1)).sum(),
        lambda x: (F.pad(x, (2, 2)) ** 2).sum(),
    ):
        torch.testing.assert_close(hessian(f, x), torch.func.hessian(f)(x))
        torch.testing.assert_close(diaghessian(f, x)[0], torch.func.hessian(f)(x).diagonal())


def test_no_elements() -> None:
    assert hessian(lambda x: (x.roll(1) * x).sum(), torch.ones(0)).shape == (0, 0)


def test_one_backward_pass_and_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchzygote._curvature import stencil_hessians

    runs: list[Tensor] = []
    passes: list[bool] = []
    original = stencil_hessians.pull_back

    def counted(*args: Any) -> Any:
        passes.append(args[-1])
        return original(*args)

    def f(x: Tensor) -> Tensor:
        runs.append(x)
        return rosenbrock(x)

    monkeypatch.setattr(stencil_hessians, "pull_back", counted)
    withhessian(f, X)
    assert len(runs) == 1
    assert passes == [False]  # no graph of the gradient


# ---- Jacobians ---------------------------------------------------------------------------------------------

ARRAYS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: f for name, (f, _) in VALUES.items() if name != "a limiter"},
    "quotients": lambda x: x[1:] / x[:-1] - 2 / x[1:],
    "in another shape": lambda x: (x.view(6, 7)[1:] * x.view(6, 7)[:-1]).view(5, 7),
    "chosen": lambda x: torch.where(C > 0, x.exp(), x.roll(1) ** 2),
    "limited": lambda x: x.diff().clamp(min=0.01) * x.diff().abs(),
    "activations": lambda x: F.gelu(x.diff()) * x[1:].sigmoid(),
    "linear": lambda x: 3 * x[1:] - x[:-1],
    "longer": lambda x: torch.cat([x, ZERO, x.sin()]).roll(0),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_jacobians(name: str, taken: list[bool], chunks: list[int]) -> None:
    f = ARRAYS[name]
    for x in (X, X.flip(0)):
        taken.clear()
        (J,) = tz.jacobian(f, x)
        torch.testing.assert_close(J, torch.func.jacrev(f)(x).reshape(J.shape))
        val, (again,) = tz.withjacobian(f, x)
        assert torch.equal(J, again)
        assert not (J.requires_grad or val.requires_grad)  # noqa: PT018
        torch.testing.assert_close(val, f(x))
        if name != "longer":
            assert taken == [True] * 2
            assert chunks == []


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.sin() * x,
        lambda x: (x[1:] * x[:-1]).sum(),
        lambda x: x[1:] * x.sum(),
        lambda x: x[::2] * x[1::2],
        lambda x: (x[1:] * x[:-1], 3)[0].float(),
        lambda x: torch.stack([x, x.roll(1)]),
    ],
)
def test_other_jacobians(f: Callable[[Tensor], Tensor], taken: list[bool]) -> None:
    (J,) = tz.jacobian(f, X)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X).reshape(J.shape).to(J.dtype))
    assert True not in taken


@given(programs())
def test_jacobians_of_random_programs(f: Callable[[Tensor], Tensor]) -> None:
    (J,) = tz.jacobian(f, X)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X))


@pytest.mark.parametrize(
    "options", [{"chunk_size": 5}, {"create_graph": True}, {"mode": "reverse"}, {"mode": "forward"}]
)
def test_jacobians_that_are_asked_for_by_name(options: dict[str, Any], taken: list[bool]) -> None:
    f = ARRAYS["three neighbors"]
    (J,) = tz.jacobian(f, X, **options)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X))
    assert taken == []


def test_jacobians_in_single_precision(taken: list[bool]) -> None:
    f, x = ARRAYS["three neighbors"], X.float()
    (J,) = tz.jacobian(f, x)
    assert J.dtype == torch.float32
    torch.testing.assert_close(J, torch.func.jacrev(f)(x))
    assert taken == [True]
    f = ARRAYS["a border of unknown size"]  # with numbers in double precision
    torch.testing.assert_close(tz.jacobian(f, x)[0].double(), torch.func.jacrev(f)(X), rtol=1e-6, atol=1e-6)


def test_small_jacobians_are_batched_rows(monkeypatch: pytest.MonkeyPatch, taken: list[bool]) -> None:
    monkeypatch.setattr(_stencil_sums, "LEAST_OF_A_JACOBIAN", 43)
    tz.jacobian(ARRAYS["three neighbors"], X)
    assert taken == []


# ---- graphs that look the same -----------------------------------------------------------------------------

# Pairs that differ in what only the nodes of the graph know
ALIKE: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "exponents": tuple(lambda x, p=p: (x.diff() ** p).sum() for p in (2, 3, 1, 4.0)),
    "weights": tuple(lambda x, a=a: x[1:].sub(x[:-1], alpha=a).exp().sum() for a in (1, 2, -1)),
    "weights of sums": tuple(lambda x, a=a: x[1:].add(x[:-1], alpha=a).exp().sum() for a in (1, 2, -1)),
    "from": tuple(lambda x, a=a: torch.rsub(x[1:], x[:-1], alpha=a).exp().sum() for a in (1, 2)),
    "shifts": tuple(lambda x, s=s: (x.roll(s) * x).sin().sum() for s in (1, 2, -1, 0)),
    "axes": tuple(lambda x, d=d: (x.view(6, 7).roll(1, d) * x.view(6, 7)).sin().sum() for d in (0, 1)),
    "slices": tuple(lambda x, i=i: (x[i : i + 30] * x[12:]).sin().sum() for i in (0, 1, 5)),
    "sliced axes": (
        lambda x: (x.view(6, 7)[1:, 1:] * x.view(6, 7)[:-1, :-1]).sum(),
        lambda x: (x.view(6, 7)[1:, :-1] * x.view(6, 7)[:-1, 1:]).sum(),
    ),
    "pads": tuple(lambda x, a=a: (F.pad(x, (a, 3 - a))[:42] * x).sin().sum() for a in (0, 1, 2, 3)),
    "orders": (
        lambda x: (torch.cat([x[:1], x[1:].exp()]) * x).sum(),
        lambda x: (torch.cat([x[1:].exp(), x[:1]]) * x).sum(),
    ),
    "joined axes": (
        lambda x: (torch.cat([x.view(6, 7)[:3], x.view(6, 7)[3:].exp()], 0) ** 2).sum(),
        lambda x: (torch.cat([x.view(6, 7)[:, :3], x.view(6, 7)[:, 3:].exp()], 1) ** 2).sum(),
    ),
    "sums": (lambda x: (x.diff() ** 2).sum(), lambda x: (x.diff() ** 2).mean()),
    "which is which": (
        lambda x: (x[1:] / x[:-1]).sum(),
        lambda x: (x[:-1] / x[1:]).sum(),
    ),
    "constants": tuple(lambda x, c=c: ((x.diff() * c) ** 2).sum() for c in (2.0, C[1:], C[:1])),
    "minus": (lambda x: x.diff().exp().sum() - x.exp().sum(), lambda x: x.exp().sum() - x.diff().exp().sum()),
}


@pytest.mark.parametrize("name", ALIKE)
def test_graphs_that_look_alike_are_told_apart(name: str) -> None:
    for _ in range(2):
        for f in ALIKE[name]:
            torch.testing.assert_close(hessian(f, X), torch.func.hessian(f)(X))
            torch.testing.assert_close(diaghessian(f, X)[0], torch.func.hessian(f)(X).diagonal())


def test_dtypes_and_sizes_are_told_apart() -> None:
    for x in (X, X.float(), X[:20], X.view(6, 7), X.view(7, 6), X.view(42, 1)):
        f = lambda x: (x.diff(dim=0) ** 3).sum()
        H = hessian(f, x)
        assert H.dtype == x.dtype
        torch.testing.assert_close(H, torch.func.hessian(f)(x).reshape(H.shape))


def test_few_programs_are_kept_and_no_large_ones() -> None:
    for i in range(100):
        hessian(lambda x, i=i: (x.roll(i) * x).sum(), X)
    assert len(stencil_program._programs) <= 32
    stencil_program._programs.clear()
    diaghessian(lambda x: (x[1:] * x[:-1]).exp().sum(), torch.rand(1 << 16))
    assert not stencil_program._programs
    x = torch.rand(8)
    for _ in range(3):
        diaghessian(lambda x: F.pad(x, (0, 200_000)).square().sum(), x)  # large inside
    assert not stencil_program._programs


def test_what_is_kept_is_not_given_away() -> None:
    """Nobody can write into it."""
    for f in (lambda x: (x.diff() ** 2).sum(), lambda x: (x * x).sum(), lambda x: x.diff().sum()):
        first = hessian(f, X)
        expected = first.clone()
        first.fill_(7)
        diaghessian(f, X)[0].fill_(7)
        withhessian(f, X).grad.fill_(7)
        assert torch.equal(hessian(f, X), expected)
        assert torch.equal(diaghessian(f, X)[0], expected.diagonal())


# ---- random sums -------------------------------------------------------------------------------------------


@given(programs(), programs(), st.integers(0, 3))
def test_random_programs(f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], which: int) -> None:
    def total(x: Tensor) -> Tensor:
        u, v = f(x), g(x)
        if which == 0:
            return u.sum() + v.square().mean()
        if which == 1:
            return (u * v).sum()
        if which == 2:
            return (u.sin() / (2 + v * v)).sum() - u.sum() * 3
        return (u - v).square().sum() + u.exp().mean() - (2 * u).sum()

    expected = torch.func.hessian(total)(X)
    torch.testing.assert_close(hessian(total, X), expected)
    torch.testing.assert_close(diaghessian(total, X)[0], expected.diagonal())


# ---- what must not go this way -----------------------------------------------------------------------------


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
    options: dict[str, Any], taken: list[bool], chunks: list[int]
) -> None:
    torch.testing.assert_close(hessian(rosenbrock, X, **options), torch.func.hessian(rosenbrock)(X))
    assert True not in taken
    assert sum(chunks) == 42


def test_inside_transforms(taken: list[bool]) -> None:
    xs = torch.stack([X, X + 0.1])
    expected = torch.func.vmap(torch.func.hessian(rosenbrock))(xs)
    torch.testing.assert_close(torch.func.vmap(lambda x: hessian(rosenbrock, x))(xs), expected)
    total = lambda x: hessian(rosenbrock, x).square().sum()
    torch.testing.assert_close(
        torch.func.grad(total)(X),
        torch.func.grad(lambda x: torch.func.hessian(rosenbrock)(x).square().sum())(X),
    )
    assert True not in taken


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
    f: Callable[[Tensor], Tensor], dtype: torch.dtype, taken: list[bool]
) -> None:
    """Entries of nothing but rounding noise are as good as any others."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        stencil_program._programs.clear()
        x = (torch.rand(42, generator=generator, dtype=D) + 0.3).to(dtype)
        hessian(f, x)  # warnings are errors
    assert taken == [True] * 10 or dtype == torch.float32  # where numbers overflow


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
