"""What a plan adds to its compilation: pads as concatenations, and fewer guards."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
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


@given(
    size=st.integers(1, 9),
    slices=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 9), st.booleans()), min_size=1, max_size=5),
    dim=st.integers(0, 1),
    whole=st.integers(0, 5),
    nested=st.booleans(),
    shared=st.sets(st.integers(0, 4)),
)
def test_a_sum_of_slices_written_into_zeros(
    size: int, slices: list[tuple[int, int, bool]], dim: int, whole: int, nested: bool, shared: set[int]
) -> None:
    """Of pads along one axis, and of others along the other or none."""
    shape = (size, size)
    ranges = [(min(a, size - 1), min(max(b, a + 1), size), other) for a, b, other in slices]
    ranges = [(lo, max(hi, lo + 1), other) for lo, hi, other in ranges]
    torch.manual_seed(0)
    parts = []
    for lo, hi, other in ranges:
        axis = 1 - dim if other else dim
        parts.append(torch.rand([hi - lo if i == axis else size for i in range(2)], dtype=DOUBLE))
    full = torch.rand(shape, dtype=DOUBLE)

    def f(full: Tensor, *parts: Tensor) -> Tensor:
        total, others = None, full
        for k, (part, (lo, hi, other)) in enumerate(zip(parts, ranges, strict=True)):
            zeros = torch.full(shape, 0.0, dtype=DOUBLE)
            pad = aten.slice_scatter(zeros, part.sin(), 1 - dim if other else dim, lo, hi, 1)
            total = pad if total is None else (pad + total if nested and k == 2 else total + pad)
            others = others * pad if k in shared else others
            if k == whole:
                total = total + full.cos()
        assert total is not None
        return torch.stack([total, others])

    traced = passed(f, full, *parts)
    torch.testing.assert_close(traced(full, *parts), f(full, *parts), rtol=0, atol=0)
    assert scatters(traced) == 0


def test_a_sum_is_written_once() -> None:
    """Not its pads, and then their sum."""
    x = torch.linspace(-1, 1, 12, dtype=DOUBLE)

    def f(x: Tensor) -> Tensor:
        zeros = [torch.full((12,), 0.0, dtype=DOUBLE) for _ in range(3)]
        first, second, third = (
            aten.slice_scatter(zero, x[k:].sin(), 0, 0, 12 - k) for k, zero in enumerate(zeros, 1)
        )
        return first + second + third

    traced = passed(f, x)
    torch.testing.assert_close(traced(x), f(x), rtol=0, atol=0)
    sums = traced.graph.find_nodes(op="call_function", target=aten.cat.default)
    assert [len(node.args[0]) for node in sums] == [4]  # with the zeros at the end


def into(size: int, start: int, part: Tensor) -> Tensor:
    whole = torch.zeros(size, dtype=part.dtype)
    whole[start : start + len(part)] = part
    return whole


SHARED: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "across a piece": lambda x: (into(6, 0, x[:3].sin()) + into(6, 3, x[3:].exp()), into(6, 1, x[1:4] ** 2)),
    "over two pieces": lambda x: (into(6, 0, x[:2].sin()) + into(6, 2, x[2:].exp()), into(6, 1, x[1:4] ** 2)),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_pad_that_ends_within_pieces_and_is_used_elsewhere(name: str) -> None:
    def f(x: Tensor) -> Tensor:
        total, shared = SHARED[name](x)
        return (total + shared) * shared

    x = torch.linspace(-1, 1, 6, dtype=DOUBLE)
    with fresh_cache():
        J = plan_jacobian(f, x, mode="reverse").compile()(x)[0].to_dense()
        H = plan_hessian(lambda x: (f(x) ** 2).sum(), x, mode="reverse_over_reverse").compile()(x).to_dense()
    torch.testing.assert_close(J, torch.func.jacrev(f)(x))
    torch.testing.assert_close(H, torch.func.hessian(lambda x: (f(x) ** 2).sum())(x))


def test_pads_that_others_use_and_sums_of_other_kinds_stay_right() -> None:
    x = torch.linspace(-1, 1, 6, dtype=DOUBLE)

    def pads(x: Tensor) -> list[Tensor]:
        into = [torch.full((6,), 0.0, dtype=DOUBLE) for _ in range(2)]
        return [aten.slice_scatter(into[k], x[1:].sin() * k, 0, k, k + 5) for k in range(2)]

    cases = {
        "a pad used twice": lambda x: (pads(x)[0] + pads(x)[1]) * pads(x)[0],
        "weighed": lambda x: torch.add(*pads(x), alpha=3),
        "broadcast": lambda x: pads(x)[0] + pads(x)[1] + x[:, None],
        "of another dtype": lambda x: pads(x)[0] + pads(x)[1] + x.float(),
        "with a number": lambda x: pads(x)[0] + 1.0 + pads(x)[1],
        "the sum used twice": lambda x: (lambda y: y * (y + pads(x)[0]))(pads(x)[0] + pads(x)[1]),
        "not laid out in order": lambda x: (
            aten.slice_scatter(torch.full((6, 2), 0.0, dtype=DOUBLE), x[1:, None].expand(5, 2), 0, 0, 5)
            + aten.slice_scatter(torch.full((6, 2), 0.0, dtype=DOUBLE), x[1:, None].expand(5, 2), 0, 1, 6)
            + torch.stack([x, x]).t()
        ),
    }
    for name, f in cases.items():
        traced = passed(f, x)
        torch.testing.assert_close(traced(x), f(x), rtol=0, atol=0, msg=name)
        assert traced(x).stride() == f(x).stride(), name


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
