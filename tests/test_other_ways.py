"""Where memory runs out, no other way is taken: it would take more, or far longer without a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import Function

from torchzygote import hessian, jacobian, plan_hessian, plan_jacobian
from torchzygote._other_ways import another_may_do, cut_off, first_that_does, suppressed

X = torch.tensor([1.0, 2.0, 3.0])


def lacking() -> None:
    raise RuntimeError("no such derivative")


def of_a_device() -> None:
    raise torch.OutOfMemoryError("tried to allocate")


def of_the_cpu() -> None:
    torch.empty(1 << 48)


def of_python() -> None:
    raise MemoryError


NO_MEMORY: list[Callable[[], None]] = [of_a_device, of_the_cpu, of_python]
# What the derivative that is tried first does.
failing: Callable[[], None] = lacking


class Square(Function):
    """In forward mode it fails."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return Square.apply(x), dims[0]  # type: ignore[no-untyped-call]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        failing()
        return 2 * ctx.saved_tensors[0] * tangent


class Cube(Function):
    """Its second derivative fails in reverse mode, and not in forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Slope.apply(ctx.saved_tensors[0]) * grad  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 3 * x**2 * tangent


class Slope(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 3 * x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        failing()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return 6 * x * tangent


def squares(x: Tensor) -> Tensor:
    """Many elements of few: forward mode is tried first."""
    return torch.cat([Square.apply(x)] * 12)  # type: ignore[no-untyped-call]


def cubes(x: Tensor) -> Tensor:
    found: Tensor = Cube.apply(x).sum()  # type: ignore[no-untyped-call]
    return found


SPARSE = torch.eye(3).repeat(12, 1)
JACOBIANS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: jacobian(squares, X)[0],
    "sparse": lambda: jacobian(squares, X, sparse=True)[0].to_dense(),
    "plan": lambda: plan_jacobian(squares, X, sparsity=SPARSE)(X, dense=True)[0],
}
HESSIANS: dict[str, Callable[[], Tensor]] = {
    "dense": lambda: hessian(cubes, X),
    "sparse": lambda: hessian(cubes, X, sparse=True).to_dense(),
    "plan": lambda: plan_hessian(cubes, X, sparsity=torch.eye(3))(X, dense=True),
}
ALL = {
    **{f"jacobian, {name}": call for name, call in JACOBIANS.items()},
    **{f"hessian, {name}": call for name, call in HESSIANS.items()},
}


@pytest.mark.parametrize("name", ALL)
def test_another_way_does_what_this_one_lacks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "failing", lacking)
    expected = (2 * X).diag().repeat(12, 1) if name.startswith("jacobian") else (6 * X).diag()
    torch.testing.assert_close(ALL[name](), expected)


@pytest.mark.parametrize("no_memory", NO_MEMORY)
@pytest.mark.parametrize("name", ALL)
def test_a_lack_of_memory_is_raised(
    name: str, no_memory: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "failing", no_memory)
    with pytest.raises((torch.OutOfMemoryError, MemoryError, RuntimeError), match="allocate|^$"):
        ALL[name]()


def raised_by(call: Callable[[], None]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError


def test_which_errors_are_got_around() -> None:
    assert another_may_do(raised_by(lacking))
    assert another_may_do(NotImplementedError())
    assert not any(another_may_do(raised_by(call)) for call in NO_MEMORY)
    assert not another_may_do(cut_off("for good"))
    assert not another_may_do(KeyboardInterrupt())
    assert not another_may_do(None)
    with suppressed():
        lacking()
    with pytest.raises(MemoryError), suppressed():
        of_python()


def test_the_first_error_is_raised_if_all_fail() -> None:
    def attempt(way: str) -> str:
        if way == "c":
            return "found"
        raise KeyError(way)

    assert first_that_does(attempt, "abc") == ("c", "found")
    with pytest.raises(KeyError, match="a"):
        first_that_does(attempt, "ab")
