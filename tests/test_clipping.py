"""Norms and clipping: bit for bit those of torch.nn.utils, half precision, what isn't finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchzygote import Grads, Params, gradient, pullback

SHAPES = [(3, 4), (), (7,), (2, 1, 5), (0,), (64, 33)]
NORMS: list[Any] = [2.0, 1.0, 3, 0.5, 0.0, math.inf, -math.inf, "inf"]


def parameters(dtypes: Sequence[torch.dtype], scale: float = 1.0) -> tuple[list[Tensor], Grads]:
    """Parameters with a gradient in ``grad``, one without, and the same gradients as Grads."""
    keys, values = [], []
    for i, shape in enumerate(SHAPES):
        p = torch.zeros(shape, dtype=dtypes[i % len(dtypes)])
        p.grad = torch.randn_like(p) * scale
        keys.append(p)
        values.append(p.grad.clone())
    keys.append(torch.zeros(3, dtype=dtypes[0]))
    values.append(None)
    return keys, Grads(Params(keys), values)


def equal(g: Grads, keys: list[Tensor]) -> None:
    for p in keys:
        assert (g[p] is None) == (p.grad is None)
        if p.grad is not None:
            assert torch.equal(g[p], p.grad)
            assert g[p].dtype is p.dtype


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.float64], [torch.float32, torch.float64], [torch.complex64]]
)
@pytest.mark.parametrize("max_norm", [0.01, 1e6, 0.0])
def test_clipping_by_norm_is_that_of_torch_to_the_bit(
    norm_type: Any, dtypes: list[torch.dtype], max_norm: float
) -> None:
    if norm_type == 0 and dtypes[0].is_complex:
        pytest.skip("PyTorch drops the imaginary part here, with a warning")
    keys, g = parameters(dtypes)
    if math.isinf(float(norm_type)):  # where torch refuses empty tensors
        empty = next(p for p in keys if p.numel() == 0)
        keys = [p for p in keys if p is not empty]
    out = g.clip_norm(max_norm, norm_type)
    before = g.copy()
    alone = g.norm(norm_type)
    total = g.clip_norm_(max_norm, norm_type)
    expected = nn.utils.clip_grad_norm_(keys, max_norm, norm_type)
    assert torch.equal(total, expected)
    assert total.dtype is expected.dtype
    assert torch.equal(alone, expected)
    equal(g, keys)
    equal(out, keys)
    assert before.norm(norm_type) == expected


@pytest.mark.parametrize(
    "dtypes", [[torch.float32], [torch.float64, torch.float32], [torch.bfloat16], [torch.float16]]
)
def test_clipping_by_value_is_that_of_torch_to_the_bit(dtypes: list[torch.dtype]) -> None:
    keys, g = parameters(dtypes)
    before = g.copy()
    out = g.clip_value(0.3)
    assert g == before
    assert g.clip_value_(0.3) is g
    nn.utils.clip_grad_value_(keys, 0.3)
    equal(g, keys)
    equal(out, keys)


@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=8),
    double=st.booleans(),
    norm_type=st.sampled_from([1.0, 2.0, 2.5]),
    seed=st.integers(0, 1000),
)
def test_any_sizes(sizes: list[int], double: bool, norm_type: float, seed: int) -> None:
    torch.manual_seed(seed)
    keys = [torch.zeros(n, dtype=torch.float64 if double else torch.float32) for n in sizes]
    for p in keys:
        p.grad = torch.randn_like(p)
    g = Grads(Params(keys), [p.grad.clone() for p in keys])
    assert torch.equal(g.clip_norm_(0.7, norm_type), nn.utils.clip_grad_norm_(keys, 0.7, norm_type))
    equal(g, keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_normed_in_float32(dtype: torch.dtype) -> None:
    w = torch.zeros(100, dtype=dtype)
    g = Grads(Params([w]), [torch.full((100,), 3e4, dtype=dtype)])
    expected = g[w].float().norm()
    norm = g.norm()
    assert norm.dtype is torch.float32
    torch.testing.assert_close(norm, expected)
    assert g.clip_norm_(1.0) == norm
    assert g[w].dtype is dtype
    torch.testing.assert_close(g.norm(), torch.tensor(1.0), atol=5e-3, rtol=0)


def test_norm_zero_sees_imaginary_parts_too() -> None:
    """As in torch, it counts the tensors that aren't zero: the norm of the tensors' norms."""
    v, w = torch.ones(3, dtype=torch.complex64), torch.ones(1)
    assert Grads(Params([v, w]), [torch.tensor([1j, 0, 0]), torch.ones(1)]).norm(0) == 2


def test_without_any_gradient() -> None:
    assert Grads(Params(), []).norm() == 0
    w = torch.ones(2)
    g = gradient(lambda: 1.0, Params([w]))
    assert g.clip_norm_(1.0) == 0
    g.clip_value_(1.0)
    assert g[w] is None
    assert g.nonfinite() == []


def test_one_bound_is_symmetric_and_two_are_an_interval() -> None:
    w = torch.ones(4)
    values = torch.tensor([-3.0, -0.5, 0.5, math.nan])
    g = Grads(Params([w]), [values])
    torch.testing.assert_close(g.clip_value(1)[w], torch.tensor([-1.0, -0.5, 0.5, math.nan]), equal_nan=True)
    torch.testing.assert_close(
        g.clip_value(-2, 0.1)[w], torch.tensor([-2.0, -0.5, 0.1, math.nan]), equal_nan=True
    )
    torch.testing.assert_close(g.clip_value(lo=1, hi=2)[w][:3], torch.ones(3))


def test_a_missing_gradient_counts_as_zeros_for_an_interval_without_zero() -> None:
    w, b = torch.ones(2), torch.ones(2)
    g = gradient(lambda: w.sum() * 5, Params([w, b]))
    assert g.clip_value(-1, 2)[b] is None
    assert torch.equal(g.clip_value(1, 2)[b], torch.ones(2))


@pytest.mark.parametrize("bounds", [(2, 1), (-1,), (math.nan,), (0.0, math.nan)])
def test_bounds_that_cross_are_refused(bounds: tuple[float, ...]) -> None:
    w = torch.ones(2)
    g = Grads(Params([w]), [torch.ones(2)])
    with pytest.raises(ValueError, match="expected lo <= hi"):
        g.clip_value_(*bounds)
    assert torch.equal(g[w], torch.ones(2))


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_bound_that_would_turn_gradients_around_is_refused(max_norm: float) -> None:
    w = torch.ones(2)
    g = Grads(Params([w]), [torch.ones(2)])
    with pytest.raises(ValueError, match="expected max_norm to be at least 0, got"):
        g.clip_norm_(max_norm)
    assert torch.equal(g[w], torch.ones(2))


def test_arguments_of_other_kinds_are_refused() -> None:
    w, z = torch.ones(2), torch.ones(2, dtype=torch.complex64)
    g = Grads(Params([w]), [torch.ones(2)])
    with pytest.raises(TypeError, match="max_norm: expected a number"):
        g.clip_norm_("one")
    with pytest.raises(TypeError, match="norm_type: expected a number or 'inf'"):
        g.norm(None)
    with pytest.raises(TypeError, match="hi: expected a number"):
        g.clip_value(0.0, "1")
    with pytest.raises(TypeError, match="expected real values, got complex64"):
        Grads(Params([z]), [torch.ones(2, dtype=torch.complex64)]).clip_value_(1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_is_refused_on_request(bad: float) -> None:
    w, b = torch.ones(2), torch.ones(2)
    g = Grads(Params([w, b]), [torch.tensor([1.0, bad]), torch.ones(2)])
    with pytest.raises(RuntimeError, match="finite.*nonfinite\\(\\) says"):
        g.clip_norm_(1.0, error_if_nonfinite=True)
    assert torch.equal(g[b], torch.ones(2))
    w.grad, b.grad = g[w].clone(), g[b].clone()
    total = g.clip_norm_(1.0)
    assert torch.equal(total.isnan(), nn.utils.clip_grad_norm_([w, b], 1.0).isnan())
    torch.testing.assert_close(g[b], b.grad, equal_nan=True)


def test_nonfinite_names_the_parameters() -> None:
    model = nn.Linear(2, 3)
    alone = [
        torch.ones(2, dtype=torch.complex64),
        torch.ones(0),
        torch.ones(2, dtype=torch.float16),
        torch.ones(2),
    ]
    ps = Params([model, *alone])
    huge = torch.full((2,), 65504.0, dtype=torch.float16)
    big = torch.full((2,), 3e38) + 3e38j * torch.ones(2)  # finite, though its modulus isn't
    g = Grads(ps, [torch.tensor([[1.0, math.nan]] * 3), torch.ones(3), big, torch.ones(0), huge, None])
    assert g.nonfinite() == ["weight"]
    g[model.weight] = torch.ones(3, 2)
    assert g.nonfinite() == []
    g[alone[0]] = torch.tensor([0j, complex(0, math.inf)])
    (found,) = g.nonfinite()
    assert found is alone[0]


class Synchronizations(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_only_on_request() -> None:
    _, g = parameters([torch.float32])
    with Synchronizations() as waits:
        g.clip_norm_(1.0)
        g.clip_norm(1.0)
        g.clip_value_(1.0)
        g.norm()
        half = 0.5 * g + g
        half.assign_()
        half.accumulate_()
    assert waits.count == 0
    with Synchronizations() as waits:
        g.clip_norm_(1.0, error_if_nonfinite=True)
    assert waits.count > 0


def test_clipping_within_a_differentiation_is_differentiable() -> None:
    w = torch.tensor([3.0, 4.0], dtype=torch.float64)

    def outer() -> Tensor:
        g = gradient(lambda: (w**2).sum(), Params([w]))
        total = g.clip_norm_(1.0)
        return g[w][0] + total + g.clip_value(0.7)[w][1]

    def formula(w: Tensor) -> Tensor:
        g = 2 * w
        clipped = g * torch.clamp(1.0 / (g.norm() + 1e-6), max=1.0)
        return clipped[0] + g.norm() + clipped.clamp(-0.7, 0.7)[1]

    torch.testing.assert_close(gradient(outer, Params([w]))[w], torch.func.grad(formula)(w))


def test_values_of_several_dtypes_keep_theirs() -> None:
    w, b, z = torch.zeros(2, dtype=torch.float64), torch.zeros(()), torch.zeros((), dtype=torch.complex64)
    g = Grads(Params([w, b, z]), [torch.ones_like(w), torch.tensor(3.0), torch.tensor(4j)])
    clipped = g.clip_norm(1.0)
    g.clip_norm_(1.0)
    assert [v.dtype for v in clipped.values()] == [p.dtype for p in (w, b, z)]
    for p in (w, b, z):
        torch.testing.assert_close(clipped[p], g[p])


@pytest.mark.parametrize("take", ["gradient", "pullback"])
def test_gradients_lie_in_memory_as_backward_lays_them_out(take: str) -> None:
    """A convolution of channels-last input gives channels-last gradients, whose norms round differently."""
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 16, 3)
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    loss = lambda: layer(x).square().sum()
    ps = Params(layer)
    loss().backward()
    found = gradient(loss, ps) if take == "gradient" else pullback(loss, ps)[1](1.0)
    for p in ps:
        assert found[p].stride() == p.grad.stride()
        assert torch.equal(found[p], p.grad)
    assert torch.equal(found.norm(), nn.utils.get_total_norm([p.grad for p in ps]))


def test_flags_that_are_none_are_refused() -> None:
    p = torch.ones(2, requires_grad=True)
    g = gradient(lambda: (p**2).sum(), Params([p]))
    with pytest.raises(TypeError, match="error_if_nonfinite: expected True or False, got 'no'"):
        g.clip_norm_(1.0, error_if_nonfinite="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="share: expected True or False, got 'no'"):
        g.assign_(share="no")  # type: ignore[arg-type]


def test_values_that_cannot_be_clipped_leave_the_others_as_they_were() -> None:
    a, b = torch.zeros(2), torch.zeros(2)
    g = Grads(Params([a, b]), [torch.full((2,), 9.0), torch.tensor([9, 9])])
    with pytest.raises(RuntimeError, match="can't be cast"):
        g.clip_value_(1.5)
    assert g[a].tolist() == [9, 9]


def test_errors_name_what_was_called() -> None:
    w = torch.ones(2)
    g, z = Grads(Params([w]), [torch.ones(2)]), Grads(Params([w]), [torch.ones(2, dtype=torch.complex64)])
    for end in ("_", ""):
        with pytest.raises(ValueError, match=f"^clip_norm{end}: expected max_norm"):
            getattr(g, f"clip_norm{end}")(-1.0)
        with pytest.raises(ValueError, match=f"^clip_value{end}: expected lo <= hi"):
            getattr(g, f"clip_value{end}")(2.0, 1.0)
        with pytest.raises(
            TypeError, match=f"^clip_value{end}: expected real values.* clip_norm{end} scales"
        ):
            getattr(z, f"clip_value{end}")(1.0)


def test_large_complex_numbers_are_finite() -> None:
    w = torch.tensor([1 + 1j], dtype=torch.complex64)
    gs = gradient(lambda: w.abs().sum(), Params([w]))
    gs[w] = torch.tensor([3e38 + 3e38j], dtype=torch.complex64)
    assert len(gs.nonfinite()) == 0
    assert gs.norm(0).item() == 1


def test_imaginary_numbers_count() -> None:
    a, b, c = (torch.tensor(xs, dtype=torch.complex64) for xs in ([1j], [0j, 2j], [0j]))
    gs = gradient(lambda: sum((x.abs() ** 2).sum() / 2 for x in (a, b, c)), Params([a, b, c]))
    assert gs.norm(0).item() == 2
