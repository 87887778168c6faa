"""Buffer: values as plain assignment gives them, derivatives as out-of-place mathematics gives them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchzygote import Buffer, diaghessian, gradient, hessian_dual, hessian_reverse, jacobian

close = torch.testing.assert_close
Write = tuple[Any, Any]


# ---------------------------------------------------------------------------------------------------------
# random indices, as a tensor takes them


@st.composite
def indices(draw: st.DrawFn, shape: tuple[int, ...]) -> Any:
    """An index into an array of this shape; repeated elements of index arrays included."""
    if draw(st.integers(0, 7)) == 0:
        return draw(masks(shape[: draw(st.integers(1, len(shape)))]))
    items: list[Any] = []
    arrays: int | None = None
    for axis in range(draw(st.integers(0, len(shape)))):
        n = shape[axis]
        kind = draw(st.sampled_from(["int", "slice", "array", "list", "number"]))
        if kind == "slice":
            bounds = st.none() | st.integers(-n - 1, n + 1)
            items.append(slice(draw(bounds), draw(bounds), draw(st.none() | st.integers(1, 3))))
        elif kind in ("int", "number"):
            i = draw(st.integers(-n, n - 1))
            items.append(i if kind == "int" else draw(st.sampled_from([np.int64, torch.tensor]))(i))
        else:
            arrays = draw(st.integers(0, 3)) if arrays is None else arrays
            found = draw(st.lists(st.integers(-n, n - 1), min_size=arrays, max_size=arrays))
            items.append(found if kind == "list" else torch.tensor(found, dtype=torch.int64))
    where = draw(st.sampled_from(["nothing", "none", "ellipsis", "both"]))
    if where in ("none", "both"):
        items.insert(draw(st.integers(0, len(items))), None)
    if where in ("ellipsis", "both"):
        items.append(Ellipsis)
    return items[0] if len(items) == 1 and draw(st.booleans()) else tuple(items)


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    flags = draw(
        st.lists(st.booleans(), min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel())
    )
    return torch.tensor(flags, dtype=torch.bool).reshape(shape)


@st.composite
def value_shapes(draw: st.DrawFn, target: tuple[int, ...]) -> tuple[int, ...]:
    """A shape that broadcasts to the target."""
    shape = [n if draw(st.booleans()) else 1 for n in target]
    kept = shape[draw(st.integers(0, len(shape))) :]
    return tuple([1] * (draw(st.integers(0, 4)) == 0) + kept)


@st.composite
def programs(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[Any, tuple[int, ...], Any]]]:
    """A shape, and steps: where to write, the shape of the value, and where to read for the next value."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    numbers = torch.zeros(shape)
    steps = []
    for _ in range(draw(st.integers(1, 5))):
        index = draw(indices(shape))
        target = tuple(numbers[torch_index(index)].shape)
        steps.append((index, draw(value_shapes(target)), draw(st.none() | indices(shape))))
    return shape, steps


def torch_index(index: Any) -> Any:
    """The index as PyTorch wants it: lists are deprecated there when they stand alone."""
    if isinstance(index, tuple):
        return tuple(torch.tensor(i, dtype=torch.int64) if isinstance(i, list) else i for i in index)
    return torch.tensor(index, dtype=torch.int64) if isinstance(index, list) else index


def out_of_place(whole: Tensor, index: Any, value: Tensor) -> Tensor:
    """The mathematics of assignment: for each element, which value it gets; the last one wins."""
    numbers = torch.arange(whole.numel()).reshape(whole.shape)[torch_index(index)]
    while value.ndim > numbers.ndim:
        value = value[0]
    chosen = value.expand(numbers.shape).reshape(-1)
    source = list(range(whole.numel()))
    for k, position in enumerate(numbers.reshape(-1).tolist()):
        source[position] = whole.numel() + k
    return torch.cat([whole.reshape(-1), chosen])[torch.tensor(source, dtype=torch.int64)].reshape(
        whole.shape
    )


def run_with_buffer(shape: tuple[int, ...], steps: list[Any]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, *shape)
        for k, (index, value_shape, source) in enumerate(steps):
            value = value_of(x, k, value_shape)
            if source is not None:
                value = value * (1 + buf[source].sum())
            buf[index] = value
        return buf.copy()

    return f


def run_out_of_place(shape: tuple[int, ...], steps: list[Any]) -> Callable[[Tensor], Tensor]:
    def f(x: Tensor) -> Tensor:
        whole = torch.zeros(shape, dtype=x.dtype)
        for k, (index, value_shape, source) in enumerate(steps):
            value = value_of(x, k, value_shape)
            if source is not None:
                value = value * (1 + whole[torch_index(source)].sum())
            whole = out_of_place(whole, index, value)
        return whole

    return f


def value_of(x: Tensor, k: int, shape: tuple[int, ...]) -> Tensor:
    """Something nonlinear in ``x``, different in each element and step."""
    weights = torch.arange(1.0, torch.Size(shape).numel() + 1, dtype=x.dtype).reshape(shape)
    return torch.sin(x[k % 3] * weights + k) + x[(k + 1) % 3] * x[k % 2]


# ---------------------------------------------------------------------------------------------------------
# values and derivatives of random programs

POINT = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)


@given(programs())
def test_untracked_writes_are_plain_assignment(program: Any) -> None:
    shape, steps = program
    buf = Buffer(POINT, shape)
    expected = torch.zeros(shape, dtype=torch.float64)
    for k, (index, value_shape, source) in enumerate(steps):
        value = value_of(POINT, k, value_shape)
        buf[index] = value
        expected = out_of_place(expected, index, value)
        if source is not None:
            close(buf[source], expected[torch_index(source)])
    close(buf.copy(), expected)


@given(programs())
def test_values_and_first_derivatives_are_those_of_out_of_place_writes(program: Any) -> None:
    f, reference = run_with_buffer(*program), run_out_of_place(*program)
    close(f(POINT), reference(POINT))
    expected = torch.func.jacrev(reference)(POINT).reshape(-1, 3)
    for mode in ("reverse", "forward"):
        close(jacobian(f, POINT, mode=mode)[0], expected)
    close(torch.func.jacfwd(f)(POINT).reshape(-1, 3), expected)


@given(programs())
def test_second_derivatives_are_those_of_out_of_place_writes(program: Any) -> None:
    f, reference = run_with_buffer(*program), run_out_of_place(*program)
    energy = lambda x: (f(x) ** 2).sum()
    expected = torch.func.hessian(lambda x: (reference(x) ** 2).sum())(POINT)
    close(hessian_reverse(energy, POINT), expected)
    close(hessian_dual(energy, POINT), expected)
    close(diaghessian(energy, POINT)[0], expected.diagonal())
    close(torch.func.hessian(energy)(POINT), expected)


@given(programs())
def test_vmap_over_it_is_a_loop_over_it(program: Any) -> None:
    f, reference = run_with_buffer(*program), run_out_of_place(*program)
    points = torch.stack([POINT, POINT + 1, -POINT])
    close(torch.func.vmap(f)(points), torch.stack([reference(x) for x in points]))
    jacobians = torch.func.vmap(torch.func.jacrev(f))(points)
    close(jacobians, torch.stack([torch.func.jacrev(reference)(x) for x in points]))


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
        buf = Buffer(x, 200, 3)
        buf[0] = x
        for t in range(1, 200):
            buf[t] = torch.sin(buf[t - 1] * 1.1) + x * buf[max(t - 2, 0)]
        return buf.copy()

    def reference(x: Tensor) -> Tensor:
        rows = [x]
        for t in range(1, 200):
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
    order = [i % 150 for i in range(0, 150 * 7, 7)] + list(range(150)) + [3, 64, 3, 128, -1, 5] * 3
    x = POINT.clone().requires_grad_()
    buf = Buffer(x, 150, 3)
    rows = [torch.zeros(3, dtype=torch.float64)] * 150
    for k, i in enumerate(order):
        buf[i] = x * k
        rows[i] = x * k
        if k % 50 == 49:
            close(buf[60:70], torch.stack(rows[60:70]))
    weights = torch.randn(150, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad((buf.copy() * weights).sum(), x)
    close(found, torch.autograd.grad((torch.stack(rows) * weights).sum(), x)[0])


def test_a_large_value_read_in_small_parts() -> None:
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
    buf = Buffer(x, 200, 3)
    for i in range(200):
        buf[i] = x * i
    buf[:, 0] = x[0] * 1
    out = buf.copy()
    assert torch.equal(out[:, 1], torch.arange(200.0))
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [200, 19900, 19900]


def test_writing_under_no_grad_writes_a_constant() -> None:
    x = torch.ones(3, requires_grad=True)
    held = [x * 2 for _ in range(130)]
    buf = Buffer(x, 130, 3)
    for i in range(130):
        with torch.set_grad_enabled(i % 2 == 0):
            buf[i] = held.pop()
    with torch.no_grad():
        assert not buf[0].requires_grad
        assert not buf[:70].requires_grad
    assert buf[0].requires_grad
    assert torch.autograd.grad(buf.copy().sum(), x)[0].tolist() == [130, 130, 130]


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
# not a tensor


@pytest.mark.parametrize(
    "use",
    [
        lambda b, x: torch.matmul(b, x),
        lambda b, x: torch.matmul(x, b),
        lambda b, x: torch.stack([b, b]),
        lambda b, x: torch.sin(b),
        lambda b, x: torch.tensor(b),
        lambda b, x: torch.as_tensor(b),
        lambda b, x: torch.asarray(b),
        lambda b, x: torch.nn.functional.linear(b, x),
        lambda b, x: b + x,
        lambda b, x: x + b,
        lambda b, x: 2 * b,
        lambda b, x: b / 2,
        lambda b, x: x @ b,
        lambda b, x: b @ x,
        lambda b, x: b**2,
        lambda b, x: -b,
        lambda b, x: abs(b),
        lambda b, x: b < 1,
        lambda b, x: x < b,
        lambda b, x: b == x,
        lambda b, x: x == b,
        lambda b, x: b != 0,
        lambda b, x: operator_iadd(b, x),
        lambda b, x: operator_iadd(x.clone(), b),
        lambda b, x: np.asarray(b),
        lambda b, x: np.sin(b),
        lambda b, x: np.ones(3) + b,
        lambda b, x: np.stack([b, b]),
        lambda b, x: b.sum(),
        lambda b, x: b.T,
        lambda b, x: x in b,
        lambda b, x: x.__setitem__(slice(None), b),
        lambda b, x: b.append(Buffer(x)) if len(b) == 0 else b.__setitem__(0, Buffer(x)),
        lambda b, x: float(b),
    ],
)
@pytest.mark.parametrize("form", ["array", "list"])
def test_it_is_not_a_tensor(use: Any, form: str) -> None:
    x = torch.ones(3)
    buf = Buffer(x) if form == "array" else Buffer()
    with pytest.raises(TypeError, match="copy it first"):
        use(buf, x)


def operator_iadd(a: Any, b: Any) -> Any:
    a += b
    return a


def test_asking_for_a_method_says_no() -> None:
    buf = Buffer(torch.zeros(2))
    assert not hasattr(buf, "sum")
    assert not hasattr(buf, "nonsense")
    assert buf == buf
    assert len({buf, buf}) == 1


# ---------------------------------------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize(
    ("index", "error"),
    [
        (3, IndexError),
        (-4, IndexError),
        ((0, 4), IndexError),
        ((0, 0, 0), IndexError),
        ([0, 3], IndexError),
        (torch.tensor([0, -4]), IndexError),
        ((slice(None), torch.tensor([0, 9])), IndexError),
        (torch.ones(2, dtype=torch.bool), IndexError),
        (torch.ones(3, 3, dtype=torch.bool), IndexError),
        (torch.tensor([0.0, 1.0]), IndexError),
        (slice(None, None, -1), ValueError),
        ("x", TypeError),
        (1.5, TypeError),
    ],
)
@pytest.mark.parametrize("before", [None, 0, (slice(None), 0)])
def test_a_bad_index_is_refused_and_nothing_is_written(
    index: Any, error: type[Exception], tracked: bool, before: Any
) -> None:
    x = torch.ones(4, requires_grad=tracked)
    buf = Buffer(x, 3, 4)
    if before is not None:
        buf[before] = x[0] * 2
    expected = buf[...]
    with pytest.raises(error, match="index"):
        buf[index] = x[0] * 5
    with pytest.raises(error, match="index"):
        buf[index]
    assert torch.equal(buf.copy(), expected)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("index", [0, (0, slice(None)), slice(1, 3), ([0, 1],), (slice(None), 1), ...])
def test_a_value_that_does_not_broadcast_is_refused(index: Any, tracked: bool) -> None:
    x = torch.ones(5, requires_grad=tracked)
    for error in (ValueError, RuntimeError):
        buf = Buffer(x, 3, 4)
        with pytest.raises(error, match="value: expected a shape that broadcasts"):
            buf[index] = x * 2
        assert not buf.copy().any()


@pytest.mark.parametrize("value", ["x", None, [1.0, 2.0], object()])
def test_a_value_of_another_kind_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="value: expected a tensor"):
        Buffer(torch.zeros(2))[0] = value


def test_bad_shapes_are_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="shape: expected nonnegative"):
        Buffer(x, -1)
    for shape in ((1.5,), ("3",), (True,)):
        with pytest.raises(TypeError, match="shape: expected ints"):
            Buffer(x, *shape)
    with pytest.raises(TypeError, match="like"):
        Buffer("x", 3)
    with pytest.raises(TypeError, match="dtype"):
        Buffer(x, 3, dtype="float32")  # type: ignore[arg-type]


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
    assert torch.autograd.grad(total, x)[0].tolist() == [4, 4, 4]  # type: ignore[arg-type]


def test_three_nested_differentiations() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 3)
        buf[0] = x
        for i in (1, 2):
            buf[i] = buf[i - 1] * x
        return buf.copy().sum()

    x = torch.tensor(1.5, dtype=torch.float64)
    ours = lambda f: lambda x: gradient(f, x)[0]
    theirs = torch.func.grad
    for orders in itertools.product((ours, theirs), repeat=3):
        derivative = f
        for order in orders:
            derivative = order(derivative)
        close(derivative(x), torch.tensor(6.0, dtype=torch.float64))


def test_forward_mode_by_hand() -> None:
    import torch.autograd.forward_ad as fwAD

    with fwAD.dual_level():
        x = fwAD.make_dual(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]))
        buf = Buffer(x, 2, 2)
        buf[0] = x * x
        buf[:, 1] = buf[0, 0]
        primal, tangent = fwAD.unpack_dual(buf.copy())
    assert primal.tolist() == [[1, 1], [0, 1]]
    assert tangent is not None
    assert tangent.tolist() == [[20, 20], [0, 20]]


def test_indices_that_differ_between_examples() -> None:
    def f(x: Tensor, i: Tensor) -> Tensor:
        buf = Buffer(x, 4, 2)
        buf[i] = x[:2]
        buf[0, i % 2] = x[2] * buf[i].sum()
        return buf.copy()

    def reference(x: Tensor, i: int) -> Tensor:
        whole = out_of_place(torch.zeros(4, 2, dtype=x.dtype), i, x[:2])
        return out_of_place(whole, (0, i % 2), x[2] * whole[i].sum())

    points = torch.randn(3, 3, dtype=torch.float64)
    which = torch.tensor([1, 3, 0])
    expected = torch.stack([reference(x, i) for x, i in zip(points, which.tolist(), strict=True)])
    close(torch.func.vmap(f)(points, which), expected)
    jacobians = torch.func.vmap(torch.func.jacrev(f))(points, which)
    close(
        jacobians,
        torch.stack(
            [torch.func.jacrev(reference)(x, i) for x, i in zip(points, which.tolist(), strict=True)]
        ),
    )


def test_masks_that_differ_between_examples() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x)
        buf[...] = x
        buf[x > 0] = x.sum()
        return buf.copy()

    points = torch.randn(4, 5, dtype=torch.float64)
    reference = lambda x: torch.where(x > 0, x.sum(), x)
    close(torch.func.vmap(f)(points), torch.func.vmap(reference)(points))
    close(torch.func.jacrev(f)(points[0]), torch.func.jacrev(reference)(points[0]))


def test_a_batched_value_goes_into_an_unbatched_buffer() -> None:
    weights = torch.arange(3.0)

    def f(x: Tensor) -> Tensor:
        buf = Buffer(weights, 2, 3)
        buf[0] = weights
        buf[1, 1:] = x
        buf[0, 0] += x
        return buf.copy()

    assert torch.func.vmap(f)(torch.tensor([5.0, 6.0])).tolist() == [
        [[5, 1, 2], [0, 5, 5]],
        [[6, 1, 2], [0, 6, 6]],
    ]


def test_the_outer_buffer_of_an_inner_differentiation() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 3, 2)
        for i in range(3):
            buf[i] = gradient(lambda y: (y**3).sum() * x[0], x)[0] * buf[max(i - 1, 0)] + x
        return buf.copy()

    def reference(x: Tensor) -> Tensor:
        rows = [x, 3 * x**2 * x[0] * x + x]
        rows.append(3 * x**2 * x[0] * rows[-1] + x)
        return torch.stack(rows)

    x = torch.tensor([0.5, -0.3], dtype=torch.float64)
    close(jacobian(f, x)[0], torch.func.jacrev(reference)(x).reshape(6, 2))
    close(torch.func.jacfwd(f)(x), torch.func.jacrev(reference)(x))


# ---------------------------------------------------------------------------------------------------------
# torch.compile


def compiled_program(x: Tensor) -> Tensor:
    buf = Buffer(x, 4, 3)
    buf[0] = x
    for t in range(1, 4):
        buf[t] = torch.sin(buf[t - 1]) * x
        buf[t] += 1
    buf[1:3, 0] = x[:2]
    buf[torch.tensor([0, 3]), torch.tensor([2, 1])] = x[1] * 2
    return copy.copy(buf)


def compiled_reference(x: Tensor) -> Tensor:
    rows = [x]
    for _ in range(1, 4):
        rows.append(torch.sin(rows[-1]) * x + 1)
    whole = out_of_place(torch.stack(rows), (slice(1, 3), 0), x[:2])
    return out_of_place(whole, (torch.tensor([0, 3]), torch.tensor([2, 1])), x[1] * 2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_under_compile(backend: str) -> None:
    torch._dynamo.reset()
    energy = lambda x: (compiled_program(x) ** 2).sum()
    expected = torch.func.grad(lambda x: (compiled_reference(x) ** 2).sum())(POINT)
    close(torch.compile(compiled_program, fullgraph=True, backend=backend)(POINT), compiled_reference(POINT))
    x = POINT.clone().requires_grad_()
    close(torch.autograd.grad(torch.compile(energy, fullgraph=True, backend=backend)(x), x)[0], expected)
    inside = torch.compile(lambda x: gradient(energy, x)[0], fullgraph=True, backend=backend)
    close(inside(POINT), expected)
