"""Native operators against the time that ``copy_`` takes to move the same bytes, and plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torchzygote import native
from torchzygote.native import index_sets, reference, reference_sets
from torchzygote.native.elementwise import push_elementwise, push_elementwise_plainly

from ._harness import Row, compare, missing

TARGET = 1.5


def seeds(rows: int, columns: int) -> Iterator[Row]:
    """Written once: no more than copying as many."""
    source, target = torch.randn(rows, columns), torch.empty(rows, columns)
    colors = torch.arange(columns) % rows
    options = {"dtype": torch.float32, "device": "cpu"}
    yield compare(
        f"seed_rows, {rows} x {columns}",
        lambda: native.seed_rows(0, rows, columns, **options),
        {"copy_": lambda: target.copy_(source)},
        target=TARGET,
    )
    yield compare(
        f"seed_rows by colors, {rows} x {columns}",
        lambda: native.seed_rows(0, rows, columns, **options, colors=colors),
        {
            "copy_": lambda: target.copy_(source),
            "plain PyTorch": lambda: reference.seed_rows(0, rows, columns, **options, colors=colors),
        },
        target=TARGET,
    )


def scatter(what: str, products: list[Tensor], dtype: torch.dtype = torch.float32) -> Row:
    """All arguments of a call at once, against copying each of them."""
    rows = products[0].shape[0]
    blocks = [torch.zeros(2 * rows, x[0].numel(), dtype=dtype) for x in products]

    def one_by_one() -> None:
        for target, source in zip(blocks, products, strict=True):
            target[rows:].copy_(source.reshape(rows, -1))

    return compare(
        f"scatter_rows_, {what}",
        lambda: native.scatter_rows_(blocks, products, rows),
        {"copy_": one_by_one},
        target=TARGET,
    )


def scatters() -> Iterator[Row]:
    shapes = [(100, 1000), (1000,), (10, 100), (10,)]
    yield scatter("64 rows of 4 arguments", [torch.randn(64, *shape) for shape in shapes])
    yield scatter(
        "64 rows of 4 arguments, float16 to float32", [torch.randn(64, *shape).half() for shape in shapes]
    )
    apart = [torch.randn(*shape, 64).movedim(-1, 0) for shape in shapes]
    yield scatter("64 rows of 4 arguments, rows innermost", apart)
    yield scatter("16 rows of 40 small arguments", [torch.randn(16, 50) for _ in range(40)])


def gathers() -> Iterator[Row]:
    products = torch.randn(2048, 8192)
    out = torch.empty(2048)
    yield compare(
        "gather_diagonal, 2048 x 8192",
        lambda: native.gather_diagonal(products, 0, out=out),
        {"copy_": lambda: out.copy_(products.diagonal()[:2048])},
        target=TARGET,
    )
    size = 1_000_000
    products, found = torch.randn(8, size), torch.zeros(size)
    colors = torch.arange(size) % 8
    # what passes through the caches: all of the products, the colors, the result
    pair = torch.randn(11 * size // 2), torch.randn(11 * size // 2)
    yield compare(
        "gather_diagonal by colors, 8 x 10^6",
        lambda: native.gather_diagonal(products, 0, out=found, colors=colors),
        {
            "copy_": lambda: pair[0].copy_(pair[1]),
            "plain PyTorch": lambda: reference.gather_diagonal(products, 0, out=found, colors=colors),
        },
        target=TARGET,
    )
    columns = torch.arange(size)
    yield compare(
        "decompress, 10^6 entries of 8 colors",
        lambda: native.decompress(products, 0, colors, columns, found),
        {"plain PyTorch": lambda: reference.decompress(products, 0, colors, columns, found)},
    )


def tangents() -> Iterator[Row]:
    """Two directions through a function of 32 elements, in 4096 samples."""
    slope, weight = torch.ones(2, 4096, 32).unbind()
    given = torch.randn(2, 4096, 32)
    # what passes through the caches: tangents read and written, slope and weight
    moved = slope.numel() * 3
    pair = torch.randn(moved), torch.randn(moved)
    yield compare(
        "push_elementwise_, 2 x 4096 x 32",
        lambda: push_elementwise(given, slope, weight, squared=False, overwrite=True),
        {
            "copy_": lambda: pair[0].copy_(pair[1]),
            "plain PyTorch": lambda: push_elementwise_plainly(given, slope, weight, squared=False),
        },
    )


def sets() -> Iterator[Row]:
    size = 1_000_000
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(size + 1)])
    members = torch.arange(size, dtype=torch.int32)
    first = torch.arange(1, size, dtype=torch.int32)
    second = first + 1
    yield compare(
        "unions of 10^6 pairs of sets",
        lambda: index_sets.unite_pairs(ptr, members, first, second, 10 * size),
        {"plain PyTorch": lambda: reference_sets.unite_pairs(ptr, members, first, second, 10 * size)},
    )


def grids(full: bool) -> Iterator[Row]:
    side = 3000 if full else 1000
    index = torch.arange(side * side).view(side, side)
    edges = torch.cat(
        [
            torch.stack([index[1:].reshape(-1), index[:-1].reshape(-1)]),
            torch.stack([index[:, 1:].reshape(-1), index[:, :-1].reshape(-1)]),
        ],
        dim=1,
    )
    edges = torch.cat([edges, edges.flip(0), torch.arange(side * side).expand(2, -1)], dim=1)
    edges = edges[:, torch.argsort(edges[0] * side * side + edges[1])]
    ptr = torch.zeros(side * side + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(edges[0], minlength=side * side), 0, out=ptr[1:])
    indices = edges[1].to(torch.int32)
    for kind in ("distance2_columns", "star"):
        yield compare(
            f"coloring of a grid, {kind}, {indices.numel() / 1e6:.0f} million entries",
            lambda kind=kind: native.color_graph(ptr, indices, side * side, kind, "natural"),
            {},
        )


def rows(full: bool = False) -> Iterator[Row]:
    if "cpu" not in native.info()["devices"]:
        yield missing(
            "native operators", "copy_", f"not loaded: {native.info()['missing']['cpu']}", target=TARGET
        )
        return
    torch.manual_seed(0)
    yield from seeds(64, 100_000)
    if full:
        yield from seeds(1000, 20_000)
    yield from scatters()
    yield from gathers()
    yield from tangents()
    yield from sets()
    yield from grids(full)
