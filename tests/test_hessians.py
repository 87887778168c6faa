"""Hessians and diagonals: ways, layers without fused derivatives, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchzygote.gradients import gradient
from torchzygote.hessians import diaghessian, hessian, hessian_dual, hessian_reverse, withhessian
from torchzygote.jacobians import jacobian
from torchzygote.params import Params


def by_differences(f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """Central differences of the gradient."""
    rows = []
    for e in torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape):
        rows.append(gradient(f, x + step * e)[0] - gradient(f, x - step * e)[0])
    return torch.stack(rows).reshape(x.numel(), x.numel()) / (2 * step)


def layers() -> dict[str, Callable[[Tensor], Tensor]]:
    torch.manual_seed(3)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    lstm = nn.LSTM(4, 3, batch_first=True).double()
    conv = nn.Conv1d(3, 2, 2).double()
    norm = nn.BatchNorm1d(3).double().eval()
    index = torch.tensor([0, 0, 2])
    return {
        "fused attention": lambda x: (F.scaled_dot_product_attention(x, x, x) ** 2).sum(),
        "MultiheadAttention": lambda x: (attention.eval()(x, x, x)[0] ** 2).sum(),
        "TransformerEncoderLayer, train": lambda x: (encoder.train()(x) ** 3).sum(),
        "TransformerEncoderLayer, eval": lambda x: (encoder.eval()(x) ** 3).sum(),
        "LSTM": lambda x: (lstm(x)[0] ** 2).sum(),
        "conv": lambda x: (conv(x) ** 3).sum(),
        "batch norm": lambda x: (norm(x) ** 3).sum(),
        "indexing": lambda x: (x[0, index] ** 3).sum(),
        "complex values": lambda x: (torch.fft.fft(x, dim=-1).abs() ** 4).sum(),
    }


@pytest.mark.parametrize("name", layers())
def test_layers_in_every_way(name: str) -> None:
    f = layers()[name]
    torch.manual_seed(4)
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    expected = by_differences(f, x)
    for way in (hessian, hessian_dual, hessian_reverse):
        torch.testing.assert_close(
            way(f, x), expected, atol=1e-6, rtol=1e-6, msg=lambda m, w=way: f"{w}: {m}"
        )
    (diagonal,) = diaghessian(f, x)
    torch.testing.assert_close(diagonal.reshape(-1), expected.diagonal(), atol=1e-6, rtol=1e-6)


NESTED: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "jacobian reverse": lambda g, x: jacobian(g, x, mode="reverse")[0],
    "jacobian forward": lambda g, x: jacobian(g, x, mode="forward")[0],
    "jacrev": lambda g, x: torch.func.jacrev(g)(x).reshape(x.numel(), -1),
    "jacfwd": lambda g, x: torch.func.jacfwd(g)(x).reshape(x.numel(), -1),
}


@pytest.mark.parametrize("way", NESTED.values(), ids=NESTED.keys())
@pytest.mark.parametrize("name", layers())
def test_layers_in_nested_calls(
    name: str, way: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
) -> None:
    f = layers()[name]
    torch.manual_seed(4)
    x = torch.randn(1, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(
        way(lambda x: gradient(f, x)[0], x), by_differences(f, x), atol=1e-6, rtol=1e-6
    )


def test_fused_kernels_are_switched_back_on() -> None:
    assert torch.backends.cuda.flash_sdp_enabled()
    with pytest.raises(ValueError, match="real scalar"):
        hessian(lambda x: x, torch.ones(2))
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_withhessian_runs_f_once() -> None:
    calls = []

    def f(x: Tensor) -> Tensor:
        calls.append(1)
        return (x**3).sum()

    x = torch.tensor([1.0, 2.0])
    val, grad, hess = withhessian(f, x)
    assert len(calls) == 1
    torch.testing.assert_close((val, grad, hess), (torch.tensor(9.0), 3 * x**2, torch.diag(6 * x)))
    assert not any(result.requires_grad for result in (val, grad, hess))


@pytest.mark.parametrize("way", [hessian, hessian_dual, hessian_reverse])
def test_constant_linear_and_piecewise_linear_functions(way: Callable[..., Tensor]) -> None:
    x = torch.tensor([1.0, -2.0])
    for f in (lambda x: 3.0, lambda x: x.sum(), lambda x: F.relu(x).sum() + x.abs().sum(), lambda x: True):
        assert torch.equal(way(f, x), torch.zeros(2, 2))


def test_numbers_and_empty_arrays() -> None:
    torch.testing.assert_close(hessian(torch.sin, torch.pi / 2), torch.tensor(-1.0))
    assert hessian(torch.sin, torch.tensor(0.5)).shape == ()
    assert hessian(lambda x: (x**2).sum(), torch.ones(0)).shape == (0, 0)
    assert diaghessian(lambda x: (x**2).sum(), torch.ones(0, 2))[0].shape == (0, 2)


def test_diagonal_by_parameters_and_several_arguments() -> None:
    w = torch.tensor([1.0, 2.0], dtype=torch.float64)
    b = torch.tensor(3.0, dtype=torch.float64)
    unused = torch.ones(2)
    D = diaghessian(lambda: (w**3).sum() * b**2, Params([w, b, unused]))
    torch.testing.assert_close(D[w], 6 * w * 9)
    torch.testing.assert_close(D[b], 2 * (w**3).sum())
    assert torch.equal(D[unused], torch.zeros(2))
    assert diaghessian(lambda x, s, t: (x**2).sum(), w, "s", (1, 2))[1:] == (None, None)
    assert diaghessian(lambda a, b: (a * b).sum() ** 2, w, w, argnums=1)[0] is None


def test_chunks_give_the_same_numbers() -> None:
    x = torch.randn(7, dtype=torch.float64)
    f = lambda x: (x.sin() * x.flip(0)).sum() ** 2
    expected = torch.func.hessian(f)(x)
    for chunk_size in (1, 2, 3, 7, 100):
        for way in (hessian, hessian_dual, hessian_reverse):
            torch.testing.assert_close(way(f, x, chunk_size=chunk_size), expected)
        torch.testing.assert_close(diaghessian(f, x, chunk_size=chunk_size)[0], expected.diagonal())


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.ones(2) * 1j, ValueError, "real arguments"),
        ((1.0, 2.0), TypeError, "number or an array, got tuple"),
        (nn.Linear(1, 1), TypeError, "got Linear"),
        ("text", TypeError, "got str"),
        (None, TypeError, "got NoneType"),
    ],
)
def test_refused_arguments(x: Any, error: type[Exception], match: str) -> None:
    for way in (hessian, hessian_dual, hessian_reverse, withhessian):
        with pytest.raises(error, match=match):
            way(lambda x: 1.0, x)


@pytest.mark.parametrize("f", [lambda x: x, lambda x: x.sum() * 1j, lambda x: (x.sum(), 1), lambda x: None])
def test_refused_results(f: Callable[[Tensor], Any]) -> None:
    for way in (hessian, hessian_dual, hessian_reverse, withhessian, diaghessian):
        with pytest.raises(ValueError, match="expected f to return a real scalar"):
            way(f, torch.ones(2))


@pytest.mark.parametrize("way", [hessian, hessian_dual, hessian_reverse])
def test_compiled(way: Callable[..., Tensor]) -> None:
    f = lambda x: (x.sin() * x.roll(1)).sum()
    x = torch.randn(4, dtype=torch.float64)
    compiled = torch.compile(lambda x: way(f, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), torch.func.hessian(f)(x))


GROWTH = """
import resource
import torch
from torchzygote import diaghessian

torch.set_num_threads(1)
f = lambda x: (x.sum() / 300).sin() + (x**2).sum()
diaghessian(f, torch.randn(1000), chunk_size=16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
diaghessian(f, torch.randn(8000), chunk_size=16)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts kilobytes as Linux does")
def test_a_dense_diagonal_takes_a_chunk_of_memory_however_long() -> None:
    """500 chunks of half a megabyte; the heap once kept half of each."""
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40


def test_compiled_functions_are_differentiated_twice_or_refused() -> None:
    """Autograd can't follow the backward of a compiled function: its second derivatives seem to be zero."""
    torch._dynamo.reset()
    f = lambda x: torch.tanh(x @ torch.ones(2, 3)).sum()
    compiled = torch.compile(f, backend="aot_eager")
    x = torch.tensor([[0.1, 0.2], [0.3, -0.5]])
    for call in (
        lambda: diaghessian(compiled, x),
        lambda: hessian_reverse(compiled, x),
        lambda: gradient(lambda x: gradient(compiled, x)[0].sum(), x),
    ):
        with pytest.raises(RuntimeError, match="made with torch.compile"):
            call()
    torch.testing.assert_close(hessian(compiled, x), hessian(f, x))
    torch.testing.assert_close(hessian_dual(compiled, x), hessian(f, x))
    torch.testing.assert_close(gradient(compiled, x), gradient(f, x))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="newer than this PyTorch")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_in_chunks_is_refused_twice(reduction: str) -> None:
    """Its gradients come out of its forward pass: the second derivative would be zero."""
    weight, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2])
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=1)

    def loss(x: Tensor, **keywords: Any) -> Tensor:
        return F.linear_cross_entropy(x.view(2, 3), weight, target, reduction=reduction, **keywords).sum()

    x = torch.randn(6, dtype=torch.float64)
    chunked = lambda x: loss(x, options=options)
    torch.testing.assert_close(gradient(chunked, x), gradient(loss, x))
    for way in (hessian, hessian_reverse, diaghessian, lambda f, x: hessian(f, x, sparse=True)):
        with pytest.raises(RuntimeError, match="twice.*linear_cross_entropy with chunked options"):
            way(chunked, x)
    with pytest.raises(RuntimeError, match="functorch transforms"):  # PyTorch's own words
        hessian_dual(chunked, x)
    torch.testing.assert_close(hessian(loss, x), by_differences(loss, x), rtol=1e-5, atol=1e-7)


SPARSE_EMBEDDING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "jacobian": lambda e, w: jacobian(e, w)[0],
    "forward": lambda e, w: jacobian(e, w, mode="forward")[0],
    "Params": lambda e, w: jacobian(lambda: e(w), Params([w]))[w],
    "hessian": lambda e, w: hessian(lambda w: e(w).pow(3).sum(), w),
    "diaghessian": lambda e, w: diaghessian(lambda w: e(w).pow(3).sum(), w)[0],
    "diaghessian by Params": lambda e, w: diaghessian(lambda: e(w).pow(3).sum(), Params([w]))[w],
    "sparse": lambda e, w: jacobian(e, w, sparse=True)[0].to_dense(),
}


@pytest.mark.filterwarnings("ignore:rows are computed one at a time", "ignore:There is a performance drop")
@pytest.mark.parametrize("way", SPARSE_EMBEDDING)
def test_gradients_that_are_sparse(way: str) -> None:
    places, w = torch.tensor([1, 3, 3]), torch.randn(6, 3, dtype=torch.float64)
    found, expected = (
        SPARSE_EMBEDDING[way](lambda w, s=s: F.embedding(places, w, sparse=s), w) for s in (True, False)
    )
    torch.testing.assert_close(found, expected)
    assert expected.any()
