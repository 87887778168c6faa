"""Checkpoints against ``torch.utils.checkpoint`` and against none; hooks against ``Tensor.register_hook``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from torchzygote import checkpointed, hook, jacobian

from ._harness import Row, compare, compare_memory

DEPTH, WIDTH, BATCH = 24, 1024, 512


def plainly(f: Callable[..., Any], *xs: Any) -> Any:
    return f(*xs)


def torchs(f: Callable[..., Any], *xs: Any) -> Any:
    return torch_checkpoint(f, *xs, use_reentrant=False)


WAYS: dict[str, Callable[..., Any]] = {
    "checkpointed": checkpointed,
    "torch.utils.checkpoint": torchs,
    "no checkpoint": plainly,
}


def layers(depth: int, width: int) -> list[nn.Module]:
    """Layers with a few tensors inside, the kind that checkpoints are for."""
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width), nn.GELU())
        for _ in range(depth)
    ]


def drop_gradient(p: Tensor) -> None:
    p.grad = None


def step(way: str, depth: int = DEPTH, width: int = WIDTH, batch: int = BATCH) -> Callable[[], None]:
    """Forward and backward by all parameters, whose gradients go as they come, as in an eager update."""
    net, x, run = layers(depth, width), torch.randn(batch, width), WAYS[way]
    for layer in net:
        for p in layer.parameters():
            p.register_post_accumulate_grad_hook(drop_gradient)

    def once() -> None:
        h = x
        for layer in net:
            h = run(layer, h)
        h.square().mean().backward()

    return once


def build_step(way: str) -> Callable[[], None]:
    step(way, 2, 8, 2)()
    return step(way)


def func_step(way: str, depth: int = DEPTH, width: int = WIDTH, batch: int = BATCH) -> Callable[[], Tensor]:
    """The gradient by the input, inside ``torch.func``, which ``torch.utils.checkpoint`` refuses."""
    net, x, run = layers(depth, width), torch.randn(batch, width), WAYS[way]
    for layer in net:
        layer.requires_grad_(False)

    def loss(x: Tensor) -> Tensor:
        for layer in net:
            x = run(layer, x)
        return x.square().mean()

    return lambda: torch.func.grad(loss)(x)


def build_func_step(way: str) -> Callable[[], Tensor]:
    func_step(way, 2, 8, 2)()
    return func_step(way)


def training() -> Iterator[Row]:
    work = f"checkpointed, {DEPTH} layers of width {WIDTH}, forward and backward"
    torchs_way = "torch.utils.checkpoint"
    few = f"{work}, batch of 64"
    ours, theirs = step("checkpointed", batch=64), step(torchs_way, batch=64)
    yield compare(few, ours, {torchs_way: theirs}, target=1.05, rounds=15)
    yield compare_memory(
        f"peak memory of {work}, batch of {BATCH}",
        "benchmarks.checkpointing:build_step",
        {"way": "checkpointed"},
        {torchs_way: {"way": torchs_way}},
        target=1.05,
    )
    yield compare_memory(
        "the same",
        "benchmarks.checkpointing:build_step",
        {"way": "checkpointed"},
        {"no checkpoint": {"way": "no checkpoint"}},
    )
    yield compare_memory(
        "peak memory of the same inside torch.func.grad, by the input",
        "benchmarks.checkpointing:build_func_step",
        {"way": "checkpointed"},
        {"no checkpoint": {"way": "no checkpoint"}},
    )


def rows_of_a_jacobian() -> Iterator[Row]:
    torch.manual_seed(0)
    net = nn.Sequential(*layers(8, WIDTH))
    x = torch.randn(WIDTH)
    readout = torch.randn(10, WIDTH)

    def jacobian_of(run: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: jacobian(lambda x: readout @ run(net, x), x, mode="reverse")

    yield compare(
        "jacobian of 10 rows through a checkpointed function",
        jacobian_of(checkpointed),
        {"no checkpoint": jacobian_of(plainly)},
        target=1.6,
        rounds=11,
    )
    yield compare(
        "the same inside torch.func: jacrev",
        lambda: torch.func.jacrev(lambda x: readout @ checkpointed(net, x))(x),
        {"no checkpoint": lambda: torch.func.jacrev(lambda x: readout @ net(x))(x)},
        rounds=11,
    )


def hooks() -> Iterator[Row]:
    x = torch.randn(8, requires_grad=True)

    def register(x: Tensor) -> Tensor:
        y = x.view_as(x)
        y.register_hook(torch.neg)
        return y

    yield compare(
        "hook, per call", lambda: hook(torch.neg, x), {"register_hook": lambda: register(x)}, target=3.0
    )


def rows(full: bool = False) -> Iterator[Row]:
    yield from training()
    yield from rows_of_a_jacobian()
    yield from hooks()
