"""``sparse=True``: the same numbers as the dense way, listed where the structure allows them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import fd_hessian, func_hessian, func_jacobian
from sparse_cases import HESSIANS, JACOBIANS, heat, inputs, rosenbrock, sparse_functions
from torch import Tensor

import torchzygote as tz
from torchzygote import (
    Params,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    withhessian,
    withjacobian,
)

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("name", JACOBIANS)
def test_a_sparse_jacobian_has_the_dense_ones_values(name: str, mode: str, dtype: torch.dtype) -> None:
    f, shapes = JACOBIANS[name]
    xs = inputs(shapes, dtype)
    found = jacobian(f, *xs, sparse=True, mode=mode)
    for x, J, plain, expected in zip(xs, found, jacobian(f, *xs), func_jacobian(f, *xs), strict=True):
        assert J.layout == (torch.sparse_csr if x.dim() > 0 else torch.strided)
        assert J.shape == plain.shape
        torch.testing.assert_close(J.to_dense(), expected.reshape(plain.shape))
        torch.testing.assert_close(J.to_dense(), plain)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", [hessian, hessian_dual, hessian_reverse])
@pytest.mark.parametrize("name", HESSIANS)
def test_a_sparse_hessian_has_the_dense_ones_values(name: str, way: Any, dtype: torch.dtype) -> None:
    f, shape = HESSIANS[name]
    (x,) = inputs([shape], dtype)
    H = way(f, x, sparse=True)
    assert H.layout == torch.sparse_csr
    torch.testing.assert_close(H.to_dense(), func_hessian(f, x))
    torch.testing.assert_close(H.to_dense(), way(f, x))


@pytest.mark.parametrize("name", ["band", "grid", "elementwise", "wide", "two arguments"])
def test_only_what_the_structure_allows_is_listed(name: str) -> None:
    f, shapes = JACOBIANS[name]
    xs = inputs(shapes, torch.float64)
    for J, expected in zip(jacobian(f, *xs, sparse=True), func_jacobian(f, *xs), strict=True):
        assert J.values().numel() == int((expected != 0).sum())


def test_what_is_found_to_be_full_is_not_colored(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a full pattern needs no coloring")

    monkeypatch.setattr(tz._compressed, "symmetric_recovery", refuse)
    monkeypatch.setattr(tz._compressed, "jacobian_recovery", refuse)
    x = torch.rand(30, dtype=torch.float64)
    f = lambda x: torch.logsumexp(x, 0)
    found = hessian(f, x, sparse=True)
    assert found.layout == torch.sparse_csr
    torch.testing.assert_close(found.to_dense(), func_hessian(f, x))
    (found,) = jacobian(lambda x: x.softmax(0), x, sparse=True)
    torch.testing.assert_close(found.to_dense(), func_jacobian(lambda x: x.softmax(0), x)[0])


def test_value_and_gradient_come_along() -> None:
    x = torch.rand(6)
    val, (J,) = withjacobian(lambda x: x[1:] * x[:-1], x, sparse=True)
    assert torch.equal(val, x[1:] * x[:-1])
    assert J.layout == torch.sparse_csr
    found = withhessian(rosenbrock, x, sparse=True)
    torch.testing.assert_close(found.val, rosenbrock(x))
    torch.testing.assert_close(found.grad, torch.func.grad(rosenbrock)(x))
    torch.testing.assert_close(found.hess.to_dense(), func_hessian(rosenbrock, x))


@pytest.mark.parametrize("way", [hessian_dual, hessian_reverse])
def test_second_order_against_finite_differences(way: Any) -> None:
    x = torch.rand(6, dtype=torch.float64)
    expected = fd_hessian(rosenbrock, x)
    torch.testing.assert_close(way(rosenbrock, x, sparse=True).to_dense(), expected, atol=1e-3, rtol=1e-4)


# ---- arguments ---------------------------------------------------------------------------------------------


def test_a_number_has_a_dense_vector() -> None:
    x = torch.rand(5)
    J, v, nothing = jacobian(lambda a, s, word: a * s + len(word), x, 3, "abc", sparse=True)
    assert J.layout == torch.sparse_csr
    assert torch.equal(v, x)
    assert nothing is None
    assert torch.equal(hessian(lambda s: s**3, 2, sparse=True), torch.tensor(12.0))


def test_arrays_of_numpy_and_integers() -> None:
    a = np.arange(1.0, 5.0)
    (J,) = jacobian(lambda a: a**2, a, sparse=True)
    assert J.dtype == torch.float64
    assert torch.equal(J.to_dense(), torch.diag(torch.tensor(2 * a)))
    (J,) = jacobian(lambda a: a**2, torch.arange(3), sparse=True)
    assert J.dtype == torch.float32
    assert torch.equal(J.to_dense(), torch.diag(torch.tensor([0.0, 2.0, 4.0])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    x = torch.rand(20).to(dtype)
    f = lambda x: x[1:] * x[:-1]
    assert torch.equal(jacobian(f, x, sparse=True)[0].to_dense(), jacobian(f, x)[0])


def test_arguments_of_different_dtypes() -> None:
    a, b = torch.rand(4), torch.rand(4, dtype=torch.float64)
    for mode in ("forward", "reverse"):
        found = jacobian(lambda a, b: a * b, a, b, sparse=True, mode=mode)
        assert [J.dtype for J in found] == [torch.float64, torch.float64]
        torch.testing.assert_close(found[0].to_dense(), torch.diag(b))
        torch.testing.assert_close(found[1].to_dense(), torch.diag(a.double()))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_arguments_of_real_functions(dtype: torch.dtype) -> None:
    z = torch.randn(5, dtype=dtype)
    f = lambda z: z[1:].abs() ** 2 + z[:-1].real
    (J,) = jacobian(f, z, sparse=True)
    assert J.dtype == dtype
    expected = torch.zeros(4, 5, dtype=dtype)
    for k in range(4):  # df/d(re) + i df/d(im)
        expected[k, k + 1] = 2 * z[k + 1]
        expected[k, k] += 1
    torch.testing.assert_close(J.to_dense(), expected)
    with pytest.raises(ValueError, match="'forward' gives no Jacobian by a complex argument"):
        jacobian(f, z, sparse=True, mode="forward")


def test_complex_results_are_refused() -> None:
    with pytest.raises(ValueError, match="real values"):
        jacobian(lambda x: x * 1j, torch.rand(3), sparse=True)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_params(mode: str) -> None:
    xs, ys = torch.rand(2, 3), torch.rand(5)
    ps = Params([xs, ys])
    found = jacobian(lambda: ys[:3] * xs[0] ** 2, ps, sparse=True, mode=mode)
    expected = func_jacobian(lambda xs, ys: ys[:3] * xs[0] ** 2, xs, ys)
    assert isinstance(found, tz.Grads)
    for p, E in zip((xs, ys), expected, strict=True):
        assert found[p].layout == torch.sparse_csr
        assert found[p].values().numel() == 3
        torch.testing.assert_close(found[p].to_dense(), E)
    assert not xs.requires_grad


def test_argnums() -> None:
    a, b = torch.rand(4), torch.rand(4)
    found = jacobian(lambda a, b: a * b, a, b, sparse=True, argnums=1)
    assert found[0] is None
    torch.testing.assert_close(found[1].to_dense(), torch.diag(a))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
def test_chunks_and_progress(mode: str, chunk_size: int, capsys: pytest.CaptureFixture[str]) -> None:
    u = torch.rand(6, 6, dtype=torch.float64)
    found = jacobian(heat, u, sparse=True, mode=mode, chunk_size=chunk_size, progress=True)[0]
    torch.testing.assert_close(found.to_dense(), func_jacobian(heat, u)[0])
    assert "100%" in capsys.readouterr().err
    found = hessian(lambda u: (heat(u) ** 2).sum(), u, sparse=True, chunk_size=chunk_size)
    torch.testing.assert_close(found.to_dense(), func_hessian(lambda u: (heat(u) ** 2).sum(), u))


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunks_of_nothing_are_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match="chunk_size"):
        jacobian(torch.sin, torch.rand(3), sparse=True, chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("f", "shape", "rows"),
    [
        (lambda x: x * 2, (0,), 0),
        (lambda x: x[:0], (4,), 0),
        (lambda x: torch.ones(3), (4,), 3),
        (lambda x: torch.tensor([1, 2]), (4,), 2),
        (lambda x: 5, (4,), 1),
        (lambda x: torch.ones(3), (0, 2), 3),
    ],
)
def test_nothing_to_differentiate_is_an_empty_matrix(f: Any, shape: tuple[int, ...], rows: int) -> None:
    x = torch.rand(shape)
    (J,) = jacobian(f, x, sparse=True)
    assert J.layout == torch.sparse_csr
    assert J.shape == (rows, x.numel())
    assert J.values().numel() == 0
    assert torch.equal(J.to_dense(), jacobian(f, x)[0])


@pytest.mark.parametrize("f", [lambda x: (x**2).sum(), lambda x: x.sum(), lambda x: torch.ones(())])
def test_hessians_without_entries(f: Any) -> None:
    H = hessian(f, torch.rand(0), sparse=True)
    assert H.layout == torch.sparse_csr
    assert H.shape == (0, 0)


# ---- differentiable, nested --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_create_graph_makes_values_differentiable(mode: str) -> None:
    x = torch.rand(6, dtype=torch.float64).requires_grad_()
    f = lambda x: x[1:] ** 3 * x[:-1]
    (J,) = jacobian(f, x, sparse=True, mode=mode, create_graph=True)
    (got,) = torch.autograd.grad((J.values() ** 2).sum(), x)
    expected = torch.func.grad(lambda x: (torch.func.jacrev(f)(x) ** 2).sum())(x.detach())
    torch.testing.assert_close(got, expected)
    assert not jacobian(f, x, sparse=True)[0].requires_grad


@pytest.mark.parametrize("way", [hessian, hessian_dual, hessian_reverse])
def test_inside_an_outer_gradient_results_are_differentiable(way: Any) -> None:
    x = torch.rand(6, dtype=torch.float64)
    f = lambda x: (x[1:] ** 3 * x[:-1] ** 2).sum()
    (got,) = gradient(lambda x: (way(f, x, sparse=True).to_dense() ** 2).sum(), x)
    expected = torch.func.grad(lambda x: (torch.func.hessian(f)(x) ** 2).sum())(x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["grad", "jacfwd", "jacrev", "vmap"])
def test_inside_torch_func_it_is_refused(name: str) -> None:
    call = lambda x: jacobian(torch.sin, x, sparse=True)[0].values().sum()
    with pytest.raises(RuntimeError, match="sparse=True can't be had inside a torch.func transform"):
        getattr(torch.func, name)(call)(torch.rand(3))


def test_hessians_inside_torch_func_are_refused() -> None:
    f = lambda x: hessian(lambda x: x.exp().sum(), x, sparse=True).values()
    with pytest.raises(RuntimeError, match="sparse=True can't be had.*plan_hessian"):
        torch.func.vmap(f)(torch.rand(2, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_inside_torch_compile_it_is_refused(fullgraph: bool) -> None:
    call = lambda x: jacobian(torch.sin, x, sparse=True)[0]
    compiled = torch.compile(call, backend="eager", fullgraph=fullgraph)
    with pytest.raises(RuntimeError, match="sparse=True can't be had inside"):
        compiled(torch.rand(3))


@pytest.mark.parametrize("mode", ["auto", "reverse_over_reverse", "forward_over_reverse"])
@pytest.mark.parametrize("constant", [5, 5.0, True, np.float64(2), np.ones(()), torch.tensor(1.0)])
def test_the_hessian_of_a_constant_lists_nothing(constant: Any, mode: str) -> None:
    n = 200_000  # a dense matrix would not fit into memory
    H = hessian(lambda x: constant, torch.ones(n), sparse=True, mode=mode)
    assert H.layout == torch.sparse_csr
    assert H.shape == (n, n)
    assert H.dtype == torch.float32
    assert H.values().numel() == 0
    value, grad, H = withhessian(lambda x: constant, torch.ones(3), sparse=True, mode=mode)
    assert value is constant
    assert torch.equal(grad, torch.zeros(3))
    assert torch.equal(H.to_dense(), torch.zeros(3, 3))


@pytest.mark.parametrize("second", [1.0, 2, np.float64(2), np.ones(()), torch.tensor(1.0)])
def test_a_number_counts_as_one_element(second: Any) -> None:
    """What another run returns is compared by its number of elements, not by its type."""
    runs: list[Tensor] = []

    def f(x: Tensor) -> Any:
        runs.append(x)
        return (x**2).sum() if len(runs) == 1 else second

    x = torch.ones(3)
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        H = hessian(f, x, sparse=True)
    torch.testing.assert_close(H.to_dense(), 2 * torch.eye(3))
    runs.clear()
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        (J,) = jacobian(f, x, sparse=True, mode="reverse")
    torch.testing.assert_close(J.to_dense(), 2 * torch.ones(1, 3))


def test_hooks_act_on_a_sparse_result_as_on_a_dense_one() -> None:
    x = torch.rand(5)
    f = lambda x: tz.hook(lambda g: 2 * g, x.clone())[1:] * x[:-1]
    (J,) = jacobian(f, x, sparse=True, mode="reverse")
    torch.testing.assert_close(J.to_dense(), jacobian(f, x, mode="reverse")[0])


# ---- random structures -------------------------------------------------------------------------------------


@given(sparse_functions(), st.sampled_from(["auto", "forward", "reverse"]))
def test_random_functions(drawn: tuple[Callable[[Tensor], Tensor], int], mode: str) -> None:
    f, n = drawn
    x = torch.linspace(0.3, 1.2, n, dtype=torch.float64)
    (J,) = jacobian(f, x, sparse=True, mode=mode)
    torch.testing.assert_close(J.to_dense(), func_jacobian(f, x)[0])
    scalar = lambda x: (f(x) ** 2).sum()
    expected = func_hessian(scalar, x)
    torch.testing.assert_close(hessian(scalar, x, sparse=True).to_dense(), expected)
    torch.testing.assert_close(diaghessian(scalar, x)[0], expected.diagonal())


# ---- warnings ----------------------------------------------------------------------------------------------


def test_no_beta_warning_of_pytorch_escapes() -> None:
    """PyTorch warns once per process, so it takes a fresh one."""
    code = """
import torch, torchzygote as tz
x = torch.rand(5)
f = lambda x: x[1:] * x[:-1]
tz.jacobian(f, x, sparse=True)
tz.jacobian(lambda x: x.softmax(0), x, sparse=True)
tz.jacobian(lambda x: torch.ones(2), x, sparse=True)
tz.hessian(lambda x: f(x).sum(), x, sparse=True)
tz.jacobian_sparsity(f, x)
plan = tz.plan_jacobian(f, x)
plan(x), plan.sparsity
plan = tz.plan_hessian(lambda x: f(x).sum(), x)
plan(x), plan.sparsity
print("silent")
"""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "silent", done.stderr
