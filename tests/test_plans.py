"""Plans: structure found and colored once, evaluated for new values, refused for other arguments."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import func_hessian, func_jacobian
from sparse_cases import HESSIANS, JACOBIANS, inputs, rosenbrock, sparse_functions
from torch import Tensor

import torchzygote as tz
from torchzygote import HessianPlan, JacobianPlan, Params, gradient, jacobian, plan_hessian, plan_jacobian

BAND = torch.eye(5, 6) + torch.eye(6)[1:]


def product(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobians_at_new_values(name: str, mode: str, dtype: torch.dtype) -> None:
    f, shapes = JACOBIANS[name]
    xs = inputs(shapes, dtype)
    plan = plan_jacobian(f, *xs, mode=mode)
    for _ in range(2):
        expected = func_jacobian(f, *xs)
        for x, J, D, E in zip(xs, plan(*xs), plan(*xs, dense=True), expected, strict=True):
            shape = E.shape if x.dim() > 0 else E.shape[:1]
            assert J.layout == (torch.sparse_csr if x.dim() > 0 else torch.strided)
            assert D.layout == torch.strided
            assert J.shape == D.shape == shape
            torch.testing.assert_close(J.to_dense(), E.reshape(shape))
            torch.testing.assert_close(D, E.reshape(shape))
        for E, v, s in zip(expected, plan.values(*xs), plan.sparsity, strict=True):
            torch.testing.assert_close(v, E[s.to_dense()])
        if name != "picks":  # its structure is that of one input
            xs = [x.flip(0) * 1.5 if x.dim() > 0 else x + 1 for x in xs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["auto", "forward_over_reverse", "reverse_over_reverse"])
@pytest.mark.parametrize("name", HESSIANS)
def test_hessians_at_new_values(name: str, mode: str, dtype: torch.dtype) -> None:
    f, shape = HESSIANS[name]
    (x,) = inputs([shape], dtype)
    plan = plan_hessian(f, x, mode=mode)
    for point in (x, x.flip(0) * 1.5):
        expected = func_hessian(f, point)
        H = plan(point)
        assert H.layout == torch.sparse_csr
        torch.testing.assert_close(H.to_dense(), expected)
        torch.testing.assert_close(plan(point, dense=True), expected)
        torch.testing.assert_close(plan.values(point), expected[plan.sparsity.to_dense()])
        torch.testing.assert_close(plan.diagonal(point), expected.diagonal().reshape(shape))


@given(sparse_functions(), st.sampled_from(["auto", "forward", "reverse"]), st.booleans())
def test_random_functions(drawn: Any, mode: str, whole: bool) -> None:
    f, n = drawn
    x = torch.linspace(0.3, 1.2, n, dtype=torch.float64)
    plan = plan_jacobian(f, x, mode=mode, chunk_size=None if whole else 1)
    scalar = lambda x: (f(x) ** 2).sum()
    second = plan_hessian(scalar, x, chunk_size=None if whole else 2)
    for point in (x, 2 - x):
        torch.testing.assert_close(plan(point)[0].to_dense(), func_jacobian(f, point)[0])
        torch.testing.assert_close(second(point).to_dense(), func_hessian(scalar, point))


def test_numbers_opaque_arguments_and_argnums() -> None:
    x = torch.rand(4)
    plan = plan_jacobian(lambda a, s, word: a * s + len(word), x, 2, "abc")
    J, v, nothing = plan(x, 5.0, "abcd")
    assert torch.equal(J.to_dense(), 5 * torch.eye(4))
    assert torch.equal(v, x)
    assert nothing is None
    plan = plan_jacobian(lambda a, b: a * b, x, x, argnums=1)
    nothing, J = plan(x + 1, x)
    assert nothing is None
    torch.testing.assert_close(J.to_dense(), torch.diag(x + 1))
    assert torch.equal(plan_hessian(lambda s: s**3, 2)(5), torch.tensor(30.0))


def test_arrays_of_numpy() -> None:
    a = np.arange(1.0, 5.0)
    (J,) = plan_jacobian(torch.square, a)(a + 1)
    assert torch.equal(J.to_dense(), torch.diag(torch.tensor(2 * (a + 1))))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_params(mode: str) -> None:
    p, q = torch.rand(4), torch.rand(3)
    ps = Params([p, q])
    plan = plan_jacobian(lambda: p[1:] * q, ps, mode=mode)
    p.mul_(2)
    found = plan(ps)
    assert isinstance(found, tz.Grads)
    for x, E in zip((p, q), func_jacobian(lambda p, q: p[1:] * q, p, q), strict=True):
        torch.testing.assert_close(found[x].to_dense(), E)
    assert not p.requires_grad


def test_complex_arguments() -> None:
    z = torch.randn(4, dtype=torch.complex128)
    plan = plan_jacobian(lambda z: z.abs() ** 2, z)
    assert plan.mode == "reverse"
    torch.testing.assert_close(plan(2 * z)[0].to_dense(), torch.diag(4 * z))
    with pytest.raises(ValueError, match="by a complex argument; use 'reverse'"):
        plan_jacobian(lambda z: z.abs(), z, mode="forward")
    with pytest.raises(ValueError, match="real arguments"):
        plan_hessian(lambda z: z.abs().sum(), z)


@pytest.mark.parametrize(
    ("f", "shape", "rows"),
    [(lambda x: x * 2, (0,), 0), (lambda x: x[:0], (4,), 0), (lambda x: torch.ones(3), (4,), 3)],
)
def test_nothing_to_differentiate(f: Any, shape: tuple[int, ...], rows: int) -> None:
    x = torch.rand(shape)
    plan = plan_jacobian(f, x)
    assert plan.ncolors <= 1
    (J,) = plan(x)
    assert J.shape == (rows, x.numel())
    assert J.values().numel() == 0
    for g in (lambda x: x.sum(), lambda x: torch.ones(())):
        second = plan_hessian(g, x)
        assert second(x).values().numel() == 0
        assert torch.equal(second.diagonal(x), torch.zeros(shape))


@pytest.mark.parametrize("result", [np.arange(3.0), torch.arange(3), 2, 2.5])
def test_constants_of_other_types(result: Any) -> None:
    x = torch.rand(4)
    (J,) = plan_jacobian(lambda x: result, x)(x)
    assert J.shape == (np.asarray(result).size, 4)
    assert J.values().numel() == 0
    assert jacobian(lambda x: result, x, sparse=True)[0].shape == J.shape


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_with_autograd_switched_off(mode: str, switched_off: Any) -> None:
    x = torch.rand(6)
    plan, second = plan_jacobian(product, x, mode=mode), plan_hessian(rosenbrock, x)
    first, H = func_jacobian(product, x)[0], func_hessian(rosenbrock, x)
    with switched_off():
        torch.testing.assert_close(plan(x)[0].to_dense(), first)
        torch.testing.assert_close(plan_jacobian(product, x, mode=mode)(x)[0].to_dense(), first)
        torch.testing.assert_close(jacobian(product, x, sparse=True, mode=mode)[0].to_dense(), first)
        torch.testing.assert_close(second(x).to_dense(), H)
        torch.testing.assert_close(second.diagonal(x), H.diagonal())


@pytest.mark.parametrize("x", [torch.ones(1).expand(6), torch.rand(3, 2).t(), torch.rand(12)[::2]])
def test_any_layout_in_memory(x: Tensor) -> None:
    for mode in ("forward", "reverse"):
        (J,) = plan_jacobian(torch.square, torch.rand(x.shape), mode=mode)(x)
        torch.testing.assert_close(J.to_dense(), torch.diag(2 * x.reshape(-1)))


def test_a_structure_that_was_local_is_caught_elsewhere() -> None:
    plan = plan_jacobian(lambda x: x.sort().values, torch.tensor([3.0, 1.0, 2.0]))
    assert plan.patterns[0].is_local
    with pytest.warns(UserWarning, match=r"differs from plain .* most likely f takes another way here"):
        (J,) = plan(torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(J.to_dense(), torch.eye(3))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_random_function_is_drawn_once(mode: str) -> None:
    f = lambda x: torch.nn.functional.dropout(x, 0.5) * x.roll(1)
    x = torch.rand(20)
    plan = plan_jacobian(f, x, mode=mode)
    torch.manual_seed(3)
    y = f(x)
    after = torch.rand(1)
    torch.manual_seed(3)
    (J,) = plan(x)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(J.to_dense() @ x, 2 * y)  # it is quadratic


def test_from_several_threads() -> None:
    x = torch.rand(6, dtype=torch.float64)
    plans = [plan_jacobian(product, x, mode=mode) for mode in ("forward", "reverse")]
    second = plan_hessian(rosenbrock, x)

    def work(k: int) -> None:
        point = x + k
        for plan in plans:
            torch.testing.assert_close(
                plan(point)[0].to_dense(), torch.autograd.functional.jacobian(product, point)
            )
        expected = torch.autograd.functional.hessian(rosenbrock, point)
        torch.testing.assert_close(second(point).to_dense(), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(24)))


# ---- differentiable, nested --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_results_are_differentiable_where_they_must_be(mode: str) -> None:
    x = torch.rand(6, dtype=torch.float64)
    f = lambda x: x[1:] ** 3 * x[:-1]
    plan = plan_jacobian(f, x, mode=mode)
    expected = torch.func.grad(lambda x: (torch.func.jacrev(f)(x) ** 2).sum())(x)
    (got,) = gradient(lambda x: (plan(x)[0].values() ** 2).sum(), x)
    torch.testing.assert_close(got, expected)
    got = torch.func.grad(lambda x: (plan.values(x)[0] ** 2).sum())(x)
    torch.testing.assert_close(got, expected)
    y = x.clone().requires_grad_()
    (got,) = torch.autograd.grad((plan(y, create_graph=True)[0].values() ** 2).sum(), y)
    torch.testing.assert_close(got, expected)
    assert not plan(y)[0].requires_grad


def test_hessians_are_differentiable_where_they_must_be() -> None:
    x = torch.rand(6, dtype=torch.float64)
    plan = plan_hessian(rosenbrock, x)
    third = torch.func.grad(lambda x: (torch.func.hessian(rosenbrock)(x) ** 2).sum())(x)
    torch.testing.assert_close(gradient(lambda x: (plan(x).values() ** 2).sum(), x)[0], third)
    torch.testing.assert_close(torch.func.grad(lambda x: (plan.values(x) ** 2).sum())(x), third)
    diagonal = torch.func.grad(lambda x: torch.func.hessian(rosenbrock)(x).diagonal().sin().sum())(x)
    torch.testing.assert_close(gradient(lambda x: plan.diagonal(x).sin().sum(), x)[0], diagonal)


def test_under_vmap() -> None:
    xs = torch.rand(3, 6, dtype=torch.float64)
    plan, second = plan_jacobian(product, xs[0]), plan_hessian(rosenbrock, xs[0])
    expected = torch.func.vmap(torch.func.jacrev(product))(xs)
    torch.testing.assert_close(torch.func.vmap(lambda x: plan(x, dense=True)[0])(xs), expected)
    torch.testing.assert_close(
        torch.func.vmap(lambda x: plan.values(x)[0])(xs), expected[:, plan.sparsity[0].to_dense()]
    )
    expected = torch.func.vmap(torch.func.hessian(rosenbrock))(xs)
    torch.testing.assert_close(torch.func.vmap(lambda x: second(x, dense=True))(xs), expected)
    second.diagonal(xs[0])
    torch.testing.assert_close(torch.func.vmap(second.diagonal)(xs), expected.diagonal(dim1=1, dim2=2))
    with pytest.raises(RuntimeError, match=r"JacobianPlan: sparse=True can't be had.*values\(\.\.\.\)"):
        torch.func.vmap(lambda x: plan(x)[0])(xs)


# ---- what a plan shows -------------------------------------------------------------------------------------


def test_attributes() -> None:
    plan = plan_jacobian(product, torch.rand(6))
    assert plan.ncolors == 2
    assert plan.mode in ("forward", "reverse")
    assert plan.colors.dtype == torch.int64
    assert plan.colors.tolist() in ([0, 1] * 3, [0, 1, 0, 1, 0])
    (sparsity,) = plan.sparsity
    assert sparsity.layout == torch.sparse_csr
    assert sparsity.dtype == torch.bool
    assert torch.equal(sparsity.to_dense(), BAND.bool())
    second = plan_hessian(rosenbrock, torch.rand(6))
    assert second.mode == "symmetric"
    assert second.ncolors == 3
    assert torch.equal(second.sparsity.to_dense(), func_hessian(rosenbrock, torch.rand(6)) != 0)


def test_a_hessian_of_nothing() -> None:
    nothing = torch.empty(0, 3)
    plan = plan_hessian(lambda x: (x**2).sum(), nothing)
    assert plan(nothing).shape == (0, 0)
    assert plan.diagonal(nothing).shape == (0, 3)
    assert plan.diagonal(nothing.double()).dtype == torch.float64
    with pytest.raises(ValueError, match="shape"):
        plan.diagonal(torch.empty(0, 4))
    rows = torch.func.vmap(plan.diagonal)(torch.empty(2, 0, 3))
    assert rows.shape == (2, 0, 3)


def test_each_shows_itself_in_a_few_lines() -> None:
    plan = plan_jacobian(product, torch.rand(200))
    lines = repr(plan).split("\n")
    assert lines[0] == f"JacobianPlan: 199×200, 398 nonzeros (0.01), 2 colors, mode {plan.mode!r}"
    assert 1 < len(lines) <= 10
    assert all(set(line) <= {chr(c) for c in range(0x2800, 0x2900)} for line in lines[1:])
    assert lines[1][0] != "⠀"
    assert lines[1][-1] == "⠀"
    assert repr(plan.patterns[0]).split("\n")[0] == "Pattern 199×200, 398 nonzeros (0.01)"
    assert repr(plan.patterns[0]).split("\n")[1:] == lines[1:]
    two = plan_jacobian(lambda a, b: a * b, torch.rand(3), torch.rand(3))
    assert repr(two).startswith("JacobianPlan: 3×3|3, 6 nonzeros (0.33), 1 color, ")
    second = plan_hessian(lambda x: x.logsumexp(0), torch.rand(4))
    assert repr(second).startswith("HessianPlan: 4×4, 16 nonzeros (1), 4 colors, mode 'symmetric'")


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_spy_draws(ending: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    a, b = torch.rand(90), torch.rand(90)
    for plan in (
        plan_jacobian(lambda a, b: a * b.roll(1), a, b),
        plan_hessian(rosenbrock, a),
        plan_jacobian(lambda a: a[:0], a),
    ):
        path = tmp_path / f"{type(plan).__name__}.{ending}"
        figure = plan.spy(path)
        assert path.stat().st_size > 2000
        assert figure.get_suptitle().replace("\n", " ") == repr(plan).split("\n")[0]
    assert isinstance(plan, (JacobianPlan, HessianPlan))


def test_entries_of_one_color_are_drawn_in_one_color() -> None:
    pytest.importorskip("matplotlib")
    plan = plan_jacobian(product, torch.rand(6), mode="forward")
    (axes,) = plan.spy().axes
    image = axes.images[0].get_array()
    for row, column in BAND.nonzero().tolist():
        assert tuple(image[row, column]) == tuple(image[0, int(plan.colors[column])])
    assert tuple(image[0, 0]) != tuple(image[0, 1])
    assert (image[0, 2:] > 0.95).all()


def test_jacobian_and_plan_agree_on_what_is_listed() -> None:
    x = torch.rand(8)
    (J,) = jacobian(product, x, sparse=True)
    (K,) = plan_jacobian(product, x)(x)
    assert torch.equal(J.crow_indices(), K.crow_indices())
    assert torch.equal(J.col_indices(), K.col_indices())
