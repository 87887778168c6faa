"""What dense results take while they are computed: little more than themselves, where chunks are small."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from dispatched import PeakBytes
from torch import Tensor

from torchzygote import diaghessian, hessian, jacobian, set_memory_budget

N = 1500  # the matrix takes 9 MB
CHUNK = 1 << 20
W = torch.linspace(-1, 1, N * N).sin().view(N, N)
V = torch.linspace(-1, 2, N * N).cos().view(N, N)
X = torch.linspace(-1, 1, N)


@pytest.fixture
def budget() -> Iterator[None]:
    set_memory_budget(CHUNK)
    yield
    set_memory_budget(None)


def peak(f: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], int]:
    """What ``f`` gives, and how many bytes it took at once beyond that."""
    with PeakBytes() as seen:
        found = f()
    return found, seen.nbytes - sum(x.numel() * x.element_size() for x in found)


JACOBIANS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "one way": (lambda x: W @ x.sin(), 1),
    "two ways": (lambda x: W @ x.sin() + V @ x.cos(), 1),
    "two inputs": (lambda x, y: W @ (x.sin() * y), 2),
    "outputs that meet": (lambda x: (W @ x.sin()).softmax(0), 1),
}


@pytest.mark.parametrize("name", JACOBIANS)
def test_jacobians_in_small_chunks_take_little_more_than_the_result(name: str, budget: None) -> None:
    f, count = JACOBIANS[name]
    xs = [X + i for i in range(count)]
    found, extra = peak(lambda: jacobian(f, *xs, mode="reverse"))
    # seeds, products and what the check reads
    assert extra < 4 * CHUNK
    torch.testing.assert_close(found, torch.func.jacrev(f, argnums=tuple(range(count)))(*xs))


def test_jacobians_by_few_rows_take_little_more_than_the_result() -> None:
    (J,), extra = peak(lambda: jacobian(lambda x: W @ x.sin(), X, mode="reverse", chunk_size=50))
    assert extra < 6 * 50 * N * 4
    torch.testing.assert_close(J, W * X.cos())


def test_where_no_products_are_saved_rows_take_no_memory_of_their_own(budget: None) -> None:
    f = lambda x: F.linear(x.sin().view(1, -1), W)
    (J,), extra = peak(lambda: jacobian(f, X, mode="reverse"))
    assert extra < 4 * CHUNK + W.numel() * 4  # PyTorch copies what it multiplies with
    torch.testing.assert_close(J, W * X.cos())


def test_rows_made_of_several_outputs_by_sample(budget: None) -> None:
    """Rows of a chunk begin and end within the block of a sample."""
    A, R = W[:60, :40], V[:30, :20]
    f = lambda u: ((A @ u.sin().view(40, 30)).tanh() @ R).square()
    (J,) = jacobian(f, X[:1200], mode="reverse", chunk_size=7)
    torch.testing.assert_close(J, torch.func.jacrev(f)(X[:1200]).reshape(1200, 1200))


LARGE = {"square": (N, N), "many samples": (6000, 400), "many columns": (400, 6000)}


def large(name: str, transposed: bool) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor], Tensor]:
    """A matrix, a point, a function with one channel, and its curvatures by what comes of the matrix."""
    samples, columns = LARGE[name]
    A = torch.linspace(-1, 1, samples * columns, dtype=torch.float64).sin().view(samples, columns)
    A = A.t().contiguous().t() if transposed else A
    w = torch.linspace(-1, 1, columns, dtype=torch.float64) / columns
    one = torch.func.grad(torch.func.grad(lambda z: z.tanh().square()))
    return A, w, lambda w: (A @ w).tanh().square().sum(), torch.func.vmap(one)(A @ w)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", LARGE)
def test_diagonals_by_a_large_matrix_square_little_of_it_at_a_time(
    name: str, transposed: bool, budget: None
) -> None:
    A, w, f, curvatures = large(name, transposed)
    (diagonal,), extra = peak(lambda: diaghessian(f, w))
    assert extra < 3 * CHUNK
    torch.testing.assert_close(diagonal, A.square().t() @ curvatures)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["square", "many samples"])
def test_hessians_by_a_large_matrix_weight_little_of_it_at_a_time(
    name: str, transposed: bool, budget: None
) -> None:
    A, w, f, curvatures = large(name, transposed)
    (H,), extra = peak(lambda: (hessian(f, w),))
    assert extra < 3 * CHUNK
    torch.testing.assert_close(H, (A * curvatures.unsqueeze(1)).t() @ A)
