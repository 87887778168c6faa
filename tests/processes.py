"""Two processes that train together, by gloo: run as a script, which fails where one of them does.

Not in the process of the tests: what PyTorch's process groups start there would be left behind.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from torchzygote import Buffer, Params, checkpointed, copy_, eager_update, gradient, hook

COUNT = 2


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch() -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


def share() -> Tensor:
    return batch()[dist.get_rank() :: COUNT]


def loss(module: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
    return module(X).pow(2).mean()


def whole_gradient() -> list[Tensor]:
    alone = net()
    return list(torch.autograd.grad(loss(alone, batch()), list(alone.parameters())))


def agree(found: Sequence[Tensor | None], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one.full_tensor() if isinstance(one, DTensor) else one, other)


def averaged(mesh: DeviceMesh) -> None:
    """A vector that is averaged is the gradient of the whole batch, also of a wrapper's module."""
    for module in (net(), DistributedDataParallel(net()).module):
        grads = gradient(lambda m=module: loss(m, share()), Params(module))
        flat = grads.to_vector()
        dist.all_reduce(flat)
        copy_(grads, flat / COUNT)
        agree(list(grads.values()), whole_gradient())


def averaged_at_once(mesh: DeviceMesh) -> None:
    """What an eager update is given, averaged by the update."""
    module, found = net(), {}

    def update(p: Tensor, grad: Tensor) -> None:
        dist.all_reduce(grad)
        found[id(p)] = grad / COUNT

    with eager_update(update, module):
        loss(module, share()).backward()  # type: ignore[no-untyped-call]
    agree([found[id(p)] for p in module.parameters()], whole_gradient())


def tensor_parallel(mesh: DeviceMesh) -> None:
    """Parameters that are spread over processes: gradients, their arithmetic, clipping and optimizers."""
    module = parallelize_module(net(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    grads = gradient(lambda: loss(module, batch()), Params(module))
    expected = whole_gradient()
    agree(list(grads.values()), expected)
    agree(list((2 * grads - grads).values()), expected)
    norm = grads.clip_norm_(0.1)
    alone = net()
    for p, g in zip(alone.parameters(), expected, strict=True):
        p.grad = g.clone()
    agree([norm], [nn.utils.clip_grad_norm_(alone.parameters(), 0.1)])
    grads.assign_()
    for each in (module, alone):
        torch.optim.SGD(each.parameters(), lr=0.5).step()
    agree(list(module.parameters()), list(alone.parameters()))


class Watched(nn.Module):
    """A network with this package's functions inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, X: Tensor) -> Tensor:
        hidden = checkpointed(self.net[:2], hook(lambda g: g, X))
        rows = Buffer(hidden, len(hidden), 2)
        for i, row in enumerate(self.net[2](hidden)):
            rows[i] = row
        return rows.copy()


def inside_wrapped_modules(mesh: DeviceMesh) -> None:
    """This package's functions inside modules that reduce gradients; derivatives by their inputs."""
    for wrap in (DistributedDataParallel, lambda module: fully_shard(module, mesh=mesh)):
        module = wrap(Watched())
        loss(module, share()).backward()  # type: ignore[no-untyped-call]
        agree([p.grad for p in module.parameters()], whole_gradient())
        (by_input,) = gradient(lambda X: loss(module, X), share())
        agree([by_input], torch.autograd.grad(loss(net(), X := share().requires_grad_()), X))


def refused(mesh: DeviceMesh) -> None:
    """Wrappers by whose parameters this package would find gradients of one process."""
    plain, sharded = DistributedDataParallel(net()), fully_shard(net(), mesh=mesh)
    inner = nn.Sequential(nn.Tanh(), DistributedDataParallel(net()))
    for module, where, instead in (
        (plain, "module", r"pass its \.module"),
        (inner, "submodule 1", r"pass its \.module"),
        (sharded, "module", r"call loss\.backward"),
    ):
        message = f"^{where}: expected a module without a process group, got .*{instead}"
        for call in (
            lambda m: Params(m),
            lambda m: Params([m]),
            lambda m: gradient(lambda m: loss(m, share()), m),
            lambda m: eager_update(lambda p, g: None, m),
        ):
            with pytest.raises(TypeError, match=message):
                call(module)
    assert len(Params(plain.module)) == 4


CASES = (refused, averaged, averaged_at_once, tensor_parallel, inside_wrapped_modules)


def work(rank: int, path: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(path, COUNT), rank=rank, world_size=COUNT)
    mesh = init_device_mesh("cpu", (COUNT,))
    for case in CASES:
        case(mesh)
        if rank == 0:
            print(case.__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/store",), nprocs=COUNT)
    sys.exit(0)
