"""A process forked while other threads, or a derivative around it, were in the middle of something."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")

# Another thread is in forward mode, and in a derivative by Params, while this one forks.
BESIDE_OTHERS = """
import os, threading, torch
from torchzygote import Params, forwarddiff, gradient, hessian_dual, jacobian, pushforward

inside, go_on = [threading.Event(), threading.Event()], threading.Event()

def wait(k, x):
    inside[k].set()
    go_on.wait(60)
    return (x**2).sum()

w, x = torch.ones(2), torch.ones(2)
threads = [
    threading.Thread(target=lambda: pushforward(lambda x: wait(0, x), x)(x)),
    threading.Thread(target=lambda: gradient(lambda: wait(1, w), Params([w]))),
]
for thread in threads:
    thread.start()
for one in inside:
    one.wait(60)
pid = os.fork()
if pid == 0:
    def calls():
        assert torch.equal(hessian_dual(lambda x: (x**3).sum(), x), 6 * torch.eye(2))
        assert gradient(lambda a, b: forwarddiff(lambda a: a * b, a), x[0], x[1])[1] is None
        assert torch.equal(jacobian(lambda x: x**3, x, mode="forward")[0], 3 * torch.eye(2))
        by = torch.func.vmap(lambda z: gradient(lambda: (w * z).sum(), Params([w]))[w])(torch.ones(3, 2))
        assert torch.equal(by, torch.ones(3, 2))
        return 0

    os._exit(calls())
status = os.waitpid(pid, 0)[1]
go_on.set()
for thread in threads:
    thread.join()
assert status == 0, status
"""
# A loader with workers, in the middle of f.
INSIDE_F = """
import torch
from torchzygote import gradient, isderiving

class Squares(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        assert not isderiving()
        g = gradient(lambda x: (x**2).sum(), torch.ones(2))[0]
        assert not g.requires_grad
        return g

def f(x):
    loader = torch.utils.data.DataLoader(Squares(), num_workers=1, multiprocessing_context="fork", timeout=60)
    return sum((batch * x).sum() for batch in loader)

assert torch.equal(gradient(f, torch.ones(2))[0], torch.full((2,), 8.0))
"""


@pytest.mark.parametrize("script", [BESIDE_OTHERS, INSIDE_F], ids=["beside others", "inside f"])
def test_a_forked_process_goes_on(script: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", script]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
