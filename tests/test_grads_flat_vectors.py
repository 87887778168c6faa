"""copy_ between flat vectors and Params or Grads: both ways, what does not fit, its derivative."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchzygote import GradDict, Grads, Params, copy_, gradient, vectors


def test_copies_go_both_ways() -> None:
    model = nn.Linear(2, 3)
    ps = Params(model)
    flags = [p.requires_grad for p in ps]
    vector = torch.arange(9.0)
    assert copy_(ps, vector) is ps
    assert torch.equal(model.weight, vector[:6].reshape(3, 2))
    assert torch.equal(model.bias, vector[6:])
    assert [p.requires_grad for p in ps] == flags
    back = torch.zeros(9, dtype=torch.float64)
    assert copy_(back, ps) is back
    assert torch.equal(back, vector.double())
    g = gradient(lambda: model.weight.sum(), ps)
    assert copy_(g, 2 * vector) is g
    assert torch.equal(g[model.bias], 2 * vector[6:])
    assert torch.equal(copy_(torch.zeros(9), g), 2 * vector)
    assert torch.equal(g.to_vector(), 2 * vector)
    memory = g[model.weight].data_ptr()
    copy_(g, vector)
    assert g[model.weight].data_ptr() == memory


def test_numpy_vectors_will_do() -> None:
    w, b = torch.zeros(2), torch.zeros(())
    ps = copy_(Params([w, b]), np.array([1.0, 2.0, 3.0]))
    assert torch.equal(ps.to_vector(), torch.tensor([1.0, 2.0, 3.0]))
    x = np.zeros(6)
    copy_(x[::2], ps)
    assert x.tolist() == [1, 0, 2, 0, 3, 0]
    x.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        copy_(x[:3], ps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy_(ps, x[1:4])


def test_none_becomes_zeros_and_back() -> None:
    w, b = torch.ones(2), torch.ones(())
    g = gradient(lambda: b * 2, Params([w, b]))
    assert torch.equal(g.to_vector(), torch.tensor([0.0, 0.0, 2.0]))
    copy_(g, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(g[w], torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), ()])
def test_a_vector_that_does_not_fit_writes_nothing(shape: tuple[int, ...]) -> None:
    w, b = torch.zeros(2), torch.zeros(())
    ps = Params([w, b])
    g = Grads(ps, [torch.zeros(2), torch.zeros(())])
    for dst, src in [(ps, torch.ones(shape)), (g, torch.ones(shape))]:
        with pytest.raises(ValueError, match="vector of 3 elements.*nothing was written"):
            copy_(dst, src)
    vector = torch.ones(shape)
    for src in (ps, g):
        with pytest.raises(ValueError, match="expected dst to be a vector of 3 elements"):
            copy_(vector, src)
    assert ps.to_vector().sum() == g.to_vector().sum() == 0
    assert torch.equal(vector, torch.ones(shape))


def test_copies_between_other_things_are_refused() -> None:
    w = torch.zeros(2)
    ps = Params([w])
    for dst, src in [
        (ps, ps),
        (torch.zeros(2), torch.zeros(2)),
        (ps, [1.0, 2.0]),
        (GradDict(), torch.zeros(0)),
    ]:
        with pytest.raises(TypeError, match="copy_: expected a Params or Grads and a flat vector"):
            copy_(dst, src)
    with pytest.raises(TypeError, match="copy_: expected a dtype"):
        copy_(ps, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(TypeError, match="copy_: expected a dtype"):
        copy_(torch.ones(2, dtype=torch.int64), ps)
    with pytest.raises(ValueError, match="writable"):
        copy_(torch.zeros(1).expand(2), ps)
    with pytest.raises(RuntimeError, match="without a graph"):
        gradient(lambda v: copy_(ps, v).to_vector().sum(), torch.ones(2))
    assert w.sum() == 0


def test_a_copy_into_grads_keeps_the_derivative() -> None:
    w = torch.ones(2)

    def f(v: Tensor) -> Tensor:
        g = Grads(Params([w]), [torch.zeros(2)])
        copy_(g, v)
        vector = copy_(torch.zeros(2), g * 3)
        return (vector**2).sum()

    v = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(gradient(f, v)[0], 18 * v)


@pytest.mark.parametrize("limit", [0, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_tensors_and_a_vector(limit: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_SMALL", limit)
    keys = [torch.rand(i % 4, 3) for i in range(20)] + [torch.rand(3, 2).T, torch.rand(())]
    g = Grads(Params(keys), [k + 1 for k in keys])
    expected = torch.cat([(k + 1).reshape(-1) for k in keys])
    assert torch.equal(g.to_vector(), expected)
    v = torch.zeros(len(expected), dtype=dtype)
    assert copy_(v, g) is v
    assert torch.equal(v, expected.to(dtype))
    copy_(g, v + 1)
    assert torch.equal(torch.cat([x.reshape(-1) for x in g.values()]), expected + 1)
    copy_(Params(keys), v)
    assert torch.equal(torch.cat([k.reshape(-1) for k in keys]), expected)


@pytest.mark.parametrize("limit", [0, 2**24])
def test_a_vector_over_the_values(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_SMALL", limit)
    v = torch.arange(6.0)
    g = Grads(Params([torch.zeros(3), torch.zeros(3)]), [v[3:], v[:3]])
    assert copy_(v, g).tolist() == [3, 4, 5, 0, 1, 2]


def test_a_vector_holds_what_no_common_dtype_does() -> None:
    w, n = torch.zeros(1), torch.zeros(1)
    g = Grads(Params([w, n]), [torch.tensor([0.5]), torch.tensor([2**24 + 1])])
    assert copy_(torch.zeros(2, dtype=torch.float64), g).tolist() == [0.5, 2**24 + 1]


def test_a_vector_of_one_tensor_has_memory_of_its_own() -> None:
    w = torch.ones(2, 2)
    Grads(Params([w]), [w]).to_vector().zero_()
    assert w.sum() == 4


def test_real_and_complex_tensors_go_both_ways() -> None:
    w = torch.tensor([1 + 2j, 3 - 1j])
    b = torch.tensor([[0.5], [2.0]])
    ps = Params([w, b])
    vector = ps.to_vector()
    assert vector.dtype is torch.complex64
    copy_(ps, 2 * vector)
    assert w.tolist() == [2 + 4j, 6 - 2j]
    assert b.tolist() == [[1.0], [4.0]]
    g = Grads(ps, [w.clone(), b.clone()])
    copy_(g, g.to_vector() + 1)
    assert g[b].dtype is torch.float32
    assert g[b].tolist() == [[2.0], [5.0]]
    before = ps.to_vector()
    with pytest.raises(TypeError, match="real tensors among complex ones"):
        copy_(ps, before * 1j)
    with pytest.raises(TypeError, match="expected a dtype that holds"):
        copy_(Params([b]), vector[:2])
    assert torch.equal(ps.to_vector(), before)


def test_a_complex_vector_is_not_cut_down_to_integers() -> None:
    a, b = torch.zeros(2), torch.zeros(2, dtype=torch.complex64)
    g = Grads(Params([a, b]), [torch.tensor([0, 0]), torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(TypeError, match="holds what torch.float32 does, got torch.int64"):
        copy_(g, torch.tensor([1.5, 2.7, 1j, 2j]))
    assert g[b].tolist() == [0, 0]
