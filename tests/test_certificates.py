"""Compressed results are checked: wrong structure from anywhere ends in the dense answer and a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import func_hessian, func_jacobian
from torch import Tensor

from torchzygote import (
    Params,
    _certificate,
    _compressed,
    _products,
    _stencil_sums,
    _structure_heuristics,
    diaghessian,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    jacobian,
    plan_hessian,
    plan_jacobian,
)
from torchzygote.sparsity.rules import RULES
from torchzygote.sparsity.rules._table import LINEAR, Call, Context, Rule, zero_ids

N = 12
MISMATCH = "differs from plain automatic differentiation in a product with a random vector"


def f(x: Tensor) -> Tensor:
    return x[1:].sin() * x[:-1]


def scalar(x: Tensor) -> Tensor:
    return (f(x) ** 2).sum()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(N, dtype=torch.float64) + 0.5


@pytest.fixture
def eager_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Structure is looked for in problems of any size."""
    for threshold in ("_WORTH_LOOKING", "_WORTH_LOOKING_LOCAL", "_WORTH_LOOKING_NODE"):
        monkeypatch.setattr(_structure_heuristics, threshold, 0)
    monkeypatch.setattr(_stencil_sums, "_attempt", lambda way: None)  # which takes no products


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products each chunk had."""
    counts: list[int] = []
    original = {name: getattr(_products, name) for name in ("vjps", "jvps")}

    def counted(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            for lo, hi, chunk in original[name](*args, **kwargs):
                counts.append(hi - lo)
                yield lo, hi, chunk

        return run

    for name in original:
        monkeypatch.setattr(_products, name, counted(name))
    return counts


# ---- a wrong rule ------------------------------------------------------------------------------------------


def loses_an_operand(ctx: Context, call: Call) -> Any:
    """A product that forgets its second operand, and that its operands are coupled."""
    return ctx.unite(zero_ids(call.shape), ctx.ids(call["self"]))


def loses_everything(ctx: Context, call: Call) -> Any:
    return zero_ids(call.shape)


WRONG = {
    "mul": Rule(loses_an_operand, LINEAR),
    "sin": Rule(loses_everything, LINEAR),
}


@pytest.fixture(params=WRONG)
def wrong_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(RULES, request.param, WRONG[request.param])
    name: str = request.param
    return name


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_a_wrong_rule_is_caught_in_a_sparse_jacobian(wrong_rule: str, mode: str, x: Tensor) -> None:
    with pytest.warns(UserWarning, match=rf"jacobian: .*{MISMATCH}.*please report.*\b{wrong_rule}\b"):
        (J,) = jacobian(f, x, sparse=True, mode=mode)
    assert J.layout == torch.sparse_csr
    torch.testing.assert_close(J.to_dense(), func_jacobian(f, x)[0])


@pytest.mark.parametrize("way", [hessian, hessian_dual, hessian_reverse])
def test_a_wrong_rule_is_caught_in_a_sparse_hessian(wrong_rule: str, way: Any, x: Tensor) -> None:
    with pytest.warns(UserWarning, match=rf"{way.__name__}: .*{MISMATCH}.*\b{wrong_rule}\b"):
        H = way(scalar, x, sparse=True)
    assert H.layout == torch.sparse_csr
    torch.testing.assert_close(H.to_dense(), func_hessian(scalar, x))


@pytest.mark.usefixtures("eager_to_look")
def test_a_wrong_rule_is_caught_where_structure_is_used_unasked(wrong_rule: str) -> None:
    x = torch.rand(200, dtype=torch.float64) + 0.5
    with pytest.warns(UserWarning, match=rf"jacobian: .*{MISMATCH}.*\b{wrong_rule}\b"):
        (J,) = jacobian(f, x)
    torch.testing.assert_close(J, func_jacobian(f, x)[0])
    with pytest.warns(UserWarning, match=rf"hessian: .*{MISMATCH}.*\b{wrong_rule}\b"):
        H = hessian(scalar, x)
    torch.testing.assert_close(H, func_hessian(scalar, x))
    with pytest.warns(UserWarning, match=rf"diaghessian: .*{MISMATCH}.*\b{wrong_rule}\b"):
        (d,) = diaghessian(scalar, x)
    torch.testing.assert_close(d, func_hessian(scalar, x).diagonal())


def test_a_wrong_rule_is_caught_by_plans(wrong_rule: str, x: Tensor) -> None:
    first, second = plan_jacobian(f, x), plan_hessian(scalar, x)
    for point in (x, x + 1):
        with pytest.warns(UserWarning, match=rf"JacobianPlan: .*{MISMATCH}.*\b{wrong_rule}\b"):
            (J,) = first(point)
        torch.testing.assert_close(J.to_dense(), func_jacobian(f, point)[0])
        with pytest.warns(UserWarning, match=rf"HessianPlan: .*{MISMATCH}.*\b{wrong_rule}\b"):
            H = second(point)
        torch.testing.assert_close(H.to_dense(), func_hessian(scalar, point))
        with pytest.warns(UserWarning, match=rf"HessianPlan: .*{MISMATCH}"):
            d = second.diagonal(point)
        torch.testing.assert_close(d, func_hessian(scalar, point).diagonal())
    with pytest.raises(RuntimeError, match="contradicts the values"):
        first.values(x)
    with pytest.raises(RuntimeError, match="contradicts the values"):
        second.values(x)


@pytest.mark.usefixtures("wrong_rule")
def test_a_wrong_rule_under_a_transform_gives_nan(x: Tensor) -> None:
    first, second = plan_jacobian(f, x), plan_hessian(scalar, x)
    assert torch.func.vmap(lambda x: first.values(x)[0])(torch.stack([x, x])).isnan().all()
    assert torch.func.vmap(second.values)(torch.stack([x, x])).isnan().all()


# ---- structure that was given ------------------------------------------------------------------------------


def test_a_given_structure_that_is_too_small_is_caught(x: Tensor) -> None:
    with pytest.warns(UserWarning, match="a sparsity that was given lacks entries"):
        (J,) = plan_jacobian(f, x, sparsity=torch.eye(N - 1, N))(x)
    torch.testing.assert_close(J.to_dense(), func_jacobian(f, x)[0])
    with pytest.warns(UserWarning, match=MISMATCH):
        H = plan_hessian(scalar, x, sparsity=torch.eye(N))(x)
    torch.testing.assert_close(H.to_dense(), func_hessian(scalar, x))


@pytest.mark.parametrize("missing", range(2 * (N - 1)))
def test_each_single_entry_that_lacks_is_noticed(missing: int, x: Tensor) -> None:
    entries = func_jacobian(f, x)[0].nonzero()
    kept = torch.cat([entries[:missing], entries[missing + 1 :]])
    sparsity = torch.zeros(N - 1, N)
    sparsity[kept[:, 0], kept[:, 1]] = 1
    for mode in ("forward", "reverse"):
        with pytest.warns(UserWarning, match=MISMATCH):
            (J,) = plan_jacobian(f, x, sparsity=sparsity, mode=mode)(x)
        torch.testing.assert_close(J.to_dense(), func_jacobian(f, x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_right_structure_is_never_doubted(dtype: torch.dtype) -> None:
    """Values of very different sizes, and sums that cancel."""
    scale = torch.logspace(-8, 8, 40, dtype=dtype)
    f = lambda x: (scale * x)[1:].sin() * x[:-1] - 1e4 * x[1:] + 1e4 * x[1:]
    for seed in range(20):
        x = torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for mode in ("forward", "reverse"):
                torch.testing.assert_close(
                    jacobian(f, x, sparse=True, mode=mode)[0].to_dense(), jacobian(f, x, mode=mode)[0]
                )
            hessian(lambda x: (f(x) * x[1:]).sum(), x, sparse=True)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_derivatives_that_break_down_do_so_as_in_the_dense_way(value: float) -> None:
    x = torch.tensor([1.0, value, 4.0])
    (J,) = jacobian(torch.sqrt, x, sparse=True)
    assert torch.equal(J.values().isfinite(), torch.tensor([True, value == float("inf"), True]))


# ---- a function that isn't one -----------------------------------------------------------------------------


def impure(change: Callable[[int, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    calls = [0]

    def g(x: Tensor) -> Tensor:
        calls[0] += 1
        return change(calls[0], x)

    return g


def test_a_function_that_uses_other_elements_in_each_call_is_caught(x: Tensor) -> None:
    g = impure(lambda call, x: (x * x.roll(call)) if call % 2 else x**2)
    with pytest.warns(UserWarning, match="f differs from call to call"):
        (J,) = jacobian(g, x, sparse=True)
    torch.testing.assert_close(J.to_dense(), func_jacobian(lambda x: x * x.roll(1), x)[0])


def test_a_random_function_is_drawn_once(x: Tensor) -> None:
    g = lambda x: torch.nn.functional.dropout(x, 0.5) * x
    torch.manual_seed(3)
    val = g(x)
    after = torch.rand(1)
    torch.manual_seed(3)
    (J,) = jacobian(g, x, sparse=True)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(J.to_dense(), torch.diag(2 * val / x))


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_a_function_that_returns_another_shape_in_the_next_call(mode: str, x: Tensor) -> None:
    g = impure(lambda call, x: x[call:] * x[call - 1 : -1])
    with pytest.raises(ValueError, match=f"jacobian: expected f to return the same shape.*{N - 1} elements"):
        jacobian(g, x, sparse=True, mode=mode)
    with pytest.raises(ValueError, match=f"expected f to return {N - 1} elements.*got {N - 2}"):
        plan_jacobian(impure(lambda call, x: x[call:] * x[call - 1 : -1]), x)(x)
    h = impure(lambda call, x: x.exp().sum() if call == 1 else x.exp())
    with pytest.raises(ValueError, match="hessian: expected f to return the same shape"):
        hessian(h, x, sparse=True)
    h = impure(lambda call, x: x.exp().sum() if call == 1 else x.exp())
    with pytest.raises(ValueError, match="scalar"):
        plan_hessian(h, x)(x)


@pytest.mark.usefixtures("eager_to_look")
def test_nobody_notices_that_where_structure_was_not_asked_for(x: Tensor) -> None:
    g = impure(lambda call, x: x[call:] * x[call - 1 : -1])
    torch.testing.assert_close(jacobian(g, x)[0], func_jacobian(lambda x: x[1:] * x[:-1], x)[0])


# ---- verify=False ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_without_the_check_there_is_one_product_less(products: list[int], mode: str, x: Tensor) -> None:
    jacobian(f, x, sparse=True, mode=mode)
    assert products == ([3] if mode == "reverse" else [2])  # a pushforward is compared with a plain pullback
    products.clear()
    (J,) = jacobian(f, x, sparse=True, mode=mode, verify=False)
    assert products == [2]
    torch.testing.assert_close(J.to_dense(), func_jacobian(f, x)[0])
    for verify in (True, False):
        plan = plan_jacobian(f, x, mode=mode, verify=verify)
        products.clear()
        plan(x)
        assert products == [2 + verify]


@pytest.mark.parametrize("way", [hessian_dual, hessian_reverse])
def test_nor_for_hessians(products: list[int], way: Any, x: Tensor) -> None:
    way(scalar, x, sparse=True)
    assert products == [4]
    products.clear()
    way(scalar, x, sparse=True, verify=False)
    assert products == [3]
    for verify in (True, False):
        plan = plan_hessian(scalar, x, verify=verify)
        products.clear()
        plan(x)
        assert products == [3 + verify]
        products.clear()
        plan.diagonal(x)
        assert products == [4 if verify else 2]  # the columns of each color are checked by themselves


def test_without_the_check_nothing_is_caught(x: Tensor) -> None:
    (J,) = plan_jacobian(f, x, sparsity=torch.eye(N - 1, N), verify=False)(x)
    assert J.values().numel() == N - 1


# ---- unasked -----------------------------------------------------------------------------------------------


def stencil(u: Tensor) -> Tensor:
    """The Brusselator's first component, with its second one held."""
    around = u.roll(1, 0) + u.roll(-1, 0) + u.roll(1, 1) + u.roll(-1, 1)
    return 1 + u**2 * 3 - 4.4 * u + 0.1 * (around - 4 * u)


@pytest.mark.usefixtures("eager_to_look")
@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
def test_large_stencils_are_compressed_unasked(products: list[int], mode: str) -> None:
    u = torch.rand(20, 20, dtype=torch.float64)
    (J,) = jacobian(stencil, u, mode=mode)
    assert J.layout == torch.strided
    assert sum(products) <= 10  # 400 in the dense way
    torch.testing.assert_close(J, func_jacobian(stencil, u)[0])


@pytest.mark.usefixtures("eager_to_look")
def test_large_hessians_are_compressed_unasked(products: list[int]) -> None:
    u = torch.rand(20, 20, dtype=torch.float64)
    energy = lambda u: (stencil(u) ** 2).sum()
    expected = func_hessian(energy, u)
    for way in (hessian, hessian_dual, hessian_reverse):
        products.clear()
        H = way(energy, u)
        assert sum(products) <= 40
        torch.testing.assert_close(H, expected)
    products.clear()
    (d,) = diaghessian(energy, u)
    assert sum(products) <= 40
    torch.testing.assert_close(d, expected.diagonal().reshape(u.shape))


@pytest.mark.usefixtures("eager_to_look")
def test_several_arguments_are_compressed_together(products: list[int]) -> None:
    u, v = torch.rand(2, 15, 15, dtype=torch.float64)
    g = lambda u, v: stencil(u) * v
    found = jacobian(g, u, v)
    assert sum(products) <= 12
    for J, expected in zip(found, func_jacobian(g, u, v), strict=True):
        torch.testing.assert_close(J, expected)


@pytest.mark.usefixtures("eager_to_look")
def test_compressed_results_are_differentiable(products: list[int]) -> None:
    u = torch.rand(8, 8, dtype=torch.float64)
    (got,) = gradient(lambda u: (jacobian(stencil, u)[0] ** 2).sum(), u)
    assert sum(products) < 64
    expected = torch.func.grad(lambda u: (torch.func.jacrev(stencil)(u) ** 2).sum())(u)
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("eager_to_look")
def test_params_are_compressed_too(products: list[int]) -> None:
    u, v = torch.rand(2, 15, 15, dtype=torch.float64)
    ps = Params([u, v])
    found = jacobian(lambda: stencil(u) * v, ps)
    assert sum(products) <= 12
    for p, expected in zip((u, v), func_jacobian(lambda u, v: stencil(u) * v, u, v), strict=True):
        torch.testing.assert_close(found[p], expected)
    products.clear()
    d = diaghessian(lambda: (stencil(u) ** 2 * v).sum(), ps)[u]
    assert sum(products) <= 60
    expected = func_hessian(lambda u: (stencil(u) ** 2 * v).sum(), u)
    torch.testing.assert_close(d.reshape(-1), expected.diagonal())


@pytest.fixture
def no_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("structure is looked for")

    monkeypatch.setattr(_compressed._structure, "jacobian_patterns", fail)
    monkeypatch.setattr(_compressed._structure, "hessian_patterns", fail)


@pytest.mark.usefixtures("no_detection")
def test_small_problems_are_not_looked_at(x: Tensor) -> None:
    jacobian(f, x)
    jacobian(stencil, torch.rand(10, 10))
    jacobian(lambda x: x.softmax(0), torch.rand(100))
    hessian(scalar, x)
    hessian(scalar, torch.rand(100))
    diaghessian(scalar, x)
    diaghessian(scalar, torch.rand(100))


@pytest.mark.usefixtures("no_detection")
def test_nor_are_large_ones_within_torch_func() -> None:
    x = torch.rand(3000)
    torch.func.grad(lambda s: jacobian(lambda y: s * y[1:] * y[:-1], x)[0].sum())(torch.tensor(1.0))


def test_a_large_problem_is_compressed_at_the_thresholds_as_they_are(products: list[int]) -> None:
    u = torch.rand(60, 60, dtype=torch.float64)
    (J,) = jacobian(stencil, u)
    assert sum(products) <= 10  # 3600 in the dense way
    entries = J.nonzero()
    assert len(entries) == 5 * 3600
    v = torch.randn(3600, dtype=torch.float64)
    torch.testing.assert_close(J @ v, torch.func.jvp(stencil, (u,), (v.view(60, 60),))[1].reshape(-1))


@pytest.mark.parametrize("at", [0, 40_000, 99_999])
def test_one_element_of_many_that_differs_is_not_plain(at: int) -> None:
    """They are compared part by part."""
    wanted = torch.linspace(1, 2, 100_000, dtype=torch.float64)
    got = wanted.clone()
    assert _certificate.is_plain(got, wanted, 2.2e-16)
    got[at] *= 1.01
    assert not _certificate.is_plain(got, wanted, 2.2e-16)


SPECIAL = [
    (1.0, 1.0, True),
    (1.0, 1.001, False),
    (0.0, 0.0, True),
    (0.0, 1e-300, False),
    (float("nan"), float("nan"), False),
    (float("inf"), float("inf"), False),
    (float("inf"), 1.0, False),
    (1.0, float("inf"), False),
    (1e308, -1e308, False),
]


@pytest.mark.parametrize("numel", [2, 100])
@pytest.mark.parametrize(("a", "b", "agree"), SPECIAL)
def test_few_numbers_are_compared_as_many_are(a: float, b: float, agree: bool, numel: int) -> None:
    got, wanted = torch.full((2, numel), 0.5).double(), torch.full((2, numel), 0.5).double()
    got[1, -1], wanted[1, -1] = a, b
    assert _certificate.is_plain(got, wanted, 2.2e-16) is agree


@pytest.mark.parametrize("numel", [2, 100])
def test_zeros_without_memory_are_compared_too(numel: int) -> None:
    zeros = torch._efficientzerotensor((numel,))
    assert _certificate.is_plain(torch.zeros(numel), zeros, 1e-7)
    assert _certificate.is_plain(zeros, zeros, 1e-7)
    assert not _certificate.is_plain(torch.ones(numel), zeros, 1e-7)
    assert not _certificate.is_plain(zeros, torch.ones(numel), 1e-7)


@pytest.mark.parametrize("numel", [2, 100])
def test_complex_numbers_too_large_to_be_measured_are_compared(numel: int) -> None:
    got = torch.full((numel,), 1e308 + 1e308j, dtype=torch.complex128)
    assert not _certificate.is_plain(got, got.conj(), 2.2e-16)
