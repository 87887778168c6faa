"""What a plan adds to its compilation: pads as concatenations, and fewer guards."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

from torchzygote import plan_hessian, plan_jacobian
from torchzygote._torch_private import compiled_plans

DOUBLE = torch.float64
aten = torch.ops.aten


def passed(f: Any, *args: Tensor) -> torch.fx.GraphModule:
    """The graph of ``f`` as the compiler has it after the pass."""
    traced: torch.fx.GraphModule = make_fx(f, tracing_mode="fake")(*args)
    compiled_plans._PLAIN_PADS(traced.graph)
    traced.graph.lint()
    traced.recompile()
    return traced


def scatters(traced: torch.fx.GraphModule) -> int:
    return len(traced.graph.find_nodes(op="call_function", target=aten.slice_scatter.default))


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3)),
    dim=st.integers(-3, 2),
    start=st.integers(-6, 6) | st.none(),
    end=st.integers(-6, 6) | st.none() | st.just(sys.maxsize),
    step=st.integers(1, 2),
)
def test_a_slice_written_into_zeros(
    shape: tuple[int, ...], dim: int, start: int | None, end: int | None, step: int
) -> None:
    index = [slice(None)] * 3
    index[dim] = slice(start, end, step)
    part = torch.rand(torch.zeros(shape)[tuple(index)].shape, dtype=DOUBLE)
    f = lambda part: aten.slice_scatter(torch.full(shape, 0.0, dtype=DOUBLE), part, dim, start, end, step)
    expected = torch.zeros(shape, dtype=DOUBLE)
    expected[tuple(index)] = part
    traced = passed(f, part)
    torch.testing.assert_close(traced(part), expected, rtol=0, atol=0)
    if step == 1 and part.numel() > 0:
        assert scatters(traced) == 0


def test_what_is_no_pad_stays() -> None:
    part = torch.rand(2)
    into = {
        "ones": lambda part: aten.slice_scatter(torch.full((5,), 1.0), part, 0, 1, 3),
        "something": lambda part: aten.slice_scatter(part.repeat(2), part, 0, 1, 3),
        "every second": lambda part: aten.slice_scatter(torch.full((5,), 0.0), part, 0, 1, 5, 2),
    }
    for name, f in into.items():
        traced = passed(f, part)
        assert scatters(traced) == 1, name
        torch.testing.assert_close(traced(part), f(part))


def chain(x: Tensor) -> Tensor:
    y = x.reshape(4, -1)
    inner = (y[1:-1, 2:] - y[:-2, :-2] ** 2).square().sum()
    return inner + (100 * (x[1:] - x[:-1] ** 2) ** 2).sum() + x[::3].pow(4).sum()


def test_plans_of_slices_give_what_they_give_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    pads: list[bool] = []
    whether = compiled_plans._as_concatenation

    def counted(*args: Any) -> Any:
        pad = whether(*args)
        pads.append(pad is not None)
        return pad

    monkeypatch.setattr(compiled_plans, "_as_concatenation", counted)
    torch.manual_seed(0)
    x = torch.randn(40, dtype=DOUBLE)
    plan = plan_hessian(chain, x)
    expected = plan(x).to_dense()
    with fresh_cache():
        torch.testing.assert_close(plan.compile()(x).to_dense(), expected)
    assert any(pads)
    slopes = plan_jacobian(torch.func.grad(chain), x, mode="reverse").compile()
    torch.testing.assert_close(slopes(x)[0].to_dense(), expected)


def test_what_f_reads_is_still_guarded() -> None:
    """Numbers, functions and tensors of the caller's modules; those of this package aren't compared."""
    module = types.ModuleType("module_of_the_user")
    exec(
        "import torch\nfactor = 2.0\ninner = torch.sin\ndef f(x): return factor * inner(x) + torch.tanh(x)",
        module.__dict__,
    )
    sys.modules[module.__name__] = module
    try:
        x = torch.linspace(0, 1, 5, dtype=DOUBLE)
        options = {"guard_filter_fn": compiled_plans._kept_guards}
        plan = plan_jacobian(module.f, x).compile(backend="eager", options=options)
        slope = 1 - x.tanh() ** 2
        torch.testing.assert_close(plan(x)[0].values(), 2 * x.cos() + slope)
        module.factor = 3.0
        torch.testing.assert_close(plan(x)[0].values(), 3 * x.cos() + slope)
        module.inner = torch.cos
        torch.testing.assert_close(plan(x)[0].values(), -3 * x.sin() + slope)
        module.torch = types.SimpleNamespace(tanh=torch.exp)
        torch.testing.assert_close(plan(x)[0].values(), -3 * x.sin() + x.exp())
    finally:
        del sys.modules[module.__name__]


@pytest.mark.parametrize(
    "options", [{"backend": "eager"}, {"mode": "default"}, {"backend": "inductor", "mode": "reduce-overhead"}]
)
def test_other_ways_of_compiling_get_nothing_added(options: dict[str, Any]) -> None:
    assert compiled_plans.compiler_options(options) is options


def test_the_callers_options_come_first() -> None:
    given = {"options": {"guard_filter_fn": len, "max_autotune": False}}
    found = compiled_plans.compiler_options(given)
    assert found["options"]["guard_filter_fn"] is len
    assert found["options"]["max_autotune"] is False
    assert "post_grad_custom_post_pass" in found["options"]
    assert given == {"options": {"guard_filter_fn": len, "max_autotune": False}}
