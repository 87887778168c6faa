"""Buffer in every mode of differentiation, under vmap and torch.compile, to several orders."""

from __future__ import annotations

import copy
import itertools
import operator
from typing import Any

import pytest
import torch
from buffer_programs import (
    POINT,
    out_of_place,
    programs,
    run_out_of_place,
    run_with_buffer,
    torch_index,
    value_of,
)
from hypothesis import given
from needs_torch import copy_compiled, hooks_compiled
from torch import Tensor

from torchzygote import Buffer, diaghessian, gradient, hessian_dual, hessian_reverse, hook, jacobian

close = torch.testing.assert_close


# ---------------------------------------------------------------------------------------------------------
# values and derivatives of random programs


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
# corners


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


IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow")
IN_PLACE_BITS = ("iand", "ior", "ixor", "ilshift", "irshift")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float64) for name in IN_PLACE]
    + [(name, torch.int64) for name in IN_PLACE + IN_PLACE_BITS if name != "itruediv"],
)
def test_each_in_place_operator_on_an_index_takes_a_batched_value(name: str, dtype: torch.dtype) -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(torch.zeros(2, dtype=dtype))
        buf[0] = 5
        buf[1] = 7
        buf[0] = getattr(operator, name)(buf[0], x)
        items = Buffer()
        items.append(buf[1])
        items[0] = getattr(operator, name)(items[0], x)
        return torch.stack([buf[0], items[0]])

    points = torch.tensor([1, 3], dtype=dtype)
    expected = [[getattr(operator, name)(torch.tensor(v, dtype=dtype), x) for v in (5, 7)] for x in points]
    assert torch.func.vmap(f)(points).tolist() == torch.tensor(expected).tolist()


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
    return buf.copy()


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


@copy_compiled
def test_compiled_copy_copy() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 2)
        buf[0], buf[1] = x[0] * x[1], x[2]
        return (copy.copy(buf) ** 2).sum()

    compiled = torch.compile(lambda x: gradient(f, x)[0], fullgraph=True, backend="eager")
    close(compiled(POINT), torch.func.grad(lambda x: (x[0] * x[1]) ** 2 + x[2] ** 2)(POINT))


@hooks_compiled
@pytest.mark.parametrize("write", ["column", "element", "part"])
def test_compiled_after_a_hook(write: str) -> None:
    """What is set on an object after a hook was registered is forgotten by the tracer (PyTorch 2.13)."""
    w = torch.tensor([0.5, 2.0, 3.0])

    def f(x: Tensor, hooked: bool) -> Tensor:
        buf = Buffer(x, 3, 3)
        buf[0] = hook(lambda g: None, x.sin()) if hooked else x.sin()
        if write == "column":
            buf[:, 2] = buf[:, 2] * w
        elif write == "element":
            buf[1, 0] += buf[0, 2]
        else:
            buf[2, :2] = buf[0][1:] * 3
        return buf.copy().sum()

    x = torch.tensor([0.1, 0.2, 0.3])
    compiled = torch.compile(torch.func.grad(lambda x: f(x, True)), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), torch.func.grad(lambda x: f(x, False))(x))


def test_an_empty_batch() -> None:
    def f(x: Tensor) -> Tensor:
        buf = Buffer(x, 2, 3)
        buf[:] = torch.stack([x, x**2])
        return buf[0] * buf[1]

    assert torch.func.vmap(f)(torch.zeros(0, 3)).shape == (0, 3)
