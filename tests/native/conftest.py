"""The kernels that a test of native operators runs with: the CPU's, and CUDA's on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import host_kernels
import pytest
import torch

from torchzygote import native


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
    if request.param != "cpu":
        request.getfixturevalue("cuda_on_host")
    run_by = nullcontext() if request.param == "cpu" else host_kernels.run_by(request.param)
    with pytest.MonkeyPatch.context() as patch, run_by:
        # small blocks too, where the wrapper would prefer two operators of PyTorch's own
        patch.setattr(native._rows, "_SMALL", 0)
        yield
