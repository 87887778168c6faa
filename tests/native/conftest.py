"""The kernels that a test of native operators runs with: the CPU's, and CUDA's on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import host_kernels
import native_samples
import pytest
import torch

from torchzygote import native

_FUNCTIONS = {
    native._rows: ("seed_rows_", "scatter_rows_", "gather_diagonal_"),
    native._colored: ("decompress_", "decompress_dense_", "compress_"),
}


@pytest.fixture(scope="session")
def cuda_on_host(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The operators of host_kernels.NAMESPACE, compiled by the first process that asks for them."""
    if reason := host_kernels.missing():
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers have it in common
    torch.ops.load_library(host_kernels.build(folder / "cuda_on_host"))


@pytest.fixture(scope="module", params=["cpu", *host_kernels.WAYS])
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test once with the kernels for the CPU, and in several ways with those for CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        # small blocks too, where the wrapper would prefer two operators of PyTorch's own
        patch.setattr(native._rows, "_SMALL", 0)
        if request.param != "cpu":
            request.getfixturevalue("cuda_on_host")
            for name, value in host_kernels.WAYS[request.param].items():
                patch.setenv(name, value)
            patch.setattr(native_samples, "namespace", host_kernels.NAMESPACE)
            for module, names in _FUNCTIONS.items():
                for name in names:
                    patch.setattr(module, f"_{name}", native_samples.raw(name))
        yield
