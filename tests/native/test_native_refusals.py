"""What operators refuse, compiled and plain, in the same words, with nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_samples import needs_library, raw

from torchzygote import native
from torchzygote.native import reference
from torchzygote.native._loading import operator, telling_refusals

SEEDS = {"dtype": torch.float32, "device": "cpu"}
INDEX = torch.tensor([0, 1, 2])
LAST = 2**63 - 1  # rows from here on end where no int64 is


def changed(sample: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**sample, **changes}


def seeds(**changes: Any) -> dict[str, Any]:
    return changed({"lo": 0, "hi": 2, "numel": 3, **SEEDS}, **changes)


def rows(**changes: Any) -> dict[str, Any]:
    blocks, products = [torch.ones(4, 3), torch.ones(4, 2)], [torch.ones(2, 3), torch.ones(2, 1, 2)]
    return changed({"blocks": blocks, "products": products, "lo": 1}, **changes)


def gathered(**changes: Any) -> dict[str, Any]:
    return changed({"products": torch.ones(2, 3), "lo": 0}, **changes)


def slots(**changes: Any) -> dict[str, Any]:
    sample = {
        "products": torch.ones(2, 3),
        "lo": 0,
        "slot_row": INDEX,
        "slot_column": INDEX,
        "out": torch.ones(3),
    }
    return changed(sample, **changes)


def places(**changes: Any) -> dict[str, Any]:
    sample = slots(rows=INDEX, columns=INDEX, out=torch.ones(3, 3))
    return changed(sample, **changes)


def colored(**changes: Any) -> dict[str, Any]:
    return changed({"matrix": torch.eye(3), "colors": INDEX, "ncolors": 3}, **changes)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("seed_rows", seeds(lo=-1), "lo: expected at least 0, got -1"),
    ("seed_rows", seeds(lo=2, hi=1), "hi: expected at least lo = 2, got 1"),
    ("seed_rows", seeds(hi=4), "hi: expected at most the number of columns, 3, got 4"),
    ("seed_rows", seeds(colors=torch.tensor([0, -2, 1])), "colors: expected at least -1, got -2"),
    ("seed_rows", seeds(colors=INDEX[:2]), r"colors: expected shape \(3\), got \(2\)"),
    ("seed_rows", seeds(colors=INDEX.double()), "colors: expected int64 or int32, got"),
    ("scatter_rows_", rows(lo=3), r"blocks\[0\]: expected at least 5 rows, got 4"),
    ("scatter_rows_", rows(lo=-1), "lo: expected at least 0, got -1"),
    ("scatter_rows_", rows(lo=LAST), rf"blocks\[0\]: expected at least {LAST + 2} rows, got 4"),
    ("seed_rows", seeds(lo=LAST - 1, hi=LAST), f"hi: expected at most the number of columns, 3, got {LAST}"),
    ("gather_diagonal", gathered(lo=LAST), f"hi: expected at most the number of columns, 3, got {LAST + 2}"),
    ("scatter_rows_", rows(products=[torch.ones(2, 3)]), "products: expected 2, one for each block, got 1"),
    (
        "scatter_rows_",
        rows(products=[torch.ones(2, 3), torch.ones(2, 3)]),
        r"products\[1\]: expected 2 rows of 2 elements, got shape \(2, 3\)",
    ),
    (
        "scatter_rows_",
        rows(products=[torch.ones(2, 3), torch.ones(2, 2, dtype=torch.complex64)]),
        r"products\[1\]: expected a real dtype for a block of",
    ),
    (
        "scatter_rows_",
        rows(products=[torch.ones(2, 3), torch.ones(2, 2, device="meta")]),
        r"products\[1\]: expected the device",
    ),
    ("scatter_rows_", rows(blocks=[torch.ones(3), torch.ones(4, 2)]), r"blocks\[0\]: expected a matrix"),
    ("scatter_rows_", rows(products=[None, None]), "hi: expected the end of the rows"),
    ("gather_diagonal", gathered(lo=2), "hi: expected at most the number of columns, 3, got 4"),
    ("gather_diagonal", gathered(lo=-1), "lo: expected at least 0, got -1"),
    ("gather_diagonal", gathered(products=torch.ones(2)), r"products: expected a matrix, got shape \(2\)"),
    ("gather_diagonal", gathered(out=torch.ones(3)), r"out: expected shape \(2\), got \(3\)"),
    ("gather_diagonal", gathered(out=torch.ones(2).double()), "out: expected the dtype of products"),
    ("gather_diagonal", gathered(colors=INDEX), "out: expected a tensor to write to where colors are given"),
    (
        "gather_diagonal",
        gathered(out=torch.ones(3), colors=torch.tensor([0, 1, -3])),
        "colors: expected at least -1, got -3",
    ),
    ("decompress", slots(slot_column=torch.tensor([0, 1, 3])), "slot_column: expected less than 3, got 3"),
    ("decompress", slots(slot_column=torch.tensor([0, -1, 2])), "slot_column: expected at least 0, got -1"),
    ("decompress", slots(slot_row=torch.tensor([0, -1, 2])), "slot_row: expected at least 0, got -1"),
    ("decompress", slots(slot_column=INDEX[:2]), r"slot_column: expected shape \(3\), got \(2\)"),
    ("decompress", slots(slot_row=INDEX.to(torch.int16)), "slot_row: expected int64 or int32, got"),
    ("decompress", slots(out=torch.ones(2)), r"out: expected shape \(3\), got \(2\)"),
    ("decompress", slots(out=torch.ones(3).half()), "out: expected the dtype of products"),
    ("decompress", slots(lo=-1), "lo: expected at least 0, got -1"),
    ("decompress_dense", places(rows=torch.tensor([0, 1, 3])), "rows: expected less than 3, got 3"),
    ("decompress_dense", places(columns=torch.tensor([0, 1, -1])), "columns: expected at least 0, got -1"),
    ("decompress_dense", places(out=torch.ones(9)), r"out: expected a matrix, got shape \(9\)"),
    (
        "compress",
        {"matrix": torch.ones(2, 3), "colors": INDEX, "ncolors": 2},
        "colors: expected less than 2, got 2",
    ),
    (
        "compress",
        {"matrix": torch.ones(2, 3), "colors": INDEX, "ncolors": 3, "by": "diagonals"},
        "by: expected 'columns' or 'rows', got 'diagonals'",
    ),
    (
        "scatter_rows_",
        rows(products=[torch.ones(2, 3), torch.ones(2, 2, dtype=torch.int64)]),
        r"products\[1\]: expected a dtype that converts to",
    ),
    (
        "gather_diagonal",
        gathered(out=torch.ones(3), colors=INDEX, lo=-1),
        "lo: expected at least 0, got -1",
    ),
    ("compress", colored(ncolors=-1), "ncolors: expected at least 0, got -1"),
    ("compress", colored(colors=torch.tensor([0, 1, 2, 0])), r"colors: expected shape \(3\), got \(4\)"),
]


def tensors(arguments: dict[str, Any]) -> list[torch.Tensor]:
    found = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    found += [
        x for xs in arguments.values() if isinstance(xs, list) for x in xs if isinstance(x, torch.Tensor)
    ]
    return [x for x in found if x.device.type == "cpu"]


def assert_refused(module: Any, name: str, arguments: dict[str, Any], message: str) -> None:
    before = [x.clone() for x in tensors(arguments)]
    with pytest.raises(ValueError, match=f"^{message}"):
        getattr(module, name)(**arguments)
    for x, kept in zip(tensors(arguments), before, strict=True):
        assert torch.equal(x, kept)


@needs_library
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("name", "arguments", "message"), CASES)
def test_bad_input_is_refused_before_anything_is_written(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    assert_refused(native, name, arguments, message)


@pytest.mark.parametrize(("name", "arguments", "message"), CASES)
def test_the_reference_refuses_it_in_the_same_words(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    assert_refused(reference, name, arguments, message)


def on_the_cpu() -> list[tuple[str, Callable[[], tuple], str]]:
    """Refusals of operators that are there for the CPU alone."""
    members = torch.tensor([0, 1], dtype=torch.int32)
    pairs = (torch.tensor([0, 1, 2]), members, torch.tensor([0]), torch.tensor([1]))
    shifts, scales = torch.tensor([0, 1, 1], dtype=torch.uint8), torch.ones(2, 3)

    def read(**changes: Any) -> Callable[[], tuple]:
        sample = {
            "products": [torch.ones(3) for _ in range(4)],
            "shifts": shifts,
            "scales": scales,
            "widths": [1, 1],
            "slack": 1e-3,
        }
        return lambda: tuple(changed(sample, **changes).values())

    def product(x: torch.Tensor) -> Callable[[], tuple]:
        return read(products=[torch.ones(3), x, torch.ones(3), torch.ones(3)])

    def push(**changes: Any) -> Callable[[], tuple]:
        sample = {
            "tangents": torch.ones(2, 3, 4),
            "slope": factor,
            "weight": factor,
            "squared": False,
            "function": "",
        }
        return lambda: tuple(changed(sample, **changes).values())

    factor, shared = torch.ones(3, 4), torch.ones(2, 3, 4)
    return [
        ("push_elementwise_", push(tangents=torch.ones(2, 3, 4).half()), "tangents: expected float32 or"),
        ("push_elementwise_", push(tangents=torch.ones(3, 4)), r"tangents: .* got shape \(3, 4\)"),
        ("push_elementwise_", push(tangents=torch.ones(2, 4, 3).mT), "tangents: expected a contiguous"),
        ("push_elementwise_", push(tangents=torch.ones(1, 3, 4).expand(2, 3, 4)), "tangents: expected a con"),
        ("push_elementwise_", push(slope=torch.ones(4, 3)), r"slope: .* shape \(3, 4\), got shape \(4, 3\)"),
        ("push_elementwise_", push(slope=factor.double()), "slope: expected the dtype of tangents"),
        ("push_elementwise_", push(weight=torch.ones(4, 3).t()), "weight: expected a contiguous tensor of"),
        ("push_elementwise_", push(function="relu"), "function: expected tanh, sigmoid or nothing, got relu"),
        ("push_elementwise_", push(function="tanh", squared=True), "squared: expected false for tanh"),
        ("push_elementwise_", push(tangents=shared, weight=shared[1]), "weight: expected other memory than"),
        ("mirrored_blocks", read(products=[]), "products: expected 4, one per column and input, got 0"),
        ("mirrored_blocks", read(products=[torch.ones(3).half()] * 4), r"products\[0\]: expected float32 or"),
        (
            "mirrored_blocks",
            product(torch.ones(3).double()),
            r"products\[1\]: expected the dtype of products",
        ),
        ("mirrored_blocks", product(torch.ones(3, 2)[:, :1]), r"products\[1\]: expected 3 elements, in a"),
        ("mirrored_blocks", product(torch.ones(4)), r"products\[1\]: expected 3 elements, .* shape \(4\)"),
        ("mirrored_blocks", read(shifts=shifts + 1), "shifts: expected less than 2, got 2"),
        ("mirrored_blocks", read(shifts=shifts.int()), "shifts: expected a contiguous uint8 vector"),
        ("mirrored_blocks", read(shifts=shifts.view(3, 1)), "shifts: expected a vector"),
        ("mirrored_blocks", read(scales=torch.ones(3, 2)), r"scales: expected .* shape \(2, 3\), got"),
        ("mirrored_blocks", read(scales=scales.double()), "scales: expected the dtype of products"),
        ("mirrored_blocks", read(widths=[2, -1]), r"widths\[1\]: expected 0 to 4, got -1"),
        ("mirrored_blocks", read(widths=[1, 4]), "widths: expected a sum of 2, 3 or 4, got 5"),
        (
            "color_graph",
            lambda: (torch.tensor([0, 1]), torch.tensor([0]), -1, "distance2_rows", "natural"),
            "ncols: ",
        ),
        (
            "expand_pairs",
            lambda: (*pairs, torch.tensor([0, 2**31]), 100),
            "bounds: expected at most the largest",
        ),
    ]


def on_both_devices() -> list[tuple[str, Callable[[], tuple], str]]:
    products = torch.ones(2, 3)
    csr = (torch.tensor([0, 1, 2]), torch.tensor([0, 2]), torch.ones(2))
    return [
        ("seed_rows_", lambda: (torch.ones(2, 3), LAST, None), "hi: expected at most the number of columns"),
        (
            "seed_rows_",
            lambda: (torch.ones(1, 3).expand(2, 3), 0, None),
            "out: expected elements with memory",
        ),
        ("seed_rows_", lambda: (torch.ones(3), 0, None), "out: expected a matrix"),
        (
            "seed_rows_",
            lambda: (torch.ones(2, 3).to(torch.float8_e4m3fn), 0, None),
            "out: expected a floating",
        ),
        (
            "scatter_rows_",
            lambda: ([torch.ones(1, 3).expand(2, 3)], [products], 0),
            r"blocks\[0\]: expected elem",
        ),
        (
            "scatter_rows_",
            lambda: ([torch.ones(2, 3)], [products.long()], 0),
            r"products\[0\]: expected a dtype",
        ),
        (
            "gather_diagonal_",
            lambda: (torch.ones(1).expand(2), products, 0, None),
            "out: expected elements with",
        ),
        ("compress_", lambda: (torch.ones(2, 3), *csr, INDEX - 1), r"row_ptr: expected shape \(4\)"),
        ("compress_", lambda: (torch.ones(2, 2), *csr, INDEX), "colors: expected less than 2, got 2"),
        ("compress_", lambda: (torch.ones(2, 2), *csr, INDEX[:2]), "columns: expected less than 2, got 2"),
        ("compress_", lambda: (torch.ones(2, 2).half(), *csr, INDEX), "out: expected float32"),
        (
            "compress_",
            lambda: (torch.ones(2, 2).double(), *csr, INDEX - 1),
            "values: expected the dtype of out",
        ),
    ]


@needs_library
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("name", "arguments", "message"), on_both_devices())
def test_operators_refuse_what_the_functions_never_pass(
    name: str, arguments: Callable[[], tuple], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        telling_refusals(raw(name))(*arguments())


@needs_library
@pytest.mark.parametrize(("name", "arguments", "message"), on_the_cpu())
def test_operators_for_the_cpu_alone_refuse_likewise(
    name: str, arguments: Callable[[], tuple], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        operator(name)(*arguments())
