"""Buffer against what one writes without it: in-place writes, and a list that is stacked at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchzygote import Buffer

from ._harness import Row, compare, growth

WIDTH = 64
Program = Callable[[Tensor, int], Tensor]


def rows_buffer(x: Tensor, k: int) -> Tensor:
    buf = Buffer(x, k, WIDTH)
    for i in range(k):
        buf[i] = x * i
    return buf.copy().sum()


def rows_held(x: Tensor, k: int) -> Tensor:
    """A variable holds the value too, so that it is copied."""
    buf = Buffer(x, k, WIDTH)
    for i in range(k):
        row = x * i
        buf[i] = row
    return buf.copy().sum()


def rows_in_place(x: Tensor, k: int) -> Tensor:
    out = torch.zeros(k, WIDTH)
    for i in range(k):
        out[i] = x * i
    return out.sum()


def rows_list(x: Tensor, k: int) -> Tensor:
    rows = []
    for i in range(k):
        rows.append(x * i)
    return torch.stack(rows).sum()


def columns_buffer(x: Tensor, k: int) -> Tensor:
    buf = Buffer(x, WIDTH, k)
    for i in range(k):
        buf[:, i] = x * i
    return buf.copy().sum()


def columns_in_place(x: Tensor, k: int) -> Tensor:
    out = torch.zeros(WIDTH, k)
    for i in range(k):
        out[:, i] = x * i
    return out.sum()


def recurrence_buffer(x: Tensor, k: int) -> Tensor:
    buf = Buffer(x, k, WIDTH)
    buf[0] = x
    for t in range(1, k):
        buf[t] = torch.sin(0.5 * buf[t - 1] + x)
    return buf.copy().sum()


def recurrence_list(x: Tensor, k: int) -> Tensor:
    rows = [x]
    for _ in range(1, k):
        rows.append(torch.sin(0.5 * rows[-1] + x))
    return torch.stack(rows).sum()


def recurrence_in_place(x: Tensor, k: int) -> Tensor:
    out = torch.zeros(k, WIDTH)
    out[0] = x
    for t in range(1, k):
        out[t] = torch.sin(0.5 * out[t - 1].clone() + x)
    return out.sum()


def cells_buffer(x: Tensor, k: int) -> Tensor:
    """A table filled element by element, each from its three neighbors: alignment, edit distance."""
    n = int(k**0.5)
    buf = Buffer(x, n, n)
    buf[0] = x[:n]
    for i in range(1, n):
        for j in range(1, n):
            buf[i, j] = torch.sin(buf[i - 1, j] + buf[i, j - 1] * x[0] + buf[i - 1, j - 1])
    return buf.copy().sum()


def cells_list(x: Tensor, k: int) -> Tensor:
    n = int(k**0.5)
    zero = x.new_zeros(())
    table = [list(x[:n].unbind())]
    for i in range(1, n):
        row = [zero]
        for j in range(1, n):
            row.append(torch.sin(table[i - 1][j] + row[j - 1] * x[0] + table[i - 1][j - 1]))
        table.append(row)
    return torch.stack([torch.stack(row) for row in table]).sum()


def differentiated(program: Program, k: int) -> Callable[[], Any]:
    """Value and gradient, on a tape as in any training loop."""
    x = torch.linspace(-1, 1, WIDTH)

    def run() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(program(leaf, k), leaf)[0]

    return run


def undifferentiated(program: Program, k: int) -> Callable[[], Any]:
    x = torch.linspace(-1, 1, WIDTH)
    return lambda: program(x, k)


def rows(full: bool = False) -> Iterator[Row]:
    """The rows of the table."""
    k = 4096
    seconds = 8.0 if full else 2.0

    def against(work: str, ours: Program, name: str, peer: Program, target: float | None = None) -> Row:
        return compare(
            work,
            differentiated(ours, k),
            {name: differentiated(peer, k)},
            target=target,
            seconds=seconds,
            rounds=15 if full else 9,
        )

    yield against(f"{k} row writes, sum, gradient", rows_buffer, "in place", rows_in_place, 0.25)
    yield against(f"{k} row writes, sum, gradient", rows_buffer, "list and torch.stack", rows_list, 1.0)
    yield against(f"{k} row writes of a variable", rows_held, "list and torch.stack", rows_list)
    sizes = (1024, 2048, 4096, 8192)
    yield growth(
        "row writes, growth with their number",
        {n: differentiated(rows_buffer, n) for n in sizes},
        target=1.15,
        seconds=seconds,
    )
    yield against(f"recurrence, {k} steps", recurrence_buffer, "list and torch.stack", recurrence_list, 1.3)
    yield against(f"recurrence, {k} steps", recurrence_buffer, "in place", recurrence_in_place)
    yield growth(
        "recurrence, growth with its length",
        {n: differentiated(recurrence_buffer, n) for n in sizes},
        target=1.15,
        seconds=seconds,
    )
    yield against(f"{k} column writes, sum, gradient", columns_buffer, "in place", columns_in_place, 0.5)
    yield growth(
        "column writes, growth with their number",
        {n: differentiated(columns_buffer, n) for n in sizes},
        target=1.15,
        seconds=seconds,
    )
    yield against("table of 64 by 64 cells from neighbours", cells_buffer, "nested lists", cells_list)
    yield compare(
        f"{k} row writes, not differentiated",
        undifferentiated(rows_buffer, k),
        {"in place": undifferentiated(rows_in_place, k)},
    )
