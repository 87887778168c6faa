"""Detection sees through compiled functions, and leaves them compiled."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from detection import detect_hessian, detect_jacobian
from torch import Tensor, nn

from torchzygote import hessian_sparsity, jacobian, jacobian_sparsity


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Backend:
    """Counts what it compiles."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


def product(x: Tensor) -> Tensor:
    return x[1:] * x[:-1]


BAND = torch.eye(5, 6) + torch.eye(6)[1:] > 0


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_function_is_seen_through_and_stays_compiled(fullgraph: bool, warm: bool) -> None:
    backend = Backend()
    compiled = torch.compile(lambda x: product(x), backend=backend, fullgraph=fullgraph)
    x = torch.randn(6)
    if warm:
        compiled(x)
    before = backend.count
    assert torch.equal(jacobian_sparsity(compiled, x)[0].to_dense(), BAND)
    assert hessian_sparsity(lambda x: compiled(x).sum(), x).to_dense().sum() == 10
    assert backend.count == before  # not in detection
    compiled(x)
    assert backend.count == 1
    compiled(x.double())
    assert backend.count == 2


@pytest.mark.parametrize("sparse", [False, True])
def test_so_it_does_after_a_jacobian(sparse: bool) -> None:
    backend = Backend()
    compiled = torch.compile(lambda x: product(x), backend=backend, fullgraph=True)
    x = torch.randn(3000)
    J = jacobian(compiled, x, sparse=sparse)[0]
    expected = torch.diag(x[1:], -1)[1:] + torch.diag(x[:-1], 1)[:-1]
    torch.testing.assert_close(J.to_dense(), expected)
    count = backend.count
    compiled(torch.randn(6))
    assert backend.count == count + 1


def test_a_compiled_module_stays_compiled() -> None:
    backend = Backend()
    net = torch.compile(nn.Sequential(nn.Conv1d(1, 1, 3), nn.Tanh()), backend=backend, fullgraph=True)
    x = torch.randn(1, 1, 8)
    assert detect_jacobian(net, [x])[0].nnz == 18
    assert backend.count == 0
    net(x)
    assert backend.count == 1


def test_a_compiled_function_may_be_made_within() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.compile(product, backend="eager", fullgraph=True)(x)

    assert torch.equal(detect_jacobian(f, [torch.randn(6)])[0].to_dense(), BAND)


def test_compiling_goes_on_after_f_raises() -> None:
    backend = Backend()
    compiled = torch.compile(lambda x: product(x), backend=backend, fullgraph=True)

    def f(x: Tensor) -> Tensor:
        raise KeyError(compiled(x).sum())

    with pytest.raises(KeyError):
        detect_jacobian(f, [torch.randn(6)])
    before = backend.count  # f ran once more without a recorder
    compiled(torch.randn(6).double())
    assert backend.count == before + 1


def test_compiling_goes_on_after_detection_in_several_threads() -> None:
    backend = Backend()
    compiled = torch.compile(lambda x: product(x), backend=backend, fullgraph=True)
    inside, outside = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)
    found = []

    def run(first: bool) -> None:
        def f(x: Tensor) -> Tensor:
            inside.wait()  # both are in
            if not first:
                outside.wait()  # the other one is out
            return compiled(x)

        found.append(detect_jacobian(f, [torch.randn(6)])[0].nnz)
        if first:
            outside.wait()

    threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [10, 10]
    assert backend.count == 0
    compiled(torch.randn(6))
    assert backend.count == 1


def branching(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x.flip(0), (x,))


def test_torch_cond_is_dense_and_goes_on_working() -> None:
    x = torch.rand(4)
    for _ in range(2):
        assert detect_jacobian(branching, [x])[0].dense
        assert detect_hessian(lambda x: branching(x).sum(), [x])[0].dense
        assert torch.equal(branching(x), 2 * x)


def test_detection_within_a_function_that_is_compiled_around_it() -> None:
    found = []

    @torch.compiler.disable
    def look(x: Tensor) -> None:
        found.append(detect_jacobian(torch.compile(product, backend="eager"), [x.detach()])[0].nnz)

    def f(x: Tensor) -> Tensor:
        y = x * 2
        look(x)
        return y + 1

    backend = Backend()
    torch.compile(f, backend=backend)(torch.randn(6))
    assert found == [10]
    assert backend.count == 2


def in_a_new_process(code: str) -> str:
    start = "import sys, torch, torchzygote as tz\nx = torch.rand(6)\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_dynamo_is_not_imported() -> None:
    code = "tz.jacobian_sparsity(lambda x: x[1:] * x[:-1], x)\nassert 'torch._dynamo' not in sys.modules"
    in_a_new_process(code)


COLD_COND = """
cond = lambda x: torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x.flip(0), (x,))
print(int(tz.jacobian_sparsity(cond, x)[0].to_dense().sum()))
assert torch.equal(cond(x), 2 * x)
"""
COLD_COMPILE = """
count = []
def backend(graph, inputs):
    count.append(1)
    return graph.forward
made = []
def f(x):
    if not made:
        made.append(torch.compile(lambda x: x[1:] * x[:-1], backend=backend, fullgraph=True))
    with torch.no_grad():
        largest = made[0](x).argmax()
    return made[0](x) * x[largest]
found = tz.jacobian_sparsity(f, x)[0]
print(int(found.to_dense().sum()), found.is_local)
before = len(count)
made[0](torch.rand(9).double())
assert len(count) == before + 1
"""


@pytest.mark.parametrize(("code", "expected"), [(COLD_COND, ["36"]), (COLD_COMPILE, None)])
def test_the_first_to_import_dynamo_may_be_f(code: str, expected: Any) -> None:
    words = in_a_new_process(code).split()
    if expected is not None:
        assert words == expected
    else:
        assert 10 <= int(words[0]) < 30
        assert words[1] == "True"
