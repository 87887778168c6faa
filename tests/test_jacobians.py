"""Jacobians: modes, chunks, counts of calls, what can't be batched, random functions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchzygote.gradients import gradient
from torchzygote.jacobians import jacobian, withjacobian
from torchzygote.params import Params


class Counted:
    """A function that counts its calls."""

    def __init__(self, f: Any) -> None:
        self.f = f
        self.calls = 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.f(*args)


@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    rows=st.integers(0, 4),
    mode=st.sampled_from(["auto", "reverse", "forward"]),
    chunk_size=st.sampled_from([None, 1, 2, 100]),
)
def test_any_shape_in_any_mode(shape: list[int], rows: int, mode: str, chunk_size: int | None) -> None:
    x = torch.linspace(0.5, 1.5, max(1, torch.Size(shape).numel()), dtype=torch.float64)
    x = x[: torch.Size(shape).numel()].reshape(shape)
    A = torch.linspace(-1, 1, rows * x.numel(), dtype=torch.float64).reshape(rows, x.numel())
    J = jacobian(lambda x: A @ x.reshape(-1).sin(), x, mode=mode, chunk_size=chunk_size)[0]
    expected = A * x.reshape(-1).cos()
    torch.testing.assert_close(J, expected.reshape(-1) if x.dim() == 0 else expected)


def test_f_is_called_once_in_reverse_mode() -> None:
    f = Counted(lambda x: torch.outer(x, x))
    jacobian(f, torch.randn(20), mode="reverse", chunk_size=7)
    assert f.calls == 1


def test_f_is_called_at_most_once_more_per_chunk_in_forward_mode() -> None:
    f = Counted(lambda x: x.repeat(20).sin())
    jacobian(f, torch.randn(6), mode="forward", chunk_size=2)
    assert f.calls <= 1 + 3


def test_auto_takes_the_cheaper_mode() -> None:
    """A wide Jacobian needs one pullback per row; a tall one would need 3000."""
    rows: list[int] = []

    class Watched(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            rows.append(1)
            return g

        @staticmethod
        def jvp(ctx: Any, t: Tensor) -> Tensor:
            return t.clone()

    jacobian(lambda x: Watched.apply(x).repeat(1000), torch.randn(3))
    assert rows == [1]  # one to compare with
    jacobian(lambda x: Watched.apply(x).sum(), torch.randn(3))
    assert rows


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_a_random_function_is_drawn_once(mode: str) -> None:
    def noisy(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * x

    x = torch.ones(8, dtype=torch.float64)
    torch.manual_seed(0)
    expected, after = noisy(x), torch.rand(1)
    torch.manual_seed(0)
    val, (J,) = withjacobian(noisy, x, mode=mode, chunk_size=3)
    assert torch.equal(val, expected)
    assert torch.equal(torch.rand(1), after)
    torch.testing.assert_close(J, torch.diag(2 * val))


class NeedsItem(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * g * x if g.sum().item() != 77 else g


def test_what_cannot_be_batched_goes_row_by_row_with_one_warning() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        J = jacobian(NeedsItem.apply, x, chunk_size=2)[0]
    torch.testing.assert_close(J, torch.diag(2 * x))
    assert len(caught) == 1
    assert "NeedsItem" in str(caught[0].message)
    assert "one at a time" in str(caught[0].message)


def test_old_style_functions_need_no_rule_on_the_tape() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, g):
            return 2 * g * ctx.saved_tensors[0]

    x = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(jacobian(Square.apply, x)[0], torch.diag(2 * x))


def test_forward_falls_back_where_there_is_no_forward_derivative() -> None:
    x = torch.tensor([1.0, 2.0])
    tall = lambda x: NeedsItem.apply(x).repeat(50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = jacobian(tall, x)[0]
    torch.testing.assert_close(found, torch.diag(2 * x).repeat(50, 1))
    with pytest.raises(RuntimeError, match="setup_context"):
        jacobian(tall, x, mode="forward")


def test_complex_input_follows_the_convention_of_gradient() -> None:
    z = torch.tensor([1 + 2j, 3 - 1j], dtype=torch.complex128)
    (J,) = jacobian(lambda z: z.abs() ** 2, z)
    torch.testing.assert_close(J, torch.diag(2 * z))
    with pytest.raises(ValueError, match="complex argument"):
        jacobian(lambda z: z.abs() ** 2, z, mode="forward")


@pytest.mark.parametrize("mode", ["auto", "reverse", "forward"])
@pytest.mark.parametrize("flag", [False, True])
def test_by_parameters(mode: str, flag: bool) -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=flag)
    v = torch.tensor([[3.0]], dtype=torch.float64)
    unused = torch.zeros(2, dtype=torch.float64)
    J = jacobian(lambda: (w**2).repeat(5) * v[0, 0], Params([w, v, unused]), mode=mode)
    torch.testing.assert_close(J[w], (2 * torch.diag(w.detach()) * 3).repeat(5, 1))
    torch.testing.assert_close(J[v], (w.detach() ** 2).repeat(5)[:, None])
    assert torch.equal(J[unused], torch.zeros(10, 2, dtype=torch.float64))
    assert w.requires_grad is flag
    assert not v.requires_grad


@pytest.mark.parametrize("uses", ["vmap", "function", "checkpoint"])
def test_parameters_are_seen_however_f_uses_them(uses: str) -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    X = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)

    def loss() -> Tensor:
        if uses == "vmap":
            return torch.func.vmap(lambda row: row @ w**2)(X)
        if uses == "function":
            return X @ NeedsItem.apply(w)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(lambda X: X @ w**2, X, use_reentrant=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        found = jacobian(loss, Params([w]))[w]
    torch.testing.assert_close(found, X * 2 * w)
    assert not w.requires_grad


def test_per_sample_gradients_by_parameters_under_vmap() -> None:
    from torchzygote.gradients import gradient

    layer = nn.Linear(2, 1)
    params = Params(layer)
    X = torch.randn(5, 2)
    found = torch.func.vmap(lambda x: gradient(lambda: layer(x).sum(), params)[layer.weight])(X)
    torch.testing.assert_close(found, X[:, None, :])
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf


def test_the_tape_is_gone_after_the_call() -> None:
    import weakref

    kept: list[weakref.ref[Tensor]] = []

    def f(x: Tensor) -> Tensor:
        y = x.exp()
        kept.append(weakref.ref(y))
        return y * x

    jacobian(f, torch.randn(3))
    assert kept[0]() is None


def test_progress_and_bad_options() -> None:
    x = torch.randn(4)
    torch.testing.assert_close(jacobian(torch.sin, x, chunk_size=1, progress=True)[0], torch.diag(x.cos()))
    with pytest.raises(
        ValueError, match="mode: expected one of 'auto', 'reverse', 'forward', got 'sideways'"
    ):
        jacobian(torch.sin, x, mode="sideways")
    with pytest.raises(ValueError, match="chunk_size: expected at least 1, got 0"):
        jacobian(torch.sin, x, chunk_size=0)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("keywords", [{}, {"chunk_size": 4}, {"sparse": True}])
def test_what_pytorch_batches_wrongly_is_not_batched(p: float, keywords: dict[str, Any]) -> None:
    """The batching rule of cdist's backward mixes the rows up (PyTorch 2.13)."""
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def f(x: Tensor) -> Tensor:
        return torch.cdist(x[:2], x[2:], p=p).reshape(-1)

    with pytest.warns(UserWarning, match="one at a time.*cdist"):
        found = jacobian(f, x, mode="reverse", **keywords)[0]
    rows = [gradient(lambda x, i=i: f(x)[i], x)[0].reshape(-1) for i in range(4)]
    torch.testing.assert_close(found.to_dense() if "sparse" in keywords else found, torch.stack(rows))


def test_a_pullback_that_breaks_down_at_zero_is_not_pulled_back() -> None:
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def f(x: Tensor) -> Tensor:
        return torch.logcumsumexp(x, 1)

    torch.testing.assert_close(jacobian(f, x, mode="forward")[0], jacobian(f, x, mode="reverse")[0])
    dense = jacobian(f, x, mode="forward", sparse=True)[0].to_dense()
    torch.testing.assert_close(dense, jacobian(f, x, mode="reverse")[0])
