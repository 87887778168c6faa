"""GradDict and Grads: mappings by identity, arithmetic, optimizers, flat vectors."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchzygote import (
    GradDict,
    Grads,
    Params,
    copy_,
    diaghessian,
    gradient,
    hessian,
    jacobian,
    pullback,
    withgradient,
)

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "**": lambda a, b: a**b,
}


def add_(a: Any, b: Any) -> Any:
    a += b
    return a


def sub_(a: Any, b: Any) -> Any:
    a -= b
    return a


def mul_(a: Any, b: Any) -> Any:
    a *= b
    return a


def div_(a: Any, b: Any) -> Any:
    a /= b
    return a


def pow_(a: Any, b: Any) -> Any:
    a **= b
    return a


IN_PLACE = {"+": add_, "-": sub_, "*": mul_, "/": div_, "**": pow_}


def two(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Grads, Grads]:
    """Two parameters, and two Grads of positive values."""
    w, b = torch.rand(2, 3, dtype=dtype), torch.rand((), dtype=dtype)
    ps = Params([w, b])
    grads = [Grads(ps, [torch.rand_like(w) + 0.5, torch.rand_like(b) + 0.5]) for _ in range(2)]
    return w, b, grads[0], grads[1]


def close(g: Mapping[Tensor, Any], expected: Mapping[Tensor, Any]) -> None:
    assert len(g) == len(expected)
    for key, value in expected.items():
        torch.testing.assert_close(g[key], value)


# -- a mapping -----------------------------------------------------------------------------------------------


def test_equal_tensors_are_two_keys() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    g = GradDict({a: 1.0})
    g[b] = 2.0
    assert (g[a], g[b], len(g)) == (1.0, 2.0, 2)
    assert a in g
    assert a.clone() not in g
    assert 0 not in g
    assert [k is p for k, p in zip(g, [a, b], strict=True)] == [True, True]
    assert [k is p for k, p in zip(reversed(g), [b, a], strict=True)] == [True, True]
    assert g.get(a.clone(), "none") == "none"
    del g[a]
    assert a not in g
    assert g.pop(b) == 2.0
    with pytest.raises(KeyError, match="identity"):
        g[a]
    with pytest.raises(KeyError, match="identity"):
        del g[a]
    with pytest.raises(KeyError, match="got a int"):
        g[0]  # type: ignore[index]
    with pytest.raises(TypeError, match="expected a tensor as key, got a str"):
        g["w"] = 1  # type: ignore[index]


def test_lookups_never_compare_tensors_with_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("compared elementwise")

    w, b, g, h = two()
    plain = {w: h[w], b: h[b]}
    monkeypatch.setattr(Tensor, "__eq__", refuse)
    g += plain
    g + h
    assert w in g
    g.merge_(plain)


def test_grads_need_a_value_per_parameter() -> None:
    w, b = torch.ones(2), torch.ones(())
    assert list(Grads(Params([w, b]), {b: 1.0, w: None}).values()) == [None, 1.0]
    with pytest.raises(ValueError, match="a value for each of 2 parameters, got 1"):
        Grads(Params([w, b]), [None])
    with pytest.raises(ValueError, match="the right lacks 1"):
        Grads(Params([w, b]), {w: None})
    with pytest.raises(TypeError, match="expected a Params"):
        Grads([w], [None])  # type: ignore[arg-type]
    for single in (torch.ones(1, 3), np.ones((1, 3)), 3):  # not taken for its rows
        with pytest.raises(TypeError, match="values: expected a sequence with a value for each parameter"):
            Grads(Params([w]), single)  # type: ignore[arg-type]


def test_from_pairs_and_mappings() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    assert list(GradDict([(a, 1), (b, None)]).values()) == [1, None]
    assert list(GradDict(GradDict({a: 1})).values()) == [1]


def test_gradients_are_bound_to_their_params() -> None:
    w, b = torch.ones(2), torch.ones(())
    ps = Params([b, w])
    g = gradient(lambda: (w * b).sum(), ps)
    assert isinstance(g, Grads)
    assert g.params is ps
    assert [k is p for k, p in zip(g, [b, w], strict=True)] == [True, True]
    assert isinstance(withgradient(lambda: w.sum(), ps).grad, Grads)
    assert isinstance(jacobian(lambda: w * b, ps), Grads)
    assert isinstance(diaghessian(lambda: (w * b).sum(), ps), Grads)


def test_changing_the_params_later_leaves_the_grads_alone() -> None:
    w, b, c = torch.ones(2), torch.ones(()), torch.ones(1)
    ps = Params([w, b])
    g = gradient(lambda: (w * b).sum(), ps)
    ps.add(c)
    ps.discard(w)
    assert g.params == Params([w, b])
    assert w in g
    assert c not in g
    g.params.discard(b)
    assert g.params == Params([w, b])
    g[c] = torch.zeros(1)
    assert g.params == Params([w, b, c])
    assert ps == Params([b, c])


def test_each_pullback_gives_fresh_grads() -> None:
    w = torch.ones(2)
    ps = Params([w])
    _, back = pullback(lambda: (w**2).sum(), ps)
    first, second = back(1.0), back(1.0)
    first *= 3
    assert torch.equal(second[w], 2 * w)
    assert back(None)[w] is None


def test_merging_takes_over_entries_and_leaves_params_alone() -> None:
    w, b = torch.ones(2), torch.ones(())
    layer = nn.Linear(1, 1)
    pw, pb = Params([w]), Params([b])
    g, h = gradient(lambda: w.sum() * b, pw), gradient(lambda: w.sum() * b, pb)
    k = gradient(lambda: layer(torch.ones(1)).sum(), Params(layer))
    assert g.merge_(h, k) is g
    assert [p is q for p, q in zip(g, [w, b, layer.weight, layer.bias], strict=True)] == [True] * 4
    assert g.params == Params([w, b, layer])
    assert (pw, pb) == (Params([w]), Params([b]))
    assert h.params == pb
    assert repr(g.params) == "Params([float32 (2,), float32 (), weight: float32 (1, 1), bias: float32 (1,)])"
    g.merge_({w: None})
    assert g[w] is None


def test_equality_is_of_keys_and_values() -> None:
    w, _b, g, h = two()
    assert g == g.copy()
    assert g == dict(g.items())
    assert g != h
    assert g != GradDict({w: g[w]})
    assert g != 3
    assert GradDict({w: None}) == GradDict({w: None})
    assert GradDict({w: None}) != GradDict({w: torch.zeros(2)})
    with pytest.raises(TypeError, match="unhashable"):
        hash(g)


def test_a_copy_has_memory_of_its_own() -> None:
    w, b, g, _ = two()
    g[b] = None
    for twin in (g.copy(), copy.copy(g)):
        assert type(twin) is Grads
        assert twin == g
        twin *= 2
        assert twin[b] is not None
        assert g[b] is None
        assert not torch.equal(twin[w], g[w])


def test_deep_copies_and_pickles_stay_with_their_model() -> None:
    model = nn.Linear(2, 1)
    g = gradient(lambda: model(torch.ones(2)).sum(), Params(model))
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin, h = again((model, g))
        assert torch.equal(h[twin.weight], g[model.weight])
        assert list(h.named()) == ["weight", "bias"]
        assert model.weight not in h
    d = copy.deepcopy(GradDict({model.weight: 1}))
    assert list(d.values()) == [1]


def test_named_needs_names() -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    g = gradient(lambda: model(torch.ones(2)).sum(), Params(model))
    assert list(g.named()) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="1 of 1 without a name"):
        gradient(lambda: model[0].weight.sum(), Params([model[0].weight])).named()


def test_repr_shows_names_and_shapes() -> None:
    model = nn.Linear(2, 1)
    g = gradient(lambda: model.weight.sum(), Params(model))
    assert repr(g) == "Grads({weight: float32 (1, 2), bias: None})"
    many = GradDict({torch.zeros(1): None for _ in range(40)})
    assert repr(many).endswith("... 30 more})")


# -- arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.parametrize("right", ["number", "int", "numpy", "tensor", "grads", "graddict", "dict"])
def test_each_operator_takes_each_operand(symbol: str, right: str) -> None:
    w, b, g, h = two()
    operand: Any = {
        "number": 1.5,
        "int": 2,
        "numpy": np.float64(1.5),
        "tensor": torch.tensor(1.5),
        "grads": h,
        "graddict": GradDict({b: h[b], w: h[w]}),
        "dict": {b: h[b], w: h[w]},
    }[right]
    each = operand if isinstance(operand, Mapping) else dict.fromkeys([w, b], operand)
    op = BINARY[symbol]
    expected = {key: op(g[key], each[key]) for key in (w, b)}
    before = {key: g[key].clone() for key in (w, b)}
    result = op(g, operand)
    close(result, expected)
    assert type(result) is Grads
    assert result.params == g.params
    close(g, before)

    memory = {key: g[key].data_ptr() for key in (w, b)}
    same = IN_PLACE[symbol](g, operand)
    assert same is g
    close(g, expected)
    assert {key: g[key].data_ptr() for key in (w, b)} == memory


@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.parametrize("left", [2, 1.5, np.float64(1.5), torch.tensor(1.5), torch.tensor(3)])
def test_numbers_may_stand_on_the_left(symbol: str, left: Any) -> None:
    w, b, g, _ = two()
    result = BINARY[symbol](left, g)
    assert type(result) is Grads
    close(result, {key: BINARY[symbol](left, g[key]) for key in (w, b)})


def test_unary_operators() -> None:
    w, b, g, _ = two()
    close(-g, {w: -g[w], b: -g[b]})
    plus = +g
    assert plus == g
    assert plus[w] is not g[w]


def test_the_left_operand_gives_type_and_order() -> None:
    w, b, g, h = two()
    other = GradDict({b: h[b], w: h[w]})
    result = other + g
    assert type(result) is GradDict
    assert next(iter(result)) is b
    assert type(g + other) is Grads


@given(
    shapes=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=5),
    dtypes=st.lists(
        st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]), min_size=5
    ),
    missing=st.sets(st.integers(0, 4)),
    symbol=st.sampled_from(["+", "-", "*", "/"]),
)
def test_any_shapes_and_dtypes(
    shapes: list[list[int]], dtypes: list[torch.dtype], missing: set[int], symbol: str
) -> None:
    keys = [torch.rand(shape, dtype=dtype) + 1 for shape, dtype in zip(shapes, dtypes, strict=False)]
    g = GradDict({k: None if i in missing else k * 2 for i, k in enumerate(keys)})
    h = GradDict({k: k + 1 for k in keys})
    op = BINARY[symbol]
    expected = [op(torch.zeros_like(k) if i in missing else k * 2, k + 1) for i, k in enumerate(keys)]
    for result in (op(g, h), IN_PLACE[symbol](g, h)):
        for k, e in zip(keys, expected, strict=True):
            torch.testing.assert_close(result[k], e)
            assert result[k].dtype is e.dtype


def test_none_counts_as_zeros_like_its_key() -> None:
    w, b = torch.ones(2, 3, dtype=torch.float64), torch.ones(())
    ps = Params([w, b])
    g = gradient(lambda: w.sum(), ps)
    assert g[b] is None
    h = gradient(lambda: b * 3, ps)
    close(g + h, {w: torch.ones_like(w), b: torch.tensor(3.0)})
    close(2 * g, {w: 2 * torch.ones_like(w), b: torch.tensor(0.0)})
    close(g - 1, {w: torch.zeros_like(w), b: torch.tensor(-1.0)})
    close(-(g + g), {w: -2 * torch.ones_like(w), b: torch.tensor(-0.0)})
    assert g[b] is None
    g += h
    close(g, {w: torch.ones_like(w), b: torch.tensor(3.0)})
    g *= 2  # what was None must not have taken over h's memory
    close(h * 1, {w: torch.zeros_like(w), b: torch.tensor(3.0)})


def test_mismatched_keys_are_refused_with_counts_and_nothing_changes() -> None:
    a, b, c, d = (torch.ones(2) for _ in range(4))
    g = Grads(Params([a, b]), [torch.ones(2), torch.ones(2)])
    before = g.copy()
    wrong: list[Mapping[Tensor, Any]] = [GradDict({a: 1.0, c: 1.0, d: 1.0}), {a: 1.0}, {}, {a: 1, b: 1, c: 1}]
    counts = [(2, 1), (0, 1), (0, 2), (1, 0)]
    for other, (left, right) in zip(wrong, counts, strict=True):
        for attempt in (
            lambda other=other: g + other,
            lambda other=other: add_(g, other),
            lambda other=other: g.map(torch.add, other),
            lambda other=other: g.map_(torch.add, other),
            lambda other=other: g.foreach(lambda x, y: x.add_(1), other),
        ):
            with pytest.raises(ValueError, match=f"the left lacks {left} of them, the right lacks {right}"):
                attempt()
    assert g == before


def test_failing_in_place_changes_nothing() -> None:
    a, b = torch.ones(2), torch.ones(2)
    g = Grads(Params([a, b]), [torch.ones(2), torch.ones(2)])
    before = g.copy()
    with pytest.raises(ValueError, match="shapes that fit.*\\(2,\\) and \\(3,\\)"):
        g += {a: torch.ones(2), b: torch.ones(3)}
    with pytest.raises(ValueError, match="shapes that fit.*\\(2,\\) and \\(5, 2\\)"):
        g += {a: torch.ones(2), b: torch.ones(5, 2)}
    with pytest.raises(TypeError, match="expected what fits the dtype torch.float32"):
        g *= {a: torch.ones(2), b: torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(TypeError, match="expected what fits the dtype torch.float32.*got 1j"):
        g *= 1j
    with pytest.raises(TypeError, match="got a str"):
        g += {a: torch.ones(2), b: "b"}
    with pytest.raises(ValueError, match="one device"):
        g += {a: torch.ones(2), b: torch.ones(2, device="meta")}
    assert g == before


def test_integer_values_are_not_divided_in_place() -> None:
    a, b = torch.ones(2), torch.ones(2)
    g = GradDict({a: torch.ones(2), b: torch.ones(2, dtype=torch.int64)})
    before = g.copy()
    for op, operand in [(div_, 2), (div_, g.copy()), (add_, 0.5), (mul_, {a: 2.0, b: torch.ones(2)})]:
        with pytest.raises(TypeError, match="fits the dtype torch.int64"):
            op(g, operand)
    assert g == before
    close(g / 2, {a: torch.full((2,), 0.5), b: torch.full((2,), 0.5)})
    close(g + 1, {a: torch.full((2,), 2.0), b: torch.full((2,), 2)})


@pytest.mark.parametrize("operand", ["text", None, True, [1.0], object()])
def test_what_is_no_operand_is_refused(operand: Any) -> None:
    _, _, g, _ = two()
    with pytest.raises(TypeError):
        g + operand
    with pytest.raises(TypeError):
        operand - g
    with pytest.raises(TypeError):
        g *= operand


def test_a_tensor_of_rows_is_no_operand() -> None:
    _, _, g, _ = two()
    for attempt in (lambda: g * torch.ones(3), lambda: torch.ones(3) * g):
        with pytest.raises(TypeError, match="0-dim tensor or a mapping.*map applies"):
            attempt()


def test_complex_and_real() -> None:
    w = torch.ones(2)
    g = Grads(Params([w]), [torch.ones(2)])
    close(g * 2j, {w: torch.full((2,), 2j)})
    close(1j + g, {w: torch.full((2,), 1 + 1j)})
    close(1j / g, {w: torch.full((2,), 1j)})
    z = torch.ones(2, dtype=torch.complex64)
    h = gradient(lambda: (z.abs() ** 2).sum(), Params([z]))
    close(h / 2, {z: z})


def test_half_stays_half() -> None:
    w = torch.ones(2, dtype=torch.float16)
    g = Grads(Params([w]), [torch.ones(2, dtype=torch.float16)])
    for scale in (0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)):
        assert (g * scale)[w].dtype is torch.float16
        assert torch.equal((g * scale)[w], torch.ones(2, dtype=torch.float16) * 0.1)


def test_what_cannot_be_written_into_is_replaced() -> None:
    a, b, c, d = (torch.ones(3) for _ in range(4))
    shared = torch.ones(3)
    with torch.inference_mode():
        inference = torch.ones(3)
    g = GradDict({a: torch.ones(1).expand(3), b: shared, c: shared, d: inference})
    g *= 2
    close(g, {key: torch.full((3,), 2.0) for key in (a, b, c, d)})
    g += {a: 1.0, b: 1.0, c: 2.0, d: 3.0}
    close(g, {key: torch.full((3,), float(v)) for key, v in [(a, 3), (b, 3), (c, 4), (d, 5)]})


def test_operands_that_are_values_of_the_left_side_are_read_first() -> None:
    a, b = torch.ones(2), torch.ones(2)
    g = GradDict({a: torch.tensor([1.0, 2.0]), b: torch.tensor([10.0, 20.0])})
    g += {a: g[b], b: g[a]}
    close(g, {a: torch.tensor([11.0, 22.0]), b: torch.tensor([11.0, 22.0])})
    s, t = torch.ones(()), torch.ones(())
    h = GradDict({s: torch.tensor(2.0), t: torch.tensor(3.0)})
    h *= h[s]
    close(h, {s: torch.tensor(4.0), t: torch.tensor(6.0)})
    h += h
    close(h, {s: torch.tensor(8.0), t: torch.tensor(12.0)})


def test_jacobians_add_too() -> None:
    w, b = torch.rand(2, 3), torch.rand(())
    J = jacobian(lambda: (w * b).reshape(-1), Params([w, b]))
    close(J + J, {w: 2 * J[w], b: 2 * J[b]})


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda g: g + g, "_foreach_add"),
        (lambda g: g - 2 * g, "_foreach_sub"),
        (lambda g: add_(g, g), "_foreach_add_"),
        (lambda g: g / 2.0, "_foreach_div"),
        (lambda g: 1 - g, "_foreach_neg"),
        (lambda g: g.norm(), "_foreach_norm"),
        (lambda g: g.clip_norm_(0.1), "_foreach_mul_"),
        (lambda g: g.clip_value_(0.1), "_foreach_clamp_min_"),
        (lambda g: (g.assign_(), g.accumulate_(0.5)), "_foreach_add_"),
    ],
)
def test_one_multi_tensor_call_per_dtype(work: Callable[[Grads], Any], name: str) -> None:
    keys = [torch.ones(3, dtype=torch.float64 if i % 2 else torch.float32) for i in range(20)]
    g = Grads(Params(keys), [k.clone() for k in keys])
    with Calls() as calls:
        work(g)
    assert calls.names.count(name) == 2
    loops = [n for n in calls.names if not n.startswith("_foreach")]
    assert len(loops) < 20 or set(loops) <= {"_to_copy", "view"}


# -- within other differentiations ---------------------------------------------------------------------------


def inner(w: Tensor, b: Tensor) -> Tensor:
    return (w**3).sum() * b + b**2


@pytest.mark.parametrize("symbol", BINARY)
def test_arithmetic_on_grads_is_differentiable(symbol: str) -> None:
    """The gradient of what arithmetic on inner gradients gives, against torch.func on the formula."""
    w, b = torch.rand(3, dtype=torch.float64) + 1, torch.tensor(1.5, dtype=torch.float64)
    ps = Params([w, b])
    op = BINARY[symbol]

    def outer() -> Tensor:
        g = gradient(lambda: inner(w, b), ps)
        h = gradient(lambda: inner(w, b) * b, ps)
        k = op(op(op(g, h), 2), b)
        k = IN_PLACE[symbol](k, 1.5) + 3 / g - b
        return k[w].sum() + k[b] + g.norm()

    def formula(w: Tensor, b: Tensor) -> Tensor:
        g = torch.func.grad(inner, (0, 1))(w, b)
        h = torch.func.grad(lambda w, b: inner(w, b) * b, (0, 1))(w, b)
        k = [op(op(op(op(x, y), 2), b), 1.5) + 3 / x - b for x, y in zip(g, h, strict=True)]
        return k[0].sum() + k[1] + torch.cat([g[0], g[1][None]]).norm()

    expected = torch.func.grad(formula, (0, 1))(w, b)
    close(gradient(outer, ps), dict(zip([w, b], expected, strict=True)))
    assert not w.requires_grad


def second(mode: str) -> Callable[..., Any]:
    return lambda f: lambda x: hessian(f, x, mode=mode)


@pytest.mark.parametrize(
    ("transform", "reference"),
    [
        (torch.func.grad, torch.func.grad),
        (torch.func.jacfwd, torch.func.grad),
        (torch.func.hessian, torch.func.hessian),
        (lambda f: lambda x: gradient(f, x)[0], torch.func.grad),
        (second("reverse_over_reverse"), torch.func.hessian),
        (second("forward_over_reverse"), torch.func.hessian),
        (lambda f: lambda x: diaghessian(f, x)[0], torch.func.hessian),
    ],
)
def test_arithmetic_is_differentiated_in_every_mode(
    transform: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    w, b = torch.rand(3, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64)
    x = torch.tensor(0.7, dtype=torch.float64)
    keys = Params([w, b])

    def mine(x: Tensor) -> Tensor:
        g = Grads(keys, [w * x, b * x**2])
        g *= x
        g = (g + 2 * g / (1 + x) - 3) ** 2
        clipped = g.clip_norm(0.5)
        g.clip_value_(-1.0, 4.0)
        return (2 - g)[w].sum() + (x / g)[b] + (x**g)[b] + clipped[w].sum() + g.to_vector().sum()

    def formula(x: Tensor) -> Tensor:
        g = [w * x * x, b * x**3]
        g = [(y + 2 * y / (1 + x) - 3) ** 2 for y in g]
        norm = torch.sqrt((g[0] ** 2).sum() + g[1] ** 2)
        clipped = g[0] * torch.clamp(0.5 / (norm + 1e-6), max=1.0)
        g = [y.clamp(-1, 4) for y in g]
        return (2 - g[0]).sum() + x / g[1] + x ** g[1] + clipped.sum() + g[0].sum() + g[1]

    torch.testing.assert_close(transform(mine)(x), reference(formula)(x))


def test_arithmetic_works_under_vmap() -> None:
    w, b = torch.rand(3), torch.rand(())
    ps = Params([w, b])

    def mine(x: Tensor) -> Tensor:
        g = Grads(ps, [w * x, b.clone()])
        g += {w: torch.ones(3), b: x}
        return (2 * g - x * g)[w].sum() + g.norm() + g[b]

    xs = torch.rand(4)
    torch.testing.assert_close(torch.func.vmap(mine)(xs), torch.stack([mine(x) for x in xs]))


def test_in_place_arithmetic_on_a_graph_keeps_the_derivative() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def outer() -> Tensor:
        g = gradient(lambda: (w**3).sum(), Params([w]))
        g *= g
        g.clip_norm_(10.0)
        return g[w].sum()

    def formula(w: Tensor) -> Tensor:
        g = (3 * w**2) ** 2
        return (g * torch.clamp(10 / (g.norm() + 1e-6), max=1)).sum()

    torch.testing.assert_close(gradient(outer, Params([w]))[w], torch.func.grad(formula)(w))


def test_plain_autograd_on_the_outside_with_create_graph() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    g = gradient(lambda: (w**3).sum(), Params([w]), create_graph=True)
    ((scale * g)[w] + (g + g)[w]).sum().backward()
    torch.testing.assert_close(w.grad, 4 * 6 * w.detach())
    torch.testing.assert_close(scale.grad, (3 * w.detach() ** 2).sum())


# -- elementwise functions -----------------------------------------------------------------------------------


def test_map_is_out_of_place_and_map_in_place() -> None:
    w, b, g, h = two()
    before = g.copy()
    close(g.map(lambda x, y: x.clamp(max=1) + y, h), {k: before[k].clamp(max=1) + h[k] for k in (w, b)})
    assert g == before
    assert g.map_(torch.sub, h) is g
    close(g, {k: before[k] - h[k] for k in (w, b)})
    g[b] = None
    assert g.map(lambda x: x + 1)[b] == 1
    assert g.map(lambda x: tuple(x.shape))[w] == (2, 3)
    now = g.copy()
    with pytest.raises(ZeroDivisionError):
        g.map_(lambda x: x * 2 if x.dim() else 1 / 0)
    assert g == now


def test_foreach_is_for_effects() -> None:
    w, b, g, h = two()
    before = g.copy()
    assert g.foreach(lambda x, y: x.clamp_(max=0.7).add_(y), h) is None  # type: ignore[func-returns-value]
    close(g, {k: before[k].clamp(max=0.7) + h[k] for k in (w, b)})


def test_foreach_keeps_zeros_that_were_written_into() -> None:
    w, b = torch.ones(2), torch.ones(3)
    g = GradDict({w: None, b: None})
    seen = []
    g.foreach(lambda x: seen.append(x.clone()))
    assert torch.equal(torch.cat(seen), torch.zeros(5))
    assert g[w] is None
    g.foreach(lambda x: x.add_(1.0) if len(x) == 2 else None)
    assert torch.equal(g[w], torch.ones(2))
    assert g[b] is None


# -- optimizers ----------------------------------------------------------------------------------------------


def test_assigned_gradients_are_copies() -> None:
    w, b, g, _ = two()
    unused = torch.ones(1)
    g[unused] = None
    unused.grad = torch.tensor([7.0])
    g.assign_()
    assert torch.equal(w.grad, g[w])
    assert unused.grad == 7
    before = g.copy()
    w.grad.zero_()
    assert g == before
    b_grad = b.grad.clone()
    g *= 2
    assert torch.equal(b.grad, b_grad)
    g.assign_(share=True)
    assert w.grad is g[w]


def test_accumulation_adds_weighted_and_never_writes_into_the_grads() -> None:
    w, b, g, h = two()
    total = {k: 0.5 * g[k] + 2 * h[k] + g[k] for k in (w, b)}
    before = g.copy()
    g.accumulate_(0.5)
    memory = w.grad.data_ptr()
    h.accumulate_(torch.tensor(2.0))
    g.accumulate_()
    close({w: w.grad, b: b.grad}, total)
    assert w.grad.data_ptr() == memory
    w.grad = g[w]
    g.accumulate_()
    torch.testing.assert_close(w.grad, 2 * g[w])
    assert g == before


def test_a_step_is_that_of_plain_autograd() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    twin = copy.deepcopy(model)
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    ps = Params(model)
    mine, theirs = torch.optim.AdamW(ps, lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    for _ in range(5):
        g = gradient(lambda: nn.functional.mse_loss(model(x), y), ps)
        g.clip_norm_(0.1)
        g.assign_()
        mine.step()
        theirs.zero_grad()
        nn.functional.mse_loss(twin(x), y).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        theirs.step()
    assert torch.equal(ps.to_vector(), Params(twin).to_vector())


def test_what_does_not_fit_its_parameter_is_not_assigned() -> None:
    w, b = torch.ones(2, 3), torch.ones(())
    for value, error, message in [
        (torch.ones(6), ValueError, "shape and device"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, "real value"),
    ]:
        g = Grads(Params([b, w]), [torch.ones(()), value])
        for attempt in (g.assign_, g.accumulate_):
            with pytest.raises(error, match=message):
                attempt()
        assert b.grad is None
        assert w.grad is None
    g = Grads(Params([b]), [torch.ones(())])
    for weight in ("1", None, True, torch.ones(2), 1j):
        with pytest.raises(TypeError, match="weight: expected"):
            g.accumulate_(weight)  # type: ignore[arg-type]
    Grads(Params([w]), [torch.ones(2, 3, dtype=torch.float64)]).assign_()
    assert w.grad is not None
    assert w.grad.dtype is torch.float32


def test_a_graph_survives_assignment() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    gradient(lambda: (w**3).sum(), Params([w]), create_graph=True).assign_()
    assert w.grad is not None
    (second,) = torch.autograd.grad(w.grad.sum(), w)
    torch.testing.assert_close(second, 6 * w.detach())


# -- sparse gradients ----------------------------------------------------------------------------------------


@pytest.fixture
def embedding() -> tuple[nn.Embedding, Tensor, Grads, Grads]:
    """An embedding with sparse gradients, its rows, and the same gradients sparse and dense."""
    layer = nn.Embedding(5, 2, sparse=True)
    rows = torch.tensor([1, 3, 1])
    bias = torch.ones(2)
    g = gradient(lambda: (layer(rows) * bias).pow(2).sum(), Params([layer, bias]))
    dense = g.map(lambda x: x.to_dense() if x.is_sparse else x)
    assert g[layer.weight].is_sparse
    return layer, bias, g, dense


def densely(g: GradDict) -> dict[Tensor, Any]:
    return {k: v.to_dense() if v.layout is not torch.strided else v for k, v in g.items()}


@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_take_part(symbol: str, embedding: Any) -> None:
    layer, _bias, g, d = embedding
    op = BINARY[symbol]
    for right, dense_right in [(g, d), (d, d), (2.0, 2.0), (torch.tensor(2.0), torch.tensor(2.0))]:
        torch.testing.assert_close(densely(op(g, right)), densely(op(d, dense_right)), equal_nan=True)
    torch.testing.assert_close(densely(op(d, g)), densely(op(d, d)), equal_nan=True)
    torch.testing.assert_close(densely(op(3.0, g)), densely(op(3.0, d)), equal_nan=True)
    torch.testing.assert_close(
        densely(IN_PLACE[symbol](g.copy(), g)), densely(IN_PLACE[symbol](d.copy(), d)), equal_nan=True
    )
    assert (g + g)[layer.weight].is_sparse
    assert (2 * g)[layer.weight].is_sparse


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_are_normed_clipped_and_assigned(embedding: Any) -> None:
    layer, _bias, g, d = embedding
    for p in (2.0, 1.0, float("inf"), float("-inf")):
        torch.testing.assert_close(g.norm(p), d.norm(p))
    torch.testing.assert_close(densely(g.clip_norm(0.5)), densely(d.clip_norm(0.5)))
    torch.testing.assert_close(densely(g.clip_value(0.5)), densely(d.clip_value(0.5)))
    torch.testing.assert_close(g.to_vector(), d.to_vector())
    assert g.nonfinite() == []
    g.assign_()
    assert layer.weight.grad.is_sparse
    d.accumulate_()
    g.accumulate_(2.0)
    torch.testing.assert_close(layer.weight.grad.to_dense(), 4 * d[layer.weight])


# -- flat vectors --------------------------------------------------------------------------------------------


def test_copies_go_both_ways() -> None:
    model = nn.Linear(2, 3)
    ps = Params(model)
    flags = [p.requires_grad for p in ps]
    vector = torch.arange(9.0)
    assert copy_(ps, vector) is ps
    assert torch.equal(model.weight, vector[:6].reshape(3, 2))
    assert torch.equal(model.bias, vector[6:])
    assert [p.requires_grad for p in ps] == flags
    back = torch.zeros(9, dtype=torch.float64)
    assert copy_(back, ps) is back
    assert torch.equal(back, vector.double())
    g = gradient(lambda: model.weight.sum(), ps)
    assert copy_(g, 2 * vector) is g
    assert torch.equal(g[model.bias], 2 * vector[6:])
    assert torch.equal(copy_(torch.zeros(9), g), 2 * vector)
    assert torch.equal(g.to_vector(), 2 * vector)
    memory = g[model.weight].data_ptr()
    copy_(g, vector)
    assert g[model.weight].data_ptr() == memory


def test_numpy_vectors_will_do() -> None:
    w, b = torch.zeros(2), torch.zeros(())
    ps = copy_(Params([w, b]), np.array([1.0, 2.0, 3.0]))
    assert torch.equal(ps.to_vector(), torch.tensor([1.0, 2.0, 3.0]))
    x = np.zeros(6)
    copy_(x[::2], ps)
    assert x.tolist() == [1, 0, 2, 0, 3, 0]
    x.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_(x[:3], ps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy_(ps, x[1:4])


def test_none_becomes_zeros_and_back() -> None:
    w, b = torch.ones(2), torch.ones(())
    g = gradient(lambda: b * 2, Params([w, b]))
    assert torch.equal(g.to_vector(), torch.tensor([0.0, 0.0, 2.0]))
    copy_(g, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(g[w], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_a_vector_that_does_not_fit_writes_nothing(shape: tuple[int, ...]) -> None:
    w, b = torch.zeros(2), torch.zeros(())
    ps = Params([w, b])
    g = Grads(ps, [torch.zeros(2), torch.zeros(())])
    for dst, src in [(ps, torch.ones(shape)), (g, torch.ones(shape))]:
        with pytest.raises(ValueError, match="vector of 3 elements.*nothing was written"):
            copy_(dst, src)
    vector = torch.ones(shape)
    for src in (ps, g):
        with pytest.raises(ValueError, match="expected dst to be a vector of 3 elements"):
            copy_(vector, src)
    assert ps.to_vector().sum() == g.to_vector().sum() == 0
    assert torch.equal(vector, torch.ones(shape))


def test_copies_between_other_things_are_refused() -> None:
    w = torch.zeros(2)
    ps = Params([w])
    for dst, src in [
        (ps, ps),
        (torch.zeros(2), torch.zeros(2)),
        (ps, [1.0, 2.0]),
        (GradDict(), torch.zeros(0)),
    ]:
        with pytest.raises(TypeError, match="copy_: expected a Params or Grads and a flat vector"):
            copy_(dst, src)
    with pytest.raises(TypeError, match="copy_: expected a dtype"):
        copy_(ps, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="copy_: expected a dtype"):
        copy_(torch.ones(2, dtype=torch.int64), ps)
    with pytest.raises(ValueError, match="writable"):
        copy_(torch.zeros(1).expand(2), ps)
    with pytest.raises(RuntimeError, match="without a graph"):
        gradient(lambda v: copy_(ps, v).to_vector().sum(), torch.ones(2))
    assert w.sum() == 0


def test_a_copy_into_grads_keeps_the_derivative() -> None:
    w = torch.ones(2)

    def f(v: Tensor) -> Tensor:
        g = Grads(Params([w]), [torch.zeros(2)])
        copy_(g, v)
        vector = copy_(torch.zeros(2), g * 3)
        return (vector**2).sum()

    v = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(gradient(f, v)[0], 18 * v)
