"""showgrad: the source of its argument and the gradient, printed where and when one arrives."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from torchzygote import gradient, jacobian, pushforward, showgrad
from torchzygote._argument_text import on_one_line

func = torch.func


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value


def shown(f: Any, capsys: pytest.CaptureFixture[str], *args: Any) -> list[str]:
    gradient(f, *args)
    return capsys.readouterr().out.splitlines()


def test_showgrad_prints_the_source_of_its_argument(capsys: pytest.CaptureFixture[str]) -> None:
    # fmt: off
    def f(a: Tensor, b: Tensor) -> Tensor:
        holder, items = Holder(a), [a, {"key": b}]
        return (
            showgrad(a)
            + showgrad(holder.value)
            + showgrad(items[0])
            + showgrad(items[1]["key"])
            + showgrad(a*b + 1)
            + showgrad(x=b)
            + showgrad(torch.sin(a).cos())
            + showgrad(a, name="mine")
            + showgrad(a, "second")
        )

    # fmt: on
    lines = shown(f, capsys, 2.0, 3.0)
    names = {re.match(r"∂\((.*)\) = tensor\(1\.\)", line).group(1) for line in lines}
    expected = "a; holder.value; items[0]; items[1]['key']; a*b + 1; b; torch.sin(a).cos(); mine; second"
    assert names == set(expected.replace("'", '"').split("; "))


def test_showgrad_over_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def f(a: Tensor) -> Tensor:
        return showgrad(
            torch.stack(
                [
                    a,  # a comment, (with brackets
                    2   *   a,
                ]
            )
            .sum(),
        ) + showgrad(
            a
        )  # fmt: skip

    assert set(shown(f, capsys, 1.0)) == {
        "∂(torch.stack([a, 2 * a,]).sum()) = tensor(1.)",
        "∂(a) = tensor(1.)",
    }


def test_showgrad_without_source_or_call_says_x(capsys: pytest.CaptureFixture[str]) -> None:
    scope: dict[str, Any] = {"showgrad": showgrad}
    exec("f = lambda a: showgrad(a) * 2", scope)
    assert shown(scope["f"], capsys, 1.0) == ["∂(x) = tensor(2.)"]
    assert shown(lambda a: sum(map(showgrad, [a])), capsys, 1.0) == ["∂(x) = tensor(1.)"]
    assert shown(lambda a: functools.partial(showgrad, a)(), capsys, 1.0) == ["∂(x) = tensor(1.)"]
    assert shown(lambda a: showgrad(*[a]), capsys, 1.0) == ["∂(x) = tensor(1.)"]
    other = showgrad
    assert shown(lambda a: other(a), capsys, 1.0) == ["∂(a) = tensor(1.)"]


def test_showgrad_under_another_differentiation_prints_plain_values(
    x: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    def f(a: Tensor) -> Tensor:
        return (showgrad(a) ** 2).sum()

    jacobian(lambda a: showgrad(a) * 2, x[:2], mode="reverse")
    func.vmap(lambda a: gradient(f, a)[0])(x[None])
    gradient(lambda x: gradient(f, x)[0].sum(), x[:1])
    func.grad(func.grad(lambda a: f(a)))(x[0])
    assert capsys.readouterr().out.splitlines() == [
        "∂(a) = tensor([[2., 0.],",
        "        [0., 2.]], dtype=torch.float64)",
        "∂(a) = tensor([[ 1., -2.,  4.]], dtype=torch.float64)",
        "∂(a) = tensor([1.], dtype=torch.float64)",
        "∂(a) = tensor([2.], dtype=torch.float64)",
        "∂(a) = tensor(1., dtype=torch.float64)",
        "∂(a) = tensor(2., dtype=torch.float64)",
    ]


def test_showgrad_prints_none_where_nothing_arrives(capsys: pytest.CaptureFixture[str]) -> None:
    def f(a: Tensor, b: Tensor) -> Tensor:
        showgrad(b)
        return showgrad(a) * 2

    assert shown(f, capsys, 1.0, 2.0) == ["∂(a) = tensor(2.)", "∂(b) = None"]


def test_showgrad_prints_nothing_in_forward_mode(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    jacobian(lambda a: showgrad(a) * 2, x, mode="forward")
    pushforward(lambda a: showgrad(a) * 2, x)(x)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a", "a"),
        ("a  +  b", "a + b"),
        ("f(\n  a,\n  b\n)", "f(a, b)"),
        ("a  # comment\n+ b", "a + b"),
        ("x\n  .y", "x.y"),
        ("'two  spaces'", "'two  spaces'"),
        ("a if b\nelse c", "a if b else c"),
    ],
)
def test_source_on_one_line(text: str, line: str) -> None:
    assert on_one_line(text) == line
