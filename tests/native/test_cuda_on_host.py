"""What CUDA kernels run on where there is no GPU: it shows races, and refuses what a GPU refuses.

Whether the kernels are right there is asked in test_native_values.py and test_native_refusals.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from host_kernels import NAMESPACE, WAYS, run_by
from native_samples import integers, needs_library, numbers, raw
from torch.utils._python_dispatch import TorchDispatchMode

from torchzygote import native
from torchzygote.native import reference

pytestmark = pytest.mark.usefixtures("cuda_on_host")
GRID = 256 << 16  # threads of the largest grid along one axis
INVALID = "RuntimeError: probe: invalid configuration argument"


def probed(name: str, *args: Any, size: tuple[int, ...] = (1,)) -> Any:
    out = torch.zeros(size, dtype=torch.int64)
    try:
        raw(f"probe_{name}")(out, *args)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return out.tolist()


def test_threads_that_write_to_one_place_give_another_value_in_another_order() -> None:
    found = []
    for way in WAYS:
        with run_by(way):
            found.append(probed("one_place", 3, 1, 1, 4))
    assert found == [[11], [0], [7]]  # the last thread of all, the first one, the last one of two blocks


def test_threads_that_read_what_others_write_give_other_values_in_another_order() -> None:
    with run_by("cuda forward"):
        assert probed("neighbors", size=(4,)) == [1, 1, 1, 0]
    with run_by("cuda reverse"):
        assert probed("neighbors", size=(4,)) == [3, 2, 1, 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1000), (1000, 3), (17_000, 130), (0, 5), (5, 0)])
def test_every_element_has_one_thread(way: str, shape: tuple[int, int]) -> None:
    with run_by(way):
        assert probed("visits", size=shape) == torch.ones(shape, dtype=torch.int64).tolist()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 65_535, 1, 1), [0]),
        ((1, 65_536, 1, 1), INVALID),
        ((1, 1, 65_536, 1), INVALID),
        ((0, 1, 1, 1), INVALID),
        ((1 << 31, 1, 1, 1), INVALID),
        ((1, 1, 1, 1024), [1023]),
        ((1, 1, 1, 1025), INVALID),
        ((1, 1, 1, 0), INVALID),
    ],
)
def test_grids_that_no_gpu_has_are_refused(sizes: tuple[int, ...], expected: Any) -> None:
    with run_by("cuda forward"):
        assert probed("one_place", *sizes) == expected


@pytest.mark.parametrize("guarded", [False, True])
def test_a_launch_on_the_stream_of_another_device_is_refused(guarded: bool) -> None:
    with run_by("cuda forward"):
        assert probed("stream", guarded).startswith(
            "RuntimeError: probe: no guard of a device, or not the stream"
        )


@needs_library
def test_what_is_called_are_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(f"{func.namespace}::{func._opname}")
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(native._rows, "_SMALL", 0)
    index = torch.arange(3)
    with run_by("cuda forward"), Noting():
        products = native.seed_rows(0, 3, 3, dtype=torch.float32, device="cpu")
        native.scatter_rows_([products.clone()], [products], 0)
        native.gather_diagonal(products, 0)
        native.decompress(products, 0, index, index, torch.zeros(3))
        native.decompress_dense(products, 0, index, index, index, index, products.clone())
    names = ("seed_rows_", "scatter_rows_", "gather_diagonal_", "decompress_", "decompress_dense_")
    assert [name for name in called if NAMESPACE in name] == [f"{NAMESPACE}::{name}" for name in names]


def many_seeds(module: Any) -> torch.Tensor:
    return module.seed_rows(3, 4, GRID + 300, dtype=torch.uint8, device="cpu")


def many_rows(module: Any) -> torch.Tensor:
    block = torch.zeros(65_536 + 20, 130, dtype=torch.uint8)  # a grid has at most 65535 blocks along y
    module.scatter_rows_([block], [integers(0, 255, block.numel(), torch.uint8).view(block.shape)], 0)
    return block


def many_slots(module: Any) -> torch.Tensor:
    out = torch.zeros(GRID + 300, dtype=torch.uint8)
    slots = integers(0, 2, out.numel(), torch.int32)
    module.decompress(numbers((2, 3), torch.float32).to(torch.uint8), 0, slots, slots, out)
    return out


@needs_library
@pytest.mark.parametrize("run", [many_seeds, many_rows, many_slots])
def test_more_elements_than_a_grid_has_threads_are_all_written(run: Callable[[Any], torch.Tensor]) -> None:
    with run_by("cuda forward"):
        found = run(native)
    assert torch.equal(found, run(reference))
