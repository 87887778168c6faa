"""Plans under torch.compile, and what one evaluation does: a chunk of products, one gather, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracles import func_hessian, func_jacobian
from sparse_cases import heat, rosenbrock
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchzygote import Params, gradient, plan_hessian, plan_jacobian
from torchzygote import plans as plans_module
from torchzygote._plans import jacobian as jacobian_plan_module
from torchzygote.coloring import recovery as recovery_module

U = torch.rand(6, 6, dtype=torch.float64)


def energy(u: Tensor) -> Tensor:
    return (heat(u) ** 2).sum()


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().removeprefix("aten::").split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def nothing_is_found_again(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, detection and coloring fail."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a plan was made already")

    def start() -> None:
        for name in ("jacobian_patterns", "hessian_patterns", "by_mode", "symmetric_recovery"):
            monkeypatch.setattr(plans_module, name, fail)
        monkeypatch.setattr(jacobian_plan_module, "by_mode", fail)
        monkeypatch.setattr(recovery_module, "color", fail)

    return start


# ---- count of work -----------------------------------------------------------------------------------------


SEARCHES = {"unique", "sort", "nonzero", "bincount"}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_a_jacobian_takes_one_chunk_and_one_gather(
    mode: str, verify: bool, chunks: list[int], nothing_is_found_again: Callable[[], None]
) -> None:
    calls = []

    def f(u: Tensor) -> Tensor:
        calls.append(1)
        return heat(u)

    plan = plan_jacobian(f, U, mode=mode, verify=verify)
    nothing_is_found_again()
    plan(U)
    calls.clear()
    chunks.clear()
    with Operators() as operators:
        plan(U + 1)
    assert len(calls) == 1
    assert chunks == [plan.ncolors + verify]
    assert operators.names.count("index_select") == 1 or verify  # the check may take another one
    assert not SEARCHES & set(operators.names)


@pytest.mark.parametrize("verify", [True, False])
def test_a_hessian_takes_one_chunk_and_one_gather(
    verify: bool, chunks: list[int], nothing_is_found_again: Callable[[], None]
) -> None:
    plan = plan_hessian(energy, U, verify=verify)
    plan.diagonal(U)
    nothing_is_found_again()
    for call in (plan, plan.values):
        chunks.clear()
        with Operators() as operators:
            call(U + 1)
        assert chunks == [plan.ncolors + verify]
        assert operators.names.count("index_select") == 1 or verify
        assert not SEARCHES & set(operators.names)


def test_chunks_as_large_as_asked_for(chunks: list[int]) -> None:
    plan = plan_jacobian(heat, U, chunk_size=4)
    plan(U)
    assert max(chunks) == 4
    assert sum(chunks) >= plan.ncolors


# ---- compiled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_values_within_a_compiled_function(mode: str) -> None:
    plan = plan_jacobian(heat, U, mode=mode)
    compiled = torch.compile(lambda u: plan.values(u)[0] * 2, fullgraph=True, backend="aot_eager")
    for u in (U, U + 1):
        expected = func_jacobian(heat, u)[0]
        torch.testing.assert_close(compiled(u), 2 * expected[plan.sparsity[0].to_dense()])
    dense = torch.compile(lambda u: plan(u, dense=True)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(dense(U), func_jacobian(heat, U)[0])


def test_values_of_a_hessian_within_a_compiled_function() -> None:
    plan = plan_hessian(energy, U)
    expected = func_hessian(energy, U)
    compiled = torch.compile(plan.values, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(U), expected[plan.sparsity.to_dense()])
    with pytest.raises(Exception, match="call diagonal once before it is compiled"):
        torch.compile(plan.diagonal, fullgraph=True, backend="aot_eager")(U)
    plan.diagonal(U)
    compiled = torch.compile(lambda u: plan.diagonal(u), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(U), expected.diagonal().reshape(U.shape))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_default_compiler() -> None:
    plan, second = plan_jacobian(heat, U).compile(), plan_hessian(energy, U).compile()
    for u in (U, U + 1):
        torch.testing.assert_close(plan(u)[0].to_dense(), func_jacobian(heat, u)[0])
        torch.testing.assert_close(second(u).to_dense(), func_hessian(energy, u))


def test_a_compiled_plan_compiles_once() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plan = plan_jacobian(heat, U).compile(backend=backend)
    for u in (U, U + 1, U * 2):
        torch.testing.assert_close(plan(u)[0].to_dense(), func_jacobian(heat, u)[0])
    assert len(graphs) == 1
    single = plan(U.float())[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to_dense(), func_jacobian(heat, U.float())[0])
    assert len(graphs) == 2


def test_compiled_plans_take_numpy_arrays() -> None:
    f = lambda x: x[1:] * x[:-1]
    x = torch.rand(6, dtype=torch.float64)
    plan = plan_jacobian(f, x).compile(backend="aot_eager")
    second = plan_hessian(lambda x: f(x).sum(), x).compile(backend="aot_eager")
    a = np.arange(6.0)
    fixed = a.copy()
    fixed.flags.writeable = False
    for given in (a, a[::-1], fixed, a.astype(np.float32), a.astype(np.int64)):
        u = torch.from_numpy(given.astype(np.float64))
        u = u if given.dtype == np.float64 else u.float()
        torch.testing.assert_close(plan(given)[0].to_dense(), func_jacobian(f, u)[0])
        torch.testing.assert_close(second(given).to_dense(), func_hessian(lambda x: f(x).sum(), u))


def test_compiled_plans_take_numbers_of_every_kind() -> None:
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plan = plan_hessian(lambda x: x**3, 2.0).compile(backend=backend)
    for x in (3.0, 2, np.float32(4), torch.tensor(5.0), np.array(6.0, np.float32)):
        assert float(plan(x)) == 6 * float(x)
    assert len(graphs) == 1


def test_what_is_not_differentiated_reaches_a_compiled_function_as_it_is() -> None:
    seen: list[Any] = []

    def f(x: Tensor, power: float, label: str, c: Any) -> Tensor:
        seen.extend([type(power), label, type(c)])
        return x[1:] ** power * x[:-1] + torch.as_tensor(c)

    x, c = np.random.default_rng(0).random(6), np.ones(5)
    plan = plan_jacobian(f, x, 3.0, "label", c, argnums=0).compile(backend="aot_eager")
    expected = func_jacobian(lambda x: x[1:] ** 3 * x[:-1], torch.from_numpy(x))[0]
    found = plan(x, 3.0, "label", c)
    torch.testing.assert_close(found[0].to_dense(), expected)
    assert found[1:] == (None, None, None)
    assert seen[-3:] == [float, "label", np.ndarray]


def test_plans_do_not_use_up_each_others_recompilations() -> None:
    """``torch.compile`` allows each function some, eight unless configured."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(2, 6):
            x = torch.rand(n)
            plan = plan_jacobian(lambda x: x[1:] * 2, x).compile(backend="eager")
            torch.testing.assert_close(plan(x)[0].to_dense(), 2 * torch.eye(n)[1:])


def test_what_does_not_fit_is_refused_as_without_a_compiler() -> None:
    plan, second = plan_jacobian(heat, U).compile(), plan_hessian(energy, U).compile()
    for call in (plan, second, plan.values, second.values):
        with pytest.raises(ValueError, match=r"input 0, shape: expected \(6, 6\), got \(6, 7\)"):
            call(torch.rand(6, 7))


def test_a_compiled_plan_notices_wrong_structure() -> None:
    plan = plan_jacobian(heat, U, sparsity=torch.eye(36)).compile(backend="aot_eager")
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        (J,) = plan(U)
    torch.testing.assert_close(J.to_dense(), func_jacobian(heat, U)[0])
    with pytest.raises(RuntimeError, match="contradicts the values"):
        plan.values(U)
    inside = torch.compile(lambda u: plan.values(u)[0], fullgraph=True, backend="aot_eager")
    assert inside(U).isnan().all()


def test_a_compiled_plan_of_a_hessian_does_too() -> None:
    x = torch.rand(12, dtype=torch.float64)
    plan = plan_hessian(rosenbrock, x, sparsity=torch.eye(12)).compile(backend="aot_eager")
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        H = plan(x)
    torch.testing.assert_close(H.to_dense(), func_hessian(rosenbrock, x))
    plan = plan_hessian(lambda x: x.prod() + rosenbrock(x), x, sparsity=torch.zeros(12, 12))
    with pytest.warns(UserWarning, match="differs from plain automatic differentiation"):
        d = plan.diagonal(x)
    torch.testing.assert_close(d, func_hessian(rosenbrock, x).diagonal())


def test_a_compiled_plan_is_differentiable_where_it_must_be() -> None:
    plan = plan_jacobian(heat, U).compile(backend="aot_eager")
    (got,) = gradient(lambda u: (plan(u)[0].values() ** 2).sum(), U)
    expected = torch.func.grad(lambda u: (torch.func.jacrev(heat)(u) ** 2).sum())(U)
    torch.testing.assert_close(got, expected)


def test_without_the_check_too() -> None:
    x = torch.rand(12, dtype=torch.float64)
    plan = plan_hessian(rosenbrock, x, verify=False).compile(backend="aot_eager")
    torch.testing.assert_close(plan(x).to_dense(), func_hessian(rosenbrock, x))


def test_a_hook_made_elsewhere_does_not_compile_a_plan_anew() -> None:
    plan = plan_hessian(lambda x: (x**3).sum(), torch.ones(5))
    plan.compile(backend="eager")
    plan(torch.ones(5))
    torch.ones(3, requires_grad=True).register_hook(lambda g: g)
    with torch.compiler.set_stance("fail_on_recompile"):
        plan(torch.ones(5))


def test_a_compiled_plan_by_params_is_refused_in_plain_words() -> None:
    w = torch.tensor([1.0, 2.0])
    plan = plan_jacobian(lambda: w**2, Params([w]))
    assert torch.equal(plan(Params([w]))[w].to_dense(), torch.diag(2 * w))
    plan.compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"JacobianPlan: expected arguments, because it is compiled"):
        plan(Params([w]))
