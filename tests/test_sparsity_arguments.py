"""Arguments that aren't differentiated may be others in the next call: a plan doesn't use their values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchzygote import jacobian, jacobian_sparsity, plan_jacobian

N = 4
X = torch.linspace(0.3, 0.9, N)
HOLES = torch.tensor([1.0, 0.0, 1.0, 0.0])
FULL = torch.ones(N)


class Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)


VALUES: dict[str, tuple[Any, Any, Any]] = {
    "mask": (lambda x, m: x * m, HOLES, FULL),
    "mask of bools": (lambda x, m: x * m, HOLES > 0, FULL > 0),
    "where": (lambda x, m: torch.where(m, x, 1.0), HOLES > 0, FULL > 0),
    "masked_fill": (lambda x, m: x.masked_fill(m, 0.0), HOLES == 0, FULL == 0),
    "computed from it": (lambda x, m: x * (2 * m).relu().view(2, 2).reshape(-1), HOLES, FULL),
    "matrix": (lambda x, A: A @ x, torch.eye(N), torch.ones(N, N)),
    "dot": (lambda x, m: m @ x, HOLES, FULL),
    "convolution": (
        lambda x, w: torch.conv1d(x.view(1, 1, N), w.view(1, 1, 3)),
        torch.tensor([1.0, 0.0, 0.0]),
        torch.ones(3),
    ),
    "in a structure": (lambda x, s: x * s["a"][0], {"a": [HOLES]}, {"a": [FULL]}),
    "in a module": (lambda x, s: x * s.mask, Masked(HOLES), Masked(FULL)),
    "array": (lambda x, m: x * torch.as_tensor(m[::1]), HOLES.numpy(), FULL.numpy()),
    "array, computed": (lambda x, m: x * (torch.from_numpy(m) * 2), HOLES.numpy(), FULL.numpy()),
    "array backwards": (lambda x, m: x * torch.from_numpy(m[::-1]), HOLES.numpy()[::-1], FULL.numpy()[::-1]),
    "sparse made dense": (
        lambda x, A: A.to_dense() @ x,
        torch.eye(N).to_sparse(),
        FULL.diag().flip(0).to_sparse(),
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_zeros_of_an_argument_are_not_taken_for_structure(name: str) -> None:
    f, first, then = VALUES[name]
    plan = plan_jacobian(f, X, first, argnums=0, verify=False)
    assert not plan.patterns[0].is_local
    J, nothing = plan(X, then)
    expected = torch.autograd.functional.jacobian(lambda x: f(x, then), X).reshape(J.shape)
    torch.testing.assert_close(J.to_dense(), expected)
    assert nothing is None


PLACES: dict[str, tuple[Any, Any]] = {
    "index": (lambda x, i: x[i], torch.tensor([0, 1])),
    "index_select": (lambda x, i: x.index_select(0, i), torch.tensor([0, 1])),
    "array as index": (lambda x, i: x[torch.as_tensor(i)], np.array([0, 1])),
    "index in a structure": (lambda x, i: x[i[0]], [torch.tensor([0, 1])]),
    "mask as index": (lambda x, m: x[m], HOLES > 0),
    "scatter": (lambda x, i: torch.zeros(N).scatter(0, i, x), torch.tensor([0, 1, 3, 2])),
    "branch": (lambda x, t: x if t > 0 else x.flip(0), torch.tensor(1.0)),
    "places of a sparse matrix": (lambda x, A: A @ x, torch.eye(N).to_sparse()),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_an_argument_says_which_elements_the_structure_is_local(name: str) -> None:
    f, value = PLACES[name]
    plan = plan_jacobian(f, X, value, argnums=0)
    assert plan.patterns[0].is_local
    J = torch.autograd.functional.jacobian(lambda x: f(x, value), X)
    torch.testing.assert_close(plan(X, value)[0].to_dense(), J)
    assert plan.patterns[0].nnz == int((J != 0).sum())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_new_values_in_the_places_of_a_sparse_argument(layout: torch.layout) -> None:
    def matrix(*values: float) -> Tensor:
        places = torch.tensor([[0, 1, 2], [1, 1, 3]])
        coo = torch.sparse_coo_tensor(places, torch.tensor(values), (3, N), check_invariants=True)
        return coo if layout is torch.sparse_coo else coo.to_sparse_csr()

    plan = plan_jacobian(lambda x, A: A @ x, X, matrix(1.0, 0.0, 2.0), argnums=0, verify=False)
    later = matrix(1.0, 3.0, 0.0)
    assert plan.patterns[0].nnz == 3
    torch.testing.assert_close(plan(X, later)[0].to_dense(), later.to_dense())


def test_public_structure_says_likewise() -> None:
    assert jacobian_sparsity(lambda x, m: x * m, X, HOLES > 0)[0].to_dense().sum() == N
    assert jacobian_sparsity(lambda x, i: x[i[0]], X, [torch.tensor([0])])[0].is_local


def test_one_call_uses_the_zeros_of_its_arguments() -> None:
    J, _ = jacobian(lambda x, m: x * m, X, HOLES, argnums=0, sparse=True)
    assert J.values().numel() == 2
    held = torch.eye(N)
    assert plan_jacobian(lambda x: held @ x, X).patterns[0].nnz == N


@pytest.mark.parametrize("argnums", [0, -2, [0, 1], None])
def test_the_structure_by_some_arguments(argnums: Any) -> None:
    x, y = torch.rand(4), torch.rand(4)
    found = jacobian_sparsity(lambda a, b, n: a[1:] * a[:-1] + b[1:] * n, x, y, 2, argnums=argnums)
    all_of_them = jacobian_sparsity(lambda a, b, n: a[1:] * a[:-1] + b[1:] * n, x, y, 2)
    chosen = (
        range(3) if argnums is None else [i % 3 for i in ([argnums] if isinstance(argnums, int) else argnums)]
    )
    assert [one is not None for one in found] == [i in chosen for i in range(3)]
    for i in chosen:
        assert torch.equal(found[i].to_dense(), all_of_them[i].to_dense())
    with pytest.raises(ValueError, match="argnums"):
        jacobian_sparsity(lambda a: a, x, argnums=1)
