"""Each input of detection has its pattern; results and refusals of the public functions."""

from __future__ import annotations

import pytest
import torch
from detection import detect_hessian, detect_jacobian
from torch import Tensor, nn

from torchzygote import Grads, Params, hessian_sparsity, jacobian, jacobian_sparsity


def test_each_input_has_its_pattern() -> None:
    a, b = torch.rand(3), torch.rand(2, 3)
    first, second = detect_jacobian(lambda a, b: (b * a).sum(0), [a, b])
    assert torch.equal(first.to_dense(), torch.eye(3) > 0)
    assert torch.equal(second.to_dense(), torch.cat([torch.eye(3), torch.eye(3)], 1) > 0)
    first, second = detect_hessian(lambda a, b: (b * a**2).sum() + (b**2).sum(), [a, b])
    assert torch.equal(first.to_dense(), torch.eye(3) > 0)
    assert torch.equal(second.to_dense(), torch.eye(6) > 0)


def test_an_input_that_f_also_closes_over_is_told_apart() -> None:
    x = torch.rand(3)
    assert detect_hessian(lambda y: (y * x).sum(), [x])[0].nnz == 0


def test_inputs_found_by_identity() -> None:
    weight = torch.rand(3, requires_grad=True)
    (pattern,) = detect_jacobian(lambda w: weight[1:] * weight[:-1], [weight], owned=[False])
    assert pattern.nnz == 4


def test_expanded_and_strided_inputs() -> None:
    x = torch.rand(1).expand(3)
    assert torch.equal(detect_jacobian(lambda x: x * 2, [x])[0].to_dense(), torch.eye(3) > 0)
    x = torch.rand(3, 2).t()
    (pattern,) = detect_jacobian(lambda x: x[0], [x])
    assert pattern.indices.tolist() == [0, 1, 2]


def test_complex_inputs() -> None:
    x = torch.rand(3, dtype=torch.complex128)
    (pattern,) = detect_jacobian(lambda z: (z * z).real, [x])
    assert torch.equal(pattern.to_dense(), torch.eye(3) > 0)


def test_results_that_depend_on_nothing() -> None:
    x = torch.rand(3)
    weight = nn.Parameter(torch.rand(2))
    for f in (lambda x: torch.ones(2), lambda x: weight * 2, lambda x: (x > 0).float()[:2]):
        assert detect_jacobian(f, [x])[0].nnz == 0
        assert detect_jacobian(f, [x])[0].shape == (2, 3)
    assert detect_hessian(lambda x: 3.0, [x])[0].nnz == 0
    assert detect_jacobian(lambda x: x[:0], [x])[0].shape == (0, 3)
    assert detect_jacobian(lambda x: x.sum(), [torch.rand(0)])[0].shape == (1, 0)


def test_public_results_are_boolean_csr_tensors_that_say_whether_they_are_local() -> None:
    a, b, text = jacobian_sparsity(lambda x, n, s: x[1:] * n, torch.rand(3), 2.0, "s")
    assert a.layout == torch.sparse_csr
    assert a.dtype == torch.bool
    assert torch.equal(a.to_dense(), torch.eye(3)[1:] > 0)
    assert b.shape == (2, 1)
    assert b.to_dense().all()
    assert text is None
    assert a.is_local is False
    h = hessian_sparsity(lambda x: x**3, 2.0)
    assert h.shape == (1, 1)
    assert h.to_dense().all()


def test_public_functions_refuse_what_they_must() -> None:
    x = torch.rand(3)
    with pytest.raises(
        ValueError, match="jacobian_sparsity: expected f to return an array or a number, got tuple"
    ):
        jacobian_sparsity(lambda x: (x, x), x)
    with pytest.raises(
        ValueError, match="hessian_sparsity: expected f to return a real scalar, got an array"
    ):
        hessian_sparsity(lambda x: x, x)
    with pytest.raises(
        TypeError,
        match="hessian_sparsity: expected x to be a number or an array, got dict; for several arguments",
    ):
        hessian_sparsity(lambda x: x, {"x": x})
    with pytest.raises(ValueError, match="hessian_sparsity: expected real arguments"):
        hessian_sparsity(lambda x: (x * x.conj()).real.sum(), x + 1j)
    with pytest.raises(
        ValueError, match="hessian_sparsity: expected f to return a real scalar, got a complex"
    ):
        hessian_sparsity(lambda x: (x + 1j).sum(), x)
    with pytest.raises(RuntimeError, match="jacobian_sparsity: expected a plain call"):
        torch.func.vmap(lambda x: jacobian_sparsity(lambda x: x, x)[0].to_dense())(torch.rand(2, 3))


def test_params_give_grads_of_patterns() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    layer.weight.requires_grad_()
    x = torch.rand(3)
    plain = torch.rand(2)
    ps = Params([layer.weight, plain, layer.bias])
    f = lambda: layer(x)[:1] * plain
    found = jacobian_sparsity(f, ps)
    assert isinstance(found, Grads)
    assert found.params == ps
    for p, J in jacobian(f, ps).items():
        assert found[p].dtype == torch.bool
        assert found[p].layout == torch.sparse_csr
        assert torch.equal(found[p].to_dense(), J != 0)
        assert found[p].is_local is False
    assert [p.requires_grad for p in ps] == [True, False, False]


def test_params_that_f_does_not_use_and_a_number() -> None:
    w, unused = torch.rand(3), torch.rand(2)
    found = jacobian_sparsity(lambda: (w**2).sum(), Params([w, unused]))
    assert found[w].to_dense().tolist() == [[True] * 3]
    assert found[unused].shape == (1, 2)
    assert not found[unused].to_dense().any()


def test_what_f_raises_with_params_leaves_their_flags() -> None:
    w = torch.rand(3)
    with pytest.raises(RuntimeError, match="size"):
        jacobian_sparsity(lambda: w + torch.rand(4), Params([w]))
    assert not w.requires_grad


def test_params_beside_other_arguments_are_one_of_them_outside_argnums_only() -> None:
    w = torch.rand(3)
    f = lambda x, ps: x * w
    found = jacobian_sparsity(f, torch.rand(3), Params([w]), argnums=0)
    assert found[0].to_dense().diagonal().all()
    assert found[1] is None
    with pytest.raises(TypeError, match="argument 1: expected Params alone"):
        jacobian_sparsity(f, torch.rand(3), Params([w]))


LAYOUTS: dict[str, Tensor] = {
    "whole": torch.linspace(1, 2, 18),
    "every other": torch.linspace(1, 2, 18)[::2],
    "from the third on": torch.linspace(1, 2, 18)[2:],
    "transposed": torch.linspace(1, 2, 18).reshape(3, 6).t(),
    "columns": torch.linspace(1, 2, 18).reshape(3, 6)[:, 1:4],
    "a little of much": torch.linspace(1, 2, 100_000)[50_000:50_018],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_that_as_strided_reads(name: str) -> None:
    """Offsets count from the beginning of the memory, and strides in it."""
    x = LAYOUTS[name]
    f = lambda x: x.as_strided((4,), (1,), x.storage_offset() + 2) ** 2 + x.as_strided((4,), (2,)) ** 3
    J = torch.autograd.functional.jacobian(f, x).reshape(4, -1)
    structure = jacobian_sparsity(f, x)[0].to_dense()
    assert not (J != 0)[structure == 0].any()
    torch.testing.assert_close(jacobian(f, x, sparse=True)[0].to_dense(), J)


@pytest.mark.parametrize("name", ["every other", "from the third on", "columns"])
def test_memory_that_as_strided_reads_from_its_beginning(name: str) -> None:
    x = LAYOUTS[name]
    f = lambda x: x.as_strided((4,), (1,), 2) ** 2
    J = torch.autograd.functional.jacobian(f, x).reshape(4, -1)
    assert not (J != 0)[jacobian_sparsity(f, x)[0].to_dense() == 0].any()
