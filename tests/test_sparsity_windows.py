"""Interpolation: kernels round positions in their own ways, and all that they read is listed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detection import detect_jacobian
from torch import Tensor

# Between these sizes positions fall on pixels, or would without rounding.
SIZES = [
    (2, 82),
    (2, 41),
    (3, 9),
    (3, 21),
    (4, 47),
    (7, 49),
    (11, 21),
    (49, 21),
    (12, 5),
    (12, 24),
    (8, 8),
    (5, 1),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def interpolated(x: Tensor, n: int, axis: int, mode: str, **how: Any) -> Tensor:
    """Along one axis of a picture, or of a line."""
    if axis < 0:
        return F.interpolate(x.view(1, 1, n), mode=mode, **how)
    return F.interpolate(x.view((1, 1, n, 1) if axis == 0 else (1, 1, 1, n)), mode=mode, **how)


def missing(f: Any, x: Tensor) -> int:
    found = detect_jacobian(f, [x])[0]
    assert not found.unknown
    J = torch.autograd.functional.jacobian(f, x).reshape(-1, x.numel())
    backward = detect_jacobian(
        lambda g: torch.autograd.functional.vjp(f, x, g, create_graph=True)[1], [f(x)]
    )[0]
    assert not backward.unknown
    return int(((J != 0) & ~found.to_dense()).sum() + ((J.t() != 0) & ~backward.to_dense()).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "axis"), [(m, a) for m in ("nearest", "nearest-exact") for a in (-1, 0, 1)])
def test_nearest(mode: str, axis: int, dtype: torch.dtype) -> None:
    for n, m in SIZES:
        size = m if axis < 0 else (m, 1) if axis == 0 else (1, m)
        assert missing(lambda x: interpolated(x, n, axis, mode, size=size), torch.rand(n).to(dtype)) == 0, (
            n,
            m,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize(
    ("mode", "axis"), [("linear", -1), ("bilinear", 0), ("bilinear", 1), ("bicubic", 0), ("bicubic", 1)]
)
def test_linear_and_cubic(mode: str, axis: int, corners: bool, dtype: torch.dtype) -> None:
    for n, m in SIZES:
        how = {"size": m if axis < 0 else (m, 1) if axis == 0 else (1, m), "align_corners": corners}
        assert missing(lambda x: interpolated(x, n, axis, mode, **how), torch.rand(n).to(dtype)) == 0, (n, m)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_antialiased(mode: str, corners: bool, dtype: torch.dtype) -> None:
    x = torch.rand(1, 1, 12, 8, dtype=dtype)
    for size in [(5, 3), (6, 4), (24, 16), (12, 3), (7, 13)]:
        how = {"size": size, "mode": mode, "antialias": True, "align_corners": corners}
        assert missing(lambda x: F.interpolate(x, **how), x) == 0, size
        assert detect_jacobian(lambda x: F.interpolate(x, **how), [x])[0].density < 1


@pytest.mark.parametrize("factor", [(1.7, 0.6), (3.0, 1 / 3), (0.123, 2.0)])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "antialiased"])
def test_by_a_factor(mode: str, factor: tuple[float, float]) -> None:
    how: dict[str, Any] = {"scale_factor": factor, "mode": mode}
    if mode == "antialiased":
        how.update(mode="bicubic", antialias=True)
    for dtype in (torch.float64, torch.float32):
        x = torch.rand(1, 2, 9, 13, dtype=dtype)
        assert missing(lambda x: F.interpolate(x, **how), x) == 0


@pytest.mark.parametrize(("n", "factor"), [(5, 1.1), (10, 2.04), (10, 1.99)])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_a_factor_that_the_size_does_not_tell(mode: str, n: int, factor: float) -> None:
    x = torch.rand(n)
    assert missing(lambda x: F.interpolate(x.view(1, 1, n), scale_factor=factor, mode=mode), x) == 0
    assert missing(lambda x: F.interpolate(x.view(1, 1, 1, n), scale_factor=(1, factor), mode=mode), x) == 0
    assert missing(lambda x: F.interpolate(x.view(1, 1, n, 1), scale_factor=(factor, 1), mode=mode), x) == 0


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "trilinear"])
def test_in_three_dimensions(mode: str) -> None:
    x = torch.rand(1, 1, 2, 3, 5)
    assert missing(lambda x: F.interpolate(x, size=(5, 3, 7), mode=mode), x) == 0


@pytest.mark.parametrize(
    ("n", "m", "mode", "corners", "most"),
    [
        (8, 16, "nearest", None, 1),
        (8, 24, "nearest", None, 1),
        (8, 4, "nearest-exact", None, 1),
        (9, 9, "linear", False, 1),
        (9, 17, "linear", True, 1.5),
        (16, 8, "linear", False, 2),
        (8, 24, "linear", False, 2.4),
        (9, 9, "bicubic", True, 1),
    ],
)
def test_what_no_kernel_reads_is_not_listed(n: int, m: int, mode: str, corners: Any, most: float) -> None:
    axis = 0 if mode == "bicubic" else -1
    size = (m, 1) if axis == 0 else m
    x = torch.rand(n)
    (found,) = detect_jacobian(
        lambda x: interpolated(x, n, axis, mode, size=size, align_corners=corners), [x]
    )
    assert m <= found.nnz <= most * m


def test_long_lines() -> None:
    (found,) = detect_jacobian(lambda x: F.interpolate(x[None, None], scale_factor=2), [torch.rand(100_000)])
    assert found.nnz == 200_000
