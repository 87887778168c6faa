"""Sparse gradients among Grads: arithmetic, norms, clipping and assignment as of dense ones."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from grads_samples import BINARY, IN_PLACE
from torch import Tensor, nn

from torchzygote import GradDict, Grads, Params, gradient, jacobian


@pytest.fixture
def embedding() -> tuple[nn.Embedding, Tensor, Grads, Grads]:
    """An embedding with sparse gradients, its rows, and the same gradients sparse and dense."""
    layer = nn.Embedding(5, 2, sparse=True)
    rows = torch.tensor([1, 3, 1])
    bias = torch.ones(2)
    g = gradient(lambda: (layer(rows) * bias).pow(2).sum(), Params([layer, bias]))
    dense = g.map(lambda x: x.to_dense() if x.is_sparse else x)
    assert g[layer.weight].is_sparse
    return layer, bias, g, dense


def densely(g: GradDict) -> dict[Tensor, Any]:
    return {k: v.to_dense() if v.layout is not torch.strided else v for k, v in g.items()}


@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_take_part(symbol: str, embedding: Any) -> None:
    layer, _bias, g, d = embedding
    op = BINARY[symbol]
    for right, dense_right in [(g, d), (d, d), (2.0, 2.0), (torch.tensor(2.0), torch.tensor(2.0))]:
        torch.testing.assert_close(densely(op(g, right)), densely(op(d, dense_right)), equal_nan=True)
    torch.testing.assert_close(densely(op(d, g)), densely(op(d, d)), equal_nan=True)
    torch.testing.assert_close(densely(op(3.0, g)), densely(op(3.0, d)), equal_nan=True)
    torch.testing.assert_close(
        densely(IN_PLACE[symbol](g.copy(), g)), densely(IN_PLACE[symbol](d.copy(), d)), equal_nan=True
    )
    assert (g + g)[layer.weight].is_sparse
    assert (2 * g)[layer.weight].is_sparse
    for sign in (operator.neg, operator.pos):
        assert sign(g)[layer.weight].is_sparse
        torch.testing.assert_close(densely(sign(g)), densely(sign(d)))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_gradients_are_normed_clipped_and_assigned(embedding: Any) -> None:
    layer, _bias, g, d = embedding
    for p in (2.0, 1.0, float("inf"), float("-inf")):
        torch.testing.assert_close(g.norm(p), d.norm(p))
    torch.testing.assert_close(densely(g.clip_norm(0.5)), densely(d.clip_norm(0.5)))
    torch.testing.assert_close(densely(g.clip_value(0.5)), densely(d.clip_value(0.5)))
    torch.testing.assert_close(g.to_vector(), d.to_vector())
    assert g.nonfinite() == []
    g.assign_()
    assert layer.weight.grad.is_sparse
    d.accumulate_()
    g.accumulate_(2.0)
    torch.testing.assert_close(layer.weight.grad.to_dense(), 4 * d[layer.weight])


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Sparse CSR tensor support")
def test_a_dense_value_takes_a_sparse_operand_in_place(symbol: str, layout: torch.layout) -> None:
    w, b = torch.zeros(2, 2), torch.zeros(2)
    operand = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    g = GradDict({b: torch.ones(2), w: torch.full((2, 2), 5.0)})
    expected = BINARY[symbol](g, {w: operand, b: torch.full((2,), 2.0)})
    memory = g[w].data_ptr()
    IN_PLACE[symbol](g, {w: operand.to_sparse(layout=layout), b: torch.full((2,), 2.0)})
    torch.testing.assert_close(densely(g), densely(expected))
    assert g[w].data_ptr() == memory


Y = torch.tensor([1.0, 2.0, 4.0, 8.0])
LIKE = {"a number": 3.0, "a 0-dim tensor": torch.tensor(3.0)}


def stencils(dtype: torch.dtype = torch.float32) -> tuple[Grads, Grads, GradDict]:
    """Two Jacobians of different structures and a dense one, as CSR; the first one's values, dense."""
    x, y = Y.to(dtype), torch.ones(3, dtype=dtype)
    ps = Params([x, y])
    g = jacobian(lambda: x[1:] * x[:-1] * y, ps, sparse=True)
    h = jacobian(lambda: x[:3] ** 2 + y, ps, sparse=True)
    assert g[x].layout is h[x].layout is torch.sparse_csr
    return g, h, GradDict({x: g[x], y: h[y].to_dense()})


@pytest.mark.parametrize("symbol", BINARY)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.int64]
)
def test_sparse_jacobians_take_part(symbol: str, dtype: torch.dtype) -> None:
    g, h, mixed = (each.map(lambda v: v.to(dtype)) for each in stencils())
    op = BINARY[symbol]
    for left in (g, h, mixed):
        for right in (g, h, mixed, *LIKE.values()):
            dense = GradDict(densely(right)) if isinstance(right, GradDict) else right
            expected = op(GradDict(densely(left)), dense)
            found = op(left, right)
            torch.testing.assert_close(densely(found), dict(expected), equal_nan=True)
            for key in left:
                both = isinstance(right, GradDict) and right[key].layout is torch.sparse_csr
                keeps = both if symbol in "+-" else not isinstance(right, GradDict) and symbol in "*/"
                sparse = keeps and left[key].layout is torch.sparse_csr
                assert found[key].layout is (torch.sparse_csr if sparse else torch.strided)
            if dtype is torch.int64:
                continue
            torch.testing.assert_close(
                densely(IN_PLACE[symbol](left.copy(), right)), dict(expected), equal_nan=True
            )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_half_precision_goes_by_dense_values() -> None:
    """PyTorch has no sums of COO tensors there."""
    w = torch.zeros(2, 2)
    a, b = torch.tensor([[0.0, 3.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    g, h = (GradDict({w: x.half().to_sparse_csr()}) for x in (a, b))
    for found, expected in ((g + h, a + b), (g - h, a - b), (g + g, a + a), (g / 2, a / 2)):
        assert found[w].layout is torch.sparse_csr
        torch.testing.assert_close(found[w].to_dense(), expected.half())


@pytest.mark.parametrize("layout", [torch.sparse_csc, torch.sparse_bsr])
@pytest.mark.filterwarnings("ignore:Sparse CSC tensor support", "ignore:Sparse BSR tensor support")
def test_other_compressed_layouts_are_divided_and_subtracted(layout: torch.layout) -> None:
    w = torch.zeros(2, 2)
    values = torch.tensor([[0.0, 3.0], [2.0, 0.0]])
    blocks = (1, 1) if layout is torch.sparse_bsr else None
    g = GradDict({w: values.to_sparse(layout=layout, blocksize=blocks)})
    torch.testing.assert_close(densely(g / 2), {w: values / 2})
    torch.testing.assert_close(densely(g - g), {w: values - values})


def test_sparse_jacobians_are_differentiated() -> None:
    weights = torch.arange(12.0).view(3, 4)

    def total(x: Tensor, t: Tensor, layout: torch.layout) -> Tensor:
        g = jacobian(lambda: x[1:] * x[:-1], Params([x]), sparse=layout is not torch.strided)
        h = jacobian(lambda: x[:3] ** 3, Params([x]), sparse=layout is not torch.strided)
        (entry,) = ((g - h) / t).values()
        return ((entry if layout is torch.strided else entry.to_dense()) * weights).sum()

    t = torch.tensor(3.0)
    expected = gradient(lambda x, t: total(x, t, torch.strided), Y, t)
    torch.testing.assert_close(gradient(lambda x, t: total(x, t, torch.sparse_csr), Y, t), expected)
