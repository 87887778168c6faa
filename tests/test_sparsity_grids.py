"""What `grid_sample` reads: nothing is missed wherever points lie, and little more is listed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detection import detect_hessian, detect_jacobian
from oracles import true_jacobian
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(3)


def points(kind: str, dims: int, dtype: torch.dtype) -> Tensor:
    """A grid of two pictures: on pixels and borders, between them, or partly far outside."""
    shape = (2, *(2, 3, 4)[:dims], dims)
    if kind == "on pixels":
        whole = torch.randint(-12, 13, shape, generator=GENERATOR)
        return (whole / torch.tensor([4.0, 6.0, 10.0])[:dims]).to(dtype)
    grid = torch.rand(shape, generator=GENERATOR, dtype=dtype) * 2 - 1
    return grid * 3 if kind == "outside" else grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["between", "on pixels", "outside"])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
@pytest.mark.parametrize(("dims", "corners"), [(2, True), (2, False), (3, True), (3, False)])
def test_nothing_is_missed(
    mode: str, padding: str, kind: str, dims: int, corners: bool, dtype: torch.dtype
) -> None:
    if dims == 3 and mode == "bicubic":
        return
    grid = points(kind, dims, dtype)

    def f(x: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=corners)

    x = torch.rand(2, 2, *(5, 4, 3)[:dims], generator=GENERATOR, dtype=dtype)
    (found,) = detect_jacobian(f, [x])
    assert not found.unknown
    expected = true_jacobian(f, x)
    assert not (expected & ~found.to_dense()).any()
    (second,) = detect_hessian(lambda x: f(x).square().sum(), [x])
    coupled = expected.double().T @ expected.double() != 0
    assert not (coupled & ~second.to_dense()).any()


@pytest.mark.parametrize(("mode", "most"), [("nearest", 1), ("bilinear", 4), ("bicubic", 16)])
def test_few_pixels_are_listed(mode: str, most: int) -> None:
    grid = torch.rand(1, 8, 8, 2, generator=GENERATOR) * 2 - 1
    f = lambda x: F.grid_sample(x, grid, mode=mode, align_corners=True)
    assert detect_jacobian(f, [torch.rand(1, 1, 30, 30)])[0].nnz <= 64 * most


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_points_that_lie_nowhere_are_dense(value: float) -> None:
    grid = torch.zeros(1, 1, 2, 2)
    grid[0, 0, 1, 0] = value
    f = lambda x: F.grid_sample(x, grid, align_corners=True)
    assert detect_jacobian(f, [torch.rand(1, 1, 3, 3)])[0].nnz == 18


def test_a_grid_that_may_change_is_dense() -> None:
    grid = torch.zeros(1, 1, 2, 2, requires_grad=True)
    f = lambda x: F.grid_sample(x, grid, align_corners=True)
    assert detect_jacobian(f, [torch.rand(1, 1, 3, 3)])[0].nnz == 18
    moved = lambda x: F.grid_sample(x, x[:, 0, :1, :2].reshape(1, 1, 1, 2), align_corners=True)
    assert detect_jacobian(moved, [torch.rand(1, 1, 3, 3)])[0].nnz == 9
    assert detect_hessian(lambda x: moved(x).sum(), [torch.rand(1, 1, 3, 3)])[0].nnz == 81


def test_a_small_budget_takes_whole_channels() -> None:
    grid = torch.rand(1, 8, 8, 2, generator=GENERATOR) * 2 - 1
    f = lambda x: F.grid_sample(x, grid, align_corners=True).sum((2, 3))
    (found,) = detect_jacobian(f, [torch.rand(1, 2, 4, 4)], budget=100)
    assert found.nnz == 32
