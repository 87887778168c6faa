"""Buffer: what is written, what is read, dtypes, and what belongs to whom."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from buffer_programs import (
    POINT,
)
from oracles import recorded_names
from torch import Tensor

from torchzygote import Buffer, gradient, jacobian
from torchzygote._buffer.values import TEMPORARY

close = torch.testing.assert_close


# ---------------------------------------------------------------------------------------------------------
# particular writes


def test_the_example_of_the_contract() -> None:
    def vstack(xs: Tensor) -> Tensor:
        buf = Buffer(xs, len(xs), 5)
        for i in range(5):
            buf[:, i] = xs
        return copy.copy(buf)

    xs = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(vstack(xs), xs[:, None].expand(3, 5))
    assert torch.equal(gradient(lambda x: vstack(x).sum(), xs)[0], torch.full((3,), 5.0))


def test_elements_are_zero_until_written() -> None:
    for x in (torch.ones(2), torch.ones(2, requires_grad=True)):
        buf = Buffer(x, 4, 2)
        assert torch.equal(buf[3], torch.zeros(2))
        buf[1] = x * 2
        assert torch.equal(buf[0], torch.zeros(2))
        assert torch.equal(buf.copy(), torch.tensor([[0.0, 0], [2, 2], [0, 0], [0, 0]]))


def test_overwritten_values_get_a_zero_gradient() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        buf = Buffer(x, 4)
        buf[:3] = x
        buf[1:] = y
        return buf.copy().sum()

    x, y = torch.ones(3), torch.ones(3)
    dx, dy = gradient(f, x, y)
    assert torch.equal(dx, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(dy, torch.ones(3))


@pytest.mark.parametrize("tracked", [False, True])
def test_of_repeated_indices_the_last_value_stays(tracked: bool) -> None:
    n = 100_000  # enough for PyTorch to share the work among threads
    which = torch.arange(n) % 7
    values = torch.arange(float(n), requires_grad=tracked)
    buf = Buffer(values, 7)
    buf[which] = values * 1
    expected = torch.tensor([max(range(n - 7, n), key=lambda k: (k % 7 == r, k)) for r in range(7)]).float()
    out = buf.copy()
    assert torch.equal(out, expected)
    if tracked:
        (g,) = torch.autograd.grad(out.sum(), values)
        assert g.nonzero().flatten().tolist() == list(range(n - 7, n))


def test_a_recurrence_reads_what_it_wrote() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 600, 3)
        buf[0] = x
        for t in range(1, 600):
            buf[t] = torch.sin(buf[t - 1] * 1.1) + x * buf[max(t - 2, 0)]
        return buf.copy()

    def reference(x: Tensor) -> Tensor:
        rows = [x]
        for t in range(1, 600):
            rows.append(torch.sin(rows[-1] * 1.1) + x * rows[max(t - 2, 0)])
        return torch.stack(rows)

    x = POINT / 3
    close(f(x), reference(x))
    close(jacobian(f, x, mode="reverse")[0], torch.func.jacrev(reference)(x).reshape(-1, 3))


def test_adding_to_an_index() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 3, 3)
        buf[0] += x
        buf[:, 1] += x**2
        buf[0] *= 2
        buf[[0, 2], [0, 2]] -= x[:2]
        return buf.copy()

    def reference(x: Tensor) -> Tensor:
        zero = torch.zeros(())
        square = x**2
        return torch.stack(
            [
                torch.stack([2 * x[0] - x[0], 2 * (x[1] + square[0]), 2 * x[2]]),
                torch.stack([zero, square[1], zero]),
                torch.stack([zero, square[2], -x[1]]),
            ]
        )

    close(f(POINT), reference(POINT))
    close(jacobian(f, POINT)[0], torch.func.jacrev(reference)(POINT).reshape(9, 3))
    points = torch.stack([POINT, 2 * POINT])
    close(torch.func.vmap(f)(points), torch.func.vmap(reference)(points))
    close(
        torch.func.vmap(torch.func.hessian(lambda x: f(x).prod(0).sum()))(points).shape, torch.Size([2, 3, 3])
    )


def test_writing_its_own_overlapping_read() -> None:
    x = torch.arange(5.0, requires_grad=True)
    buf = Buffer(x)
    buf[...] = x * 1
    buf[1:] = buf[:-1]
    out = buf.copy()
    assert out.tolist() == [0, 0, 1, 2, 3]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [2, 1, 1, 1, 0]


def test_rows_written_over_and_over_in_any_order() -> None:
    """The rows of a Buffer are put together in blocks, which later writes break up."""
    order = [i % 600 for i in range(0, 600 * 7, 7)] + list(range(600)) + [3, 256, 3, 512, -1, 5] * 3
    x = POINT.clone().requires_grad_()
    buf = Buffer(x, 600, 3)
    rows = [torch.zeros(3, dtype=torch.float64)] * 600
    for k, i in enumerate(order):
        buf[i] = x * k
        rows[i] = x * k
        if k % 100 == 99:
            close(buf[250:260], torch.stack(rows[250:260]))
    weights = torch.randn(600, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad((buf.copy() * weights).sum(), x)
    close(found, torch.autograd.grad((torch.stack(rows) * weights).sum(), x)[0])


@pytest.mark.parametrize("worth", [0, 1000, 1 << 17])
def test_a_large_value_read_in_small_parts(worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Split into chunks at once, after a while, and never."""
    monkeypatch.setattr("torchzygote._buffer.pieces._WORTH_A_CHUNK", worth)

    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 61, 53)
        buf[...] = x.reshape(61, 53) ** 2
        for i in range(1, 61):
            buf[i, 1:] = buf[i - 1, :-1] * 0.5 + buf[i, 1:]
        buf[7, 7] = buf[6, 6] * buf[60, 50]
        return buf.copy()

    def reference(x: Tensor) -> Tensor:
        rows = list((x.reshape(61, 53) ** 2).unbind())
        for i in range(1, 61):
            rows[i] = torch.cat([rows[i][:1], rows[i - 1][:-1] * 0.5 + rows[i][1:]])
        rows[7] = torch.cat([rows[7][:7], (rows[6][6] * rows[60][50])[None], rows[7][8:]])
        return torch.stack(rows)

    x = torch.randn(61 * 53, dtype=torch.float64)
    weights = torch.randn(61, 53, dtype=torch.float64)
    close(f(x), reference(x))
    found = gradient(lambda x: (f(x).sin() * weights).sum(), x)[0]
    close(found, torch.func.grad(lambda x: (reference(x).sin() * weights).sum())(x))


def test_what_is_written_over_many_times_is_forgotten() -> None:
    x = torch.ones(1, requires_grad=True)
    buf = Buffer(x, 4, 4)
    for k in range(30_000):
        buf[k % 4, 1:3] = x * k
    assert buf._store.total < 30_000
    out = buf.copy()
    assert out.tolist() == [[0, 29996 + i, 29996 + i, 0] for i in range(4)]
    assert torch.autograd.grad(out.sum(), x)[0].item() == sum(2 * (29996 + i) for i in range(4))


# ---------------------------------------------------------------------------------------------------------
# values, not views


@pytest.mark.parametrize("index", [0, slice(0, 2), (0, slice(None)), (slice(None), 1)])
def test_what_was_read_is_a_value(index: Any) -> None:
    for x in (torch.ones(3), torch.ones(3, requires_grad=True)):
        buf = Buffer(x, 2, 3)
        buf[0] = x * 2
        buf[1] = x * 3
        before = buf[index]
        kept = before.detach().clone()
        buf[index] = 7
        assert torch.equal(before, kept)
        with torch.no_grad():
            buf[index].add_(100)
        assert bool((buf[index] == 7).all())


def test_changing_in_place_what_was_written_changes_nothing() -> None:
    x = torch.ones(3, requires_grad=True)
    for index in (0, (0, slice(None)), (slice(0, 1),)):
        h = x * 2
        row = h[None][0]
        buf = Buffer(x, 4, 3)
        buf[index] = h
        buf[1] = h.view(3)
        buf[2] = h.detach()
        buf[3] = row
        h.mul_(10)
        out = buf.copy()
        assert torch.equal(out, torch.full((4, 3), 2.0))
        assert torch.autograd.grad(out.sum(), x)[0].tolist() == [6, 6, 6]


@pytest.mark.filterwarnings("ignore:Using backward")
def test_memory_shared_with_others_is_copied() -> None:
    x = torch.ones(3, requires_grad=True)
    array = np.ones(3, dtype=np.float32)
    base = x * 2
    leaf = torch.ones(3, requires_grad=True)
    (leaf * leaf * x).sum().backward(create_graph=True)
    assert leaf.grad is not None
    buf = Buffer(x, 4, 3)
    buf[3] = x * 0
    buf[0] = torch.from_numpy(array)
    buf[1] = base[:]
    buf[2] = leaf.grad
    kept = buf[...].detach()
    array[:] = 100
    with torch.no_grad():
        base.zero_()
        leaf.grad.zero_()
    assert torch.equal(buf.copy(), kept)
    leaf.grad = None  # breaks the cycle that create_graph made


def test_an_interpreter_that_hides_who_holds_a_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then every value is copied."""
    monkeypatch.setattr("torchzygote.buffer.TEMPORARY", -1)
    x = torch.ones(3, requires_grad=True)
    buf = Buffer(x, 600, 3)
    for i in range(600):
        buf[i] = x * i
    buf[:, 0] = x[0] * 1
    out = buf.copy()
    assert torch.equal(out[:, 1], torch.arange(600.0))
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [600, 179700, 179700]


@pytest.mark.parametrize("key", [slice(None, None, 8), (slice(None), 3), torch.arange(0, 64, 9), (2, 5)])
def test_what_is_read_once_is_not_split(key: Any) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    buf = Buffer(x)
    buf[...] = x * 2
    found = buf[key]
    assert torch.equal(found, (x * 2)[key])
    assert len(recorded_names(found)) < 10


@pytest.mark.parametrize("key", [lambda i: i, lambda i: (slice(None), i), lambda i: (slice(i, i + 1), ...)])
def test_only_what_somebody_holds_is_copied(key: Any) -> None:
    """Neither rows nor other parts: the graph has a ``clone`` for each held value, and no other."""

    def clones(hold: bool) -> int:
        x = torch.ones(4, requires_grad=True)
        buf = Buffer(x, 4, 4)
        for i in range(4):
            if hold:
                row = x * i
                buf[key(i)] = row
            else:
                buf[key(i)] = x * i
        return recorded_names(buf.copy()).count("CloneBackward0")

    assert clones(hold=True) == 4
    assert clones(hold=False) == (0 if TEMPORARY > 0 else 4)


def test_writing_under_no_grad_writes_a_constant() -> None:
    x = torch.ones(3, requires_grad=True)
    held = [x * 2 for _ in range(600)]
    buf = Buffer(x, 600, 3)
    for i in range(600):
        with torch.set_grad_enabled(i % 2 == 0):
            buf[i] = held.pop()
    with torch.no_grad():
        assert not buf[0].requires_grad
        assert not buf[:300].requires_grad
    assert buf[0].requires_grad
    assert torch.autograd.grad(buf.copy().sum(), x)[0].tolist() == [600, 600, 600]


@pytest.mark.parametrize("size", [3, 600])
def test_reading_in_inference_mode_changes_no_derivative(size: int) -> None:
    """What a read splits or puts together for later ones is recorded."""
    x = torch.ones(64, 64, requires_grad=True)
    rows, parts = Buffer(x, size, 64), Buffer(x)
    for i in range(size):
        rows[i] = x[0] * 2
    parts[...] = x * 2
    with torch.inference_mode():
        for _ in range(100):
            assert not rows[1].requires_grad
            assert not parts[3, 5].requires_grad
    assert torch.autograd.grad(rows.copy().sum(), x)[0][0].tolist() == [2 * size] * 64
    assert torch.autograd.grad(parts[3, 5], x)[0].sum() == 2


def test_a_row_written_in_inference_mode_is_a_constant() -> None:
    x = torch.ones(3, requires_grad=True)
    buf = Buffer(x, 600, 3)
    for i in range(600):
        with torch.inference_mode(i == 256):
            buf[i] = x * 2
    assert torch.autograd.grad(buf.copy().sum(), x)[0].tolist() == [1198, 1198, 1198]


def test_copying_gives_the_memory_itself() -> None:
    buf = Buffer(torch.zeros(()), 5)
    buf[2] = 1.0
    first = buf.copy()
    assert copy.copy(buf).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("write", [lambda b: b.__setitem__(0, 1.0), lambda b: b.__setitem__(slice(1), 1.0)])
@pytest.mark.parametrize("tracked", [False, True])
def test_a_copied_buffer_refuses_writes(write: Any, tracked: bool) -> None:
    x = torch.ones(2, requires_grad=tracked)
    buf = Buffer(x, 2)
    buf[0] = x[0] * 2
    copy.copy(buf)
    with pytest.raises(RuntimeError, match="copied"):
        write(buf)
    with pytest.raises(RuntimeError, match="copied"):
        buf[0] += 1
    assert buf[0].item() == 2
    assert "frozen" in repr(buf)


# ---------------------------------------------------------------------------------------------------------
# dtypes and devices


def test_dtype_and_device_come_from_like() -> None:
    buf = Buffer(torch.zeros(2, dtype=torch.float64), 3, 5)
    assert (buf.shape, buf.ndim, buf.dtype, len(buf)) == (torch.Size([3, 5]), 2, torch.float64, 3)
    assert buf.device == torch.device("cpu")
    assert buf.size() == torch.Size([3, 5])
    assert buf.size(1) == 5
    assert Buffer(torch.zeros(2, 4)).shape == (2, 4)
    assert Buffer(torch.zeros(2), (3, 4)).shape == (3, 4)
    assert Buffer(torch.zeros(2), ()).shape == ()
    assert Buffer(np.zeros(2), 3).dtype == torch.float64
    assert Buffer(torch.zeros(2), 3, dtype=torch.int32).dtype == torch.int32
    assert Buffer(buf).shape == (3, 5)
    assert Buffer(torch.zeros(2), np.int64(2)).shape == (2,)


@pytest.mark.parametrize("value", [1.0, 1j, torch.ones(2), torch.ones(2, dtype=torch.complex64), np.ones(2)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_fractions_are_refused_by_integer_buffers(value: Any, dtype: torch.dtype) -> None:
    buf = Buffer(torch.zeros(2), 3, 2, dtype=dtype)
    with pytest.raises(TypeError, match="value: expected what a Buffer of dtype"):
        buf[0] = value
    with pytest.raises(TypeError, match="value: expected what a Buffer of dtype"):
        buf[:, 0] = value if not hasattr(value, "shape") else value[0]
    assert not buf.copy().any()


def test_imaginary_parts_are_refused_by_real_buffers() -> None:
    buf = Buffer(torch.zeros(2))
    for value in (1j, torch.tensor(1j), np.array(1j)):
        with pytest.raises(TypeError, match=r"\.real"):
            buf[0] = value


def test_values_are_converted_as_assignment_converts() -> None:
    x = torch.tensor([1.5, 2.5], dtype=torch.float64, requires_grad=True)
    buf = Buffer(torch.zeros(2, dtype=torch.float32), 6, 2)
    buf[0] = x * 1
    buf[1] = torch.tensor([3, 4])
    buf[2] = True
    buf[3] = np.float64(0.5)
    buf[4] = np.array([1, 2], dtype=np.int32)
    out = buf.copy()
    assert out.dtype == torch.float32
    assert out.tolist() == [[1.5, 2.5], [3, 4], [1, 1], [0.5, 0.5], [1, 2], [0, 0]]
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.float64
    complex_buffer = Buffer(torch.zeros(2, dtype=torch.complex64))
    complex_buffer[:] = x
    assert torch.autograd.grad(complex_buffer.copy().real.sum(), x)[0].tolist() == [1, 1]


# ---------------------------------------------------------------------------------------------------------
# corners


def test_empty_and_zero_dimensional_buffers() -> None:
    x = torch.ones((), requires_grad=True)
    single = Buffer(x)
    single[...] = x * 3
    single[()] = single[...] * 2
    assert single.copy().item() == 6
    with pytest.raises(TypeError, match="len"):
        len(Buffer(x))
    empty = Buffer(x, 0, 3)
    empty[...] = x * 2
    empty[:, 1] = 5
    assert empty.copy().shape == (0, 3)
    assert list(empty) == []
    thin = Buffer(x, 3, 0)
    thin[1] = x * 2
    assert thin.copy().shape == (3, 0)


def test_iteration_gives_values() -> None:
    x = torch.arange(3.0, requires_grad=True)
    buf = Buffer(x, 3, 2)
    for i in range(3):
        buf[i] = x[i] * 2
    assert [row.tolist() for row in buf] == [[0, 0], [2, 2], [4, 4]]
    total = sum(row.sum() for row in buf)
    assert torch.autograd.grad(total, x)[0].tolist() == [4, 4, 4]


@pytest.mark.parametrize("index", [True, (1, True), (torch.tensor(True), 0, 1), (..., True), (2, 1, False)])
def test_a_mask_without_axes(index: Any) -> None:
    whole = torch.zeros(3, 2, dtype=POINT.dtype)
    whole[index] = 2.0

    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 3, 2)
        buf[index] = x[0]
        return buf.copy()

    x = torch.full((3,), 2.0, dtype=POINT.dtype)
    assert torch.equal(f(x), whole)
    assert torch.equal(jacobian(f, x)[0][:, 0], (whole / 2).reshape(-1))


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_list_of_lists_is_what_it_is_to_a_tensor() -> None:
    for tracked in (False, True):
        whole, index = torch.zeros(3, 2), [[0, 2, 1], [1, 0, 1]]
        whole[index] = 1.0
        buf = Buffer(whole)
        buf[index] = torch.ones((), requires_grad=tracked)
        assert torch.equal(buf[index], whole[index])
        assert torch.equal(buf.copy(), whole)


@pytest.mark.parametrize("differentiated", [False, True])
def test_an_ellipsis_that_covers_no_axis_keeps_index_arrays_together(differentiated: bool) -> None:
    i, j = torch.tensor([0, 1]), torch.tensor([1, 0])
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).requires_grad_(differentiated)
    plain = torch.zeros(2, 2, 2)
    plain[:, i, ..., j] = value.detach()
    buf = Buffer(plain)
    buf[:, i, ..., j] = value
    assert torch.equal(buf[:, i, ..., j], value)
    assert torch.equal(buf.copy(), plain)
