"""Everything composes: each utility in each way to differentiate, against the same mathematics without it.

The table in docs/composition.md is written from what is tested here: ``python tests/test_composition.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from needs_torch import hooks_compiled, hooks_compiled_twice
from torch import Tensor

from torchzygote import (
    Buffer,
    checkpointed,
    diaghessian,
    forwarddiff,
    gradient,
    hessian,
    hessian_dual,
    hessian_reverse,
    hook,
    ignore_derivatives,
    jacobian,
    pullback,
    pushforward,
    showgrad,
)

Function = Callable[[Tensor], Tensor]

# ---- rows: a function of a vector that uses the utility, and the same without it -------------------------


def body(x: Tensor) -> Tensor:
    return (x.sin() * x.roll(1) + x.exp() * x[0]).tanh() * x


def energy(y: Tensor) -> Tensor:
    return (y.sin() * y.roll(1)).sum() + (y**3 * y[0]).sum()


def with_structure(x: Tensor) -> Tensor:
    parts = hook(lambda g: {"a": g["a"] * 1.0, "b": [g["b"][0], None]}, {"a": x, "b": [x.sin(), "text"]})
    return body(parts["a"]) * parts["b"][0]


def with_buffer(x: Tensor) -> Tensor:
    buf = Buffer(x, 2, len(x))
    buf[0] = body(x)
    buf[1, 0] = x[0] * x[1]
    for i in range(1, len(x)):
        buf[1, i] = buf[1, i - 1] * x[i]  # reads back what was written
    buf[0, 1] = x[2]  # overwrites
    return buf.copy().reshape(-1)


def without_buffer(x: Tensor) -> Tensor:
    first, second = body(x).unbind(), [x[0] * x[1]]
    for i in range(1, len(x)):
        second.append(second[-1] * x[i])
    return torch.stack([first[0], x[2], *first[2:], *second])


ROWS: dict[str, tuple[Function, Function]] = {
    "`hook`": (lambda x: body(hook(lambda g: g * 1.0, x)) * hook(lambda g: None, x), lambda x: body(x) * x),
    "`hook` of a structure": (with_structure, lambda x: body(x) * x.sin()),
    "`showgrad`": (lambda x: body(showgrad(x)) + showgrad(x.sin()), lambda x: body(x) + x.sin()),
    "`ignore_derivatives`": (
        lambda x: body(x) * ignore_derivatives(x**2) * ignore_derivatives(lambda: x.exp()),
        lambda x: body(x) * (x.detach() ** 2 * x.detach().exp()),
    ),
    "`Buffer`": (with_buffer, without_buffer),
    "`forwarddiff`": (lambda x: forwarddiff(body, x * x) * x, lambda x: body(x * x) * x),
    "`checkpointed`": (
        lambda x: checkpointed(lambda y: checkpointed(body, y) * x, x.sin()),
        lambda x: body(x.sin()) * x,
    ),
    "`gradient` nested": (lambda x: gradient(energy, x)[0] * x, lambda x: torch.func.grad(energy)(x) * x),
    "`jacobian` nested": (lambda x: jacobian(body, x)[0] @ x, lambda x: torch.func.jacrev(body)(x) @ x),
    "`hessian` nested": (lambda x: hessian(energy, x) @ x, lambda x: torch.func.hessian(energy)(x) @ x),
    "`diaghessian` nested": (
        lambda x: diaghessian(energy, x)[0] * x,
        lambda x: torch.func.hessian(energy)(x).diagonal() * x,
    ),
}

# ---- columns: ways to differentiate a function of a vector, and the order of what they give --------------


def total(f: Function) -> Function:
    """A scalar function, whose cotangents differ from element to element."""

    def scalar(x: Tensor) -> Tensor:
        y = f(x)
        return (y * torch.arange(1.0, len(y) + 1, dtype=y.dtype)).sum()

    return scalar


def batch(x: Tensor) -> Tensor:
    return torch.stack([x, x.flip(0) + 0.1])


def rows_of(back: Callable[[Tensor], Any], y: Tensor) -> Tensor:
    return torch.stack([back(e)[0] for e in torch.eye(len(y), dtype=y.dtype)])


func = torch.func
Column = Callable[[Function, Tensor], Tensor]

COLUMNS: dict[str, list[Column]] = {
    "`gradient`": [
        lambda f, x: gradient(total(f), x)[0],
        lambda f, x: jacobian(lambda x: gradient(total(f), x)[0], x, mode="reverse")[0],
    ],
    "`pullback`": [
        lambda f, x: rows_of(pullback(f, x)[1], f(x)),
        lambda f, x: gradient(lambda x: (pullback(f, x)[1](x.new_ones(len(f(x))))[0] ** 2).sum(), x)[0],
    ],
    "`pushforward`": [
        lambda f, x: pushforward(f, x)(torch.ones_like(x)),
        lambda f, x: gradient(lambda x: (pushforward(f, x)(torch.ones_like(x)) ** 2).sum(), x)[0],
    ],
    "`jacobian` reverse": [
        lambda f, x: jacobian(f, x, mode="reverse")[0],
        lambda f, x: jacobian(lambda x: jacobian(f, x, mode="reverse")[0], x, mode="reverse")[0],
    ],
    "`jacobian` forward": [
        lambda f, x: jacobian(f, x, mode="forward")[0],
        lambda f, x: jacobian(lambda x: jacobian(f, x, mode="forward")[0], x, mode="forward")[0],
    ],
    "`hessian`": [
        lambda f, x: hessian(total(f), x),
        lambda f, x: gradient(lambda x: hessian(total(f), x).sum(), x)[0],
    ],
    "`hessian_dual`": [
        lambda f, x: hessian_dual(total(f), x),
        lambda f, x: gradient(lambda x: hessian_dual(total(f), x).sum(), x)[0],
    ],
    "`hessian_reverse`": [
        lambda f, x: hessian_reverse(total(f), x),
        lambda f, x: gradient(lambda x: hessian_reverse(total(f), x).sum(), x)[0],
    ],
    "`diaghessian`": [
        lambda f, x: diaghessian(total(f), x)[0],
        lambda f, x: gradient(lambda x: diaghessian(total(f), x)[0].sum(), x)[0],
    ],
    "`torch.func.grad`": [
        lambda f, x: func.grad(total(f))(x),
        lambda f, x: func.grad(lambda x: (func.grad(total(f))(x) ** 2).sum())(x),
    ],
    "`torch.func.jacrev`": [
        lambda f, x: func.jacrev(f)(x),
        lambda f, x: func.jacrev(func.jacrev(f))(x),
    ],
    "`torch.func.jacfwd`": [
        lambda f, x: func.jacfwd(f)(x),
        lambda f, x: func.jacfwd(func.jacfwd(f))(x),
    ],
    "`torch.func.hessian`": [
        lambda f, x: func.hessian(total(f))(x),
        lambda f, x: func.jacrev(func.jacfwd(f))(x),
    ],
    "`torch.func.vmap` over it": [
        lambda f, x: func.vmap(lambda x: gradient(total(f), x)[0])(batch(x)),
        lambda f, x: func.vmap(lambda x: jacobian(f, x, mode="forward")[0])(batch(x)),
        lambda f, x: func.vmap(lambda x: hessian(total(f), x))(batch(x)),
        lambda f, x: gradient(lambda x: func.vmap(total(f))(batch(x)).sum(), x)[0],
        lambda f, x: jacobian(lambda x: func.vmap(f)(batch(x)).sum(0), x)[0],
        lambda f, x: func.hessian(lambda x: func.vmap(total(f))(batch(x)).sum())(x),
    ],
}

# The same derivatives by torch.func alone, of the function that does without the utility.


def second(f: Function, x: Tensor) -> Tensor:
    return func.jacrev(func.jacrev(f))(x)


def third_of_total(f: Function, x: Tensor) -> Tensor:
    return func.grad(lambda x: func.hessian(total(f))(x).sum())(x)


def jvp_of_ones(f: Function, x: Tensor) -> Tensor:
    return func.jacrev(f)(x).sum(1)


EXPECTED: dict[str, list[Column]] = {
    "`gradient`": [lambda f, x: func.grad(total(f))(x), lambda f, x: func.hessian(total(f))(x)],
    "`pullback`": [
        lambda f, x: func.jacrev(f)(x),
        lambda f, x: func.grad(lambda x: (func.jacrev(f)(x).sum(0) ** 2).sum())(x),
    ],
    "`pushforward`": [
        jvp_of_ones,
        lambda f, x: func.grad(lambda x: (jvp_of_ones(f, x) ** 2).sum())(x),
    ],
    "`jacobian` reverse": [
        lambda f, x: func.jacrev(f)(x),
        lambda f, x: second(f, x).reshape(-1, len(x)),
    ],
    "`jacobian` forward": [
        lambda f, x: func.jacrev(f)(x),
        lambda f, x: second(f, x).reshape(-1, len(x)),
    ],
    "`hessian`": [lambda f, x: second(total(f), x), third_of_total],
    "`hessian_dual`": [lambda f, x: second(total(f), x), third_of_total],
    "`hessian_reverse`": [lambda f, x: second(total(f), x), third_of_total],
    "`diaghessian`": [
        lambda f, x: second(total(f), x).diagonal(),
        lambda f, x: func.grad(lambda x: second(total(f), x).diagonal().sum())(x),
    ],
    "`torch.func.grad`": COLUMNS["`torch.func.grad`"],
    "`torch.func.jacrev`": COLUMNS["`torch.func.jacrev`"],
    "`torch.func.jacfwd`": [lambda f, x: func.jacrev(f)(x), second],
    "`torch.func.hessian`": [lambda f, x: second(total(f), x), second],
    "`torch.func.vmap` over it": [
        lambda f, x: torch.stack([func.grad(total(f))(x) for x in batch(x)]),
        lambda f, x: torch.stack([func.jacrev(f)(x) for x in batch(x)]),
        lambda f, x: torch.stack([func.hessian(total(f))(x) for x in batch(x)]),
        lambda f, x: func.grad(lambda x: sum(total(f)(x) for x in batch(x)))(x),
        lambda f, x: func.jacrev(lambda x: sum(f(x) for x in batch(x)))(x),
        lambda f, x: func.hessian(lambda x: sum(total(f)(x) for x in batch(x)))(x),
    ],
}

# What torch.compile(fullgraph=True) compiles whole.
COMPILED: list[tuple[str, Column]] = [
    ("its gradient", lambda f, x: gradient(total(f), x)[0]),
    ("its Jacobian, forward", lambda f, x: jacobian(f, x, mode="forward")[0]),
    ("its Hessian", lambda f, x: hessian(total(f), x)),
    ("torch.func.grad of it", lambda f, x: func.grad(total(f))(x)),
]
COMPILED_EXPECTED: list[Column] = [
    lambda f, x: func.grad(total(f))(x),
    lambda f, x: func.jacrev(f)(x),
    lambda f, x: second(total(f), x),
    lambda f, x: func.grad(total(f))(x),
]

# (row, column) -> what PyTorch can't do, as the message says it. None is known; a pair gets its line here and
# in docs/limitations.md.
LIMITS: dict[tuple[str, str], str] = {}

CASES = [(row, column, i) for row in ROWS for column, ways in COLUMNS.items() for i in range(len(ways))]


def name(row: str, column: str, i: int) -> str:
    return f"{row} in {column} {i + 1}".replace("`", "")


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64)


@pytest.mark.parametrize(("row", "column", "i"), CASES, ids=[name(*case) for case in CASES])
def test_each_utility_in_each_way(row: str, column: str, i: int, x: Tensor) -> None:
    with_utility, without = ROWS[row]
    if (row, column) in LIMITS:
        with pytest.raises(Exception, match=LIMITS[row, column]):
            COLUMNS[column][i](with_utility, x)
        return
    found = COLUMNS[column][i](with_utility, x)
    expected = EXPECTED[column][i](without, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 0.1  # zeros would prove nothing


def compiled_case(row: str, i: int) -> Any:
    what = COMPILED[i][0]
    marks: list[Any] = [pytest.mark.slow] if i else []
    if "hook" in row:
        marks.append(hooks_compiled_twice if "Hessian" in what else hooks_compiled)
    return pytest.param(row, i, id=f"{what}-{row}".replace("`", ""), marks=marks)


COMPILED_ROWS = [
    pytest.param(row, id=row.replace("`", ""), marks=hooks_compiled if "hook" in row else []) for row in ROWS
]


@pytest.mark.parametrize(("row", "i"), [compiled_case(row, i) for i in range(len(COMPILED)) for row in ROWS])
def test_each_utility_compiled_whole(row: str, i: int, x: Tensor) -> None:
    with_utility, without = ROWS[row]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: COMPILED[i][1](with_utility, x), fullgraph=True, backend="aot_eager")
    if (row, COMPILED[i][0]) in LIMITS:
        with pytest.raises(Exception, match=LIMITS[row, COMPILED[i][0]]):
            compiled(x)
        return
    torch.testing.assert_close(compiled(x), COMPILED_EXPECTED[i](without, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("row", COMPILED_ROWS)
def test_each_utility_in_a_compiled_function_that_backward_differentiates(row: str, x: Tensor) -> None:
    with_utility, without = ROWS[row]
    torch._dynamo.reset()
    x.requires_grad_()
    compiled = torch.compile(lambda x: total(with_utility)(x), fullgraph=True, backend="aot_eager")
    compiled(x).backward()
    torch.testing.assert_close(x.grad, func.grad(total(without))(x.detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("row", COMPILED_ROWS)
def test_each_utility_compiled_to_machine_code(row: str, x: Tensor) -> None:
    with_utility, without = ROWS[row]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gradient(total(with_utility), x)[0], fullgraph=True)
    torch.testing.assert_close(compiled(x), func.grad(total(without))(x), rtol=1e-9, atol=1e-9)


# ---- the table in the documentation ----------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "composition.md"
START, END = "<!-- written by tests/test_composition.py -->", "<!-- end -->"


def table() -> str:
    """The rows and columns above as Markdown: a mark is a passed test, an error a limit of PyTorch."""
    columns = [*COLUMNS, "`torch.compile(fullgraph=True)`"]
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " :-: |" * len(columns)]
    for row in ROWS:
        marks = ["error" if (row, column) in LIMITS else "✓" for column in COLUMNS]
        marks.append("error" if any((row, what) in LIMITS for what, _ in COMPILED) else "✓")
        lines.append(f"| {row} | " + " | ".join(marks) + " |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    return re.sub(f"{START}.*{END}", lambda _: f"{START}\n\n{table()}\n\n{END}", page, flags=re.DOTALL)


def test_the_documented_table_is_the_tested_one() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert START in page
    assert with_table(page) == page, "run python tests/test_composition.py"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
