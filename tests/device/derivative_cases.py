"""The public derivatives of benchmarks/gpu_check.py, each on both devices, against the CPU in float64."""

from __future__ import annotations

from functools import partial

import torch
from device_cases import CASES, FIRST, SECOND

from benchmarks._gpu_cases import DERIVATIVES
from benchmarks._gpu_cases import Case as Derivative
from benchmarks.gpu_check import check


def on_both(derivative: Derivative) -> None:
    for device in (FIRST, SECOND):
        for dtype in (torch.float64, torch.float32):
            line = check(derivative, device, dtype)
            assert line.good, (device, line)


for derivative in DERIVATIVES:
    CASES[f"gpu_check: {derivative.name}"] = partial(on_both, derivative)
