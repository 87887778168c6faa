"""Arithmetic on Grads: each operand and dtype, None as zeros, refusals that change nothing, few calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from grads_samples import BINARY, IN_PLACE, add_, close, div_, mul_, two
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchzygote import GradDict, Grads, Params, gradient, jacobian


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
    for dtype in (torch.complex64, torch.int8):  # multiplied by 1, the infinity would give NaN
        z = torch.tensor([complex(torch.inf, 0), 1 + 2j]) if dtype.is_complex else torch.tensor([-128, 3])
        h = GradDict({w: z.to(dtype), b: torch.tensor(2.0), z: None})
        assert str((-h)[w]) == str(-h[w])
        assert torch.equal((+h)[w], h[w])
        assert (+h)[w].data_ptr() != h[w].data_ptr()
        close(+h, {w: h[w], b: torch.tensor(2.0), z: torch.zeros_like(z)})


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
    with pytest.raises(TypeError, match="fits the dtype torch.float32"):
        g *= {a: torch.ones(2), b: torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(TypeError, match="fits the dtype torch.float32.*none with 1j"):
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


HALF = torch.float16
REFLECTED = [
    (70000, torch.tensor([2.0], dtype=HALF), torch.tensor([35008.0], dtype=HALF)),
    (1.5, torch.tensor([2, 4]), torch.tensor([0.75, 0.375])),
    (np.float64(1.5), torch.tensor([2, 4], dtype=torch.int8), torch.tensor([0.75, 0.375])),
    (2**40, torch.tensor([2, -4], dtype=torch.int8), torch.tensor([2.0**39, -(2.0**38)])),
    (torch.tensor(1.5), torch.tensor([2, 4]), torch.tensor([0.75, 0.375])),
    (1e300, torch.tensor([2.0, -1.0]), torch.tensor([torch.inf, -torch.inf])),
    (2**70, torch.tensor([2.0**69]), torch.tensor([2.0])),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize(("number", "value", "expected"), REFLECTED)
def test_numbers_divided_by_halves_and_integers(number: Any, value: Tensor, expected: Tensor) -> None:
    w = torch.ones(value.shape)
    assert torch.equal((number / GradDict({w: value}))[w], expected)
    mixed = number / GradDict({w: value, value: torch.ones_like(w)})
    assert torch.equal(mixed[w], expected)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("symbol", ["+", "-", "*", "/", "**"])
@pytest.mark.parametrize("number", [2, 2.5, 300.5, -1.5, 2j, torch.tensor(2.5), torch.tensor(3)])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int64, torch.float32]
)
def test_reflected_operators_do_what_tensors_do(symbol: str, number: Any, dtype: torch.dtype) -> None:
    value = torch.tensor([5, 2, 1]).to(dtype)
    w = torch.ones(3)
    op = BINARY[symbol]
    try:
        expected = op(number, value)
    except (RuntimeError, NotImplementedError):
        return  # as complex powers of halves on the CPU
    found = op(number, GradDict({w: value}))[w]
    assert found.dtype is expected.dtype
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("symbol", ["-", "/", "**"])
@pytest.mark.parametrize("number", [2, 0.1, -300.5, 70000, 1e300, torch.tensor(0.1), torch.tensor(7e4)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reflected_operators_give_each_half_the_bits_that_tensors_give(
    symbol: str, number: Any, dtype: torch.dtype
) -> None:
    value = torch.arange(65536).to(torch.int16).view(dtype)  # all there are
    found = BINARY[symbol](number, GradDict({(key := torch.ones(65536)): value}))[key]
    torch.testing.assert_close(found, BINARY[symbol](number, value), rtol=0, atol=0, equal_nan=True)


def test_bools_are_not_subtracted() -> None:
    _, _, g, _ = two()
    for attempt in (lambda: g - torch.tensor(True), lambda: torch.tensor(True) - g):
        with pytest.raises(TypeError, match="-: expected .* got a bool tensor"):
            attempt()


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
    cloned = set() if hasattr(torch, "_foreach_clone") else {"clone"}  # 2.12
    assert len(loops) < 20 or set(loops) <= {"_to_copy", "view"} | cloned


@pytest.mark.parametrize("left", [1, 0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("symbol", ["-", "/", "**"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_numbers_on_the_left_take_as_few_calls_for_many_parameters(
    dtype: torch.dtype, symbol: str, left: Any
) -> None:
    counts = []
    for n in (2, 50):
        keys = [torch.ones(3, dtype=dtype) for _ in range(n)]
        g = Grads(Params(keys), [k.clone() for k in keys])
        with Calls() as calls:
            BINARY[symbol](left, g)
        counts.append(len(calls.names))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.parametrize("number", [np.array(2.0), np.array(3), np.float64(2), np.int64(3)])
def test_arrays_without_dimensions_are_numbers(symbol: str, number: Any) -> None:
    w, b, g, _ = two(torch.float32)
    op, plain = BINARY[symbol], number.item()
    expected = {key: op(g[key], plain) for key in (w, b)}
    result = op(g, number)
    close(result, expected)
    close(op(number, g), {key: op(plain, g[key]) for key in (w, b)})
    assert result[w].dtype is torch.float32
    close(IN_PLACE[symbol](g, number), expected)


@pytest.mark.parametrize("array", [np.array(True), np.array("2"), np.ones(1), np.ones(3)])
def test_other_arrays_are_no_operands(array: Any) -> None:
    _, _, g, _ = two()
    for attempt in (lambda: g * array, lambda: array * g, lambda: mul_(g, array)):
        with pytest.raises(TypeError, match=r"expected a number, .* got an array .*of shape \(.*map applies"):
            attempt()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("number", [0.1, 1e-3, 3, 65536.0, 1e39])
def test_numbers_are_not_rounded_to_half_precision(dtype: torch.dtype, number: float) -> None:
    torch.manual_seed(0)
    w, none = torch.zeros(500, dtype=dtype), torch.zeros(2, dtype=dtype)
    value = (torch.randn(500) * 1e-3).to(dtype)
    expected = (value.float() * number).to(dtype)
    g = Grads(Params([w, none]), [value, None])
    g *= number
    torch.testing.assert_close(g[w], expected, rtol=0, atol=0)
    if number < 1e38:
        assert g[none].tolist() == [0, 0]


def test_powers_too_large_for_one_of_several_dtypes_change_nothing() -> None:
    w, h = torch.zeros(2), torch.zeros(2, dtype=torch.float16)
    g = Grads(Params([w, h]), [torch.full((2,), 2.0), torch.full((2,), 2.0).half()])
    with pytest.raises(RuntimeError, match="overflow"):
        g **= 2**40
    assert g[w].tolist() == [2, 2]
    g **= 3
    assert g[w].tolist() == g[h].tolist() == [8, 8]
