"""A plan that colors columns by its own choice goes over to rows where forward mode can't be had."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import JacobianPlan, Params, hook, jacobian, plan_jacobian

REPEATS = 5


def repeated_identity(n: int) -> Tensor:
    return torch.eye(n).repeat(REPEATS, 1)


class Square(torch.autograd.Function):
    """Has no forward derivative, and autograd can't follow its backward."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy() * g.detach().numpy())


@torch.library.custom_op("torchzygote_tests::doubled_sine", mutates_args=())
def doubled_sine(x: Tensor) -> Tensor:
    return 2 * torch.sin(x)


doubled_sine.register_autograd(
    lambda ctx, g: 2 * g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)

# what forward mode can't be had for, and its derivative
UNPUSHABLE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "custom": (lambda x: Square.apply(x), lambda x: 2 * x),
    "library": (lambda x: doubled_sine(x), lambda x: 2 * x.cos()),
    "hook": (lambda x: hook(torch.neg, x) ** 2, lambda x: -2 * x),
}


@pytest.fixture(autouse=True)
def _rows_may_go_one_by_one() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rows are computed one at a time")
        yield


@pytest.mark.parametrize(("f", "slope"), UNPUSHABLE.values(), ids=UNPUSHABLE)
@pytest.mark.parametrize("by_params", [False, True])
def test_a_plan_with_a_given_sparsity_goes_over_at_its_first_call(
    f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], by_params: bool
) -> None:
    x = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
    calls = []

    def repeated(x: Tensor) -> Tensor:
        calls.append(1)
        return f(x).repeat(REPEATS)

    given: Any = Params([x]) if by_params else x
    what: Any = (lambda: repeated(x)) if by_params else repeated
    plan = plan_jacobian(what, given, sparsity=repeated_identity(3))
    assert plan.mode == "forward"  # f hasn't run
    assert not calls
    expected = repeated_identity(3).double() * slope(x)
    for _ in range(2):
        (found,) = plan(given).values() if by_params else plan(given)
        torch.testing.assert_close(found.to_dense(), expected)
        torch.testing.assert_close(plan.values(given)[0], found.values())
        assert plan.mode == "reverse"
        assert plan.ncolors == REPEATS
        assert plan.colors.numel() == 3 * REPEATS
    assert len(calls) <= 6  # an attempt at forward mode took two at most
    assert "mode 'reverse'" in repr(plan)


def test_a_mode_that_was_asked_for_stays(tmp_path: Path) -> None:
    x = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
    f, ps = lambda: Square.apply(x).repeat(REPEATS), Params([x])
    plan = plan_jacobian(f, ps, sparsity=repeated_identity(3), mode="forward")
    plan.save(tmp_path / "plan")
    for one in (plan, JacobianPlan.load(tmp_path / "plan", f)):
        with pytest.raises(RuntimeError, match="mode 'forward' with Params"):
            one(ps)
        assert one.mode == "forward"


def test_a_plan_that_went_over_is_saved_so(tmp_path: Path) -> None:
    x = torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64)
    f, ps = lambda: Square.apply(x).repeat(REPEATS), Params([x])
    plan = plan_jacobian(f, ps, sparsity=repeated_identity(3))
    expected = plan(ps)[x]
    plan.save(tmp_path / "plan")
    again = JacobianPlan.load(tmp_path / "plan", f)
    assert again.mode == "reverse"
    torch.testing.assert_close(again(ps)[x].values(), expected.values())


def test_a_found_structure_goes_over_where_f_takes_another_way() -> None:
    x = torch.tensor([0.5, 1.5], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return (Square.apply(x) if switched else x**2).repeat(REPEATS)

    switched = False
    plan = plan_jacobian(f, x)
    assert plan.mode == "forward"
    expected = plan(x)[0]
    assert plan.mode == "forward"
    switched = True
    torch.testing.assert_close(plan(x)[0].values(), expected.values())
    assert plan.mode == "reverse"


def test_what_fails_in_either_mode_leaves_the_plan_as_it_was() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise ArithmeticError("no derivative at all")

    x = torch.tensor([0.5, 1.5])
    plan = plan_jacobian(lambda x: Broken.apply(x).repeat(REPEATS), x, sparsity=repeated_identity(2))
    with pytest.raises(ArithmeticError, match="at all"):
        plan(x)
    assert plan.mode == "forward"


@pytest.mark.parametrize("fails", [False, True])
def test_random_numbers_are_those_of_one_call(fails: bool) -> None:
    x = torch.tensor([0.5, 1.5], dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return ((Square.apply(x) if fails else x**2) * torch.rand(2)).repeat(REPEATS)

    plan = plan_jacobian(f, x, sparsity=repeated_identity(2))
    torch.manual_seed(0)
    expected = jacobian(f, x, mode="reverse")[0]
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.testing.assert_close(plan(x)[0].to_dense(), expected)
    assert torch.equal(torch.rand(1), after)
    assert plan.mode == ("reverse" if fails else "forward")


def test_it_goes_over_inside_a_transform_too() -> None:
    x = torch.tensor([[0.5, 1.5], [2.0, 3.0]], dtype=torch.float64)
    f = lambda x: hook(torch.neg, x).pow(2).repeat(REPEATS)
    plan = plan_jacobian(f, x[0], sparsity=repeated_identity(2))
    found = torch.func.vmap(lambda x: plan.values(x)[0])(x)
    torch.testing.assert_close(found, (-2 * x).repeat(1, REPEATS))
    assert plan.mode == "reverse"
    torch.testing.assert_close(plan(x[0])[0].values(), found[0])


class PushedAlone(torch.autograd.Function):
    """Squares, with a forward derivative and no other."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Any:
        return 2 * ctx.saved_tensors[0] * tangent


def test_what_has_a_forward_derivative_alone_is_pushed_whatever_is_cheaper() -> None:
    x = torch.rand(12, dtype=torch.float64)
    plan = plan_jacobian(lambda x: PushedAlone.apply(x) * 1.0, x)  # type: ignore[no-untyped-call]
    for _ in range(2):
        torch.testing.assert_close(plan(x)[0].to_dense(), (2 * x).diag())
    assert "mode 'forward'" in repr(plan)
    with pytest.raises(NotImplementedError):
        plan_jacobian(lambda x: PushedAlone.apply(x) * 1.0, x, mode="reverse")(x)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(("numel", "mode"), [(20, "reverse"), (20_000, "forward")])
def test_where_colors_are_as_many_few_elements_are_pulled_back(numel: int, mode: str) -> None:
    x = torch.rand(numel, dtype=torch.float64)
    plan = plan_jacobian(lambda x: x * x.roll(1), x)
    assert f"2 colors, mode {mode!r}" in repr(plan)
    values = plan(x)[0].values()
    assert values.numel() == 2 * numel
    expected = torch.stack([x, x.roll(1)], 1)  # of columns i - 1 and i, but for the first row
    torch.testing.assert_close(values.view(-1, 2)[1:], expected[1:])


def test_fewer_colors_are_preferred_whatever_the_mode() -> None:
    """A column that all rows have, and a diagonal: two colors of columns, ten of rows."""
    plan = plan_jacobian(lambda x: x * x[0], torch.rand(10))
    assert "2 colors, mode 'forward'" in repr(plan)
    plan = plan_jacobian(lambda x: x[1:] * x[:-1], torch.rand(5))
    assert "2 colors, mode 'forward'" in repr(plan)
