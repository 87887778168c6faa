"""Every public function at three sizes, against the nearest thing in PyTorch; the last row has the growth.

One problem runs through it: a chain of nonlinear terms (structured) or a dense layer (not structured).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import torchzygote as tz
from torchzygote import plan_hessian, plan_jacobian

from ._harness import Contender, Row, compare, exponent

Case = tuple[Contender, dict[str, Contender | None]]  # ours, peers


def energy(x: Tensor) -> Tensor:
    """A scalar: terms that couple neighbors."""
    return ((x[1:] - x[:-1].sin()) ** 2).sum() + (x**4).sum()


def force(x: Tensor) -> Tensor:
    """As many outputs as inputs, each of three neighbors."""
    return x.roll(1) * x.sin() - x.roll(-1) ** 2


def dense(n: int) -> Callable[[Tensor], Tensor]:
    """As many outputs as inputs, each of all of them."""
    torch.manual_seed(0)
    W = torch.randn(n, n) / n**0.5
    return lambda x: (W @ x).tanh()


def leaf(x: Tensor) -> Tensor:
    """A twin that autograd records."""
    return x.detach().requires_grad_()


def grad_by_hand(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        t = leaf(x)
        return torch.autograd.grad(f(t), t)[0]

    return run


def gradients(n: int) -> Iterator[tuple[str, Case]]:
    x = torch.randn(n)
    func = torch.func.grad(energy)
    hand = {"autograd.grad by hand": grad_by_hand(energy, x), "torch.func.grad": lambda: func(x)}
    yield "gradient", (lambda: tz.gradient(energy, x), hand)
    both = torch.func.grad_and_value(energy)
    yield "withgradient", (lambda: tz.withgradient(energy, x), {"grad_and_value": lambda: both(x)})
    v = torch.randn(n)
    yield (
        "pullback and one back",
        (
            lambda: tz.pullback(force, x)[1](v),
            {"torch.func.vjp": lambda: torch.func.vjp(force, x)[1](v)},
        ),
    )
    yield (
        "pushforward and one push",
        (
            lambda: tz.pushforward(force, x)(v),
            {"torch.func.jvp": lambda: torch.func.jvp(force, (x,), (v,))},
        ),
    )


def jacobians(n: int) -> Iterator[tuple[str, Case]]:
    x, f = torch.randn(n), dense(n)
    reverse, forward = torch.func.jacrev(f), torch.func.jacfwd(f)
    peers: dict[str, Contender | None] = {"jacrev": lambda: reverse(x), "jacfwd": lambda: forward(x)}
    yield "jacobian, dense layer", (lambda: tz.jacobian(f, x), peers)
    jacfwd: dict[str, Contender | None] = {"jacfwd": lambda: forward(x)}
    yield "jacobian, mode='forward'", (lambda: tz.jacobian(f, x, mode="forward"), jacfwd)
    banded = torch.func.jacrev(force)
    peer: dict[str, Contender | None] = {"jacrev": lambda: banded(x)}
    yield "jacobian, three neighbours", (lambda: tz.jacobian(force, x), peer)
    yield "jacobian, three neighbours, sparse=True", (lambda: tz.jacobian(force, x, sparse=True), peer)
    plan = plan_jacobian(force, x)
    yield "a Jacobian plan, called", (lambda: plan(x), peer)
    yield "plan_jacobian", (lambda: plan_jacobian(force, x), peer)


def hessians(n: int) -> Iterator[tuple[str, Case]]:
    x = torch.randn(n)
    mixed, reverse = torch.func.hessian(energy), torch.func.jacrev(torch.func.jacrev(energy))
    peers: dict[str, Contender | None] = {
        "torch.func.hessian": lambda: mixed(x),
        "jacrev(jacrev)": lambda: reverse(x),
    }
    yield "hessian", (lambda: tz.hessian(energy, x), peers)
    same_way: dict[str, Contender | None] = {"torch.func.hessian": lambda: mixed(x)}
    yield "hessian_dual", (lambda: tz.hessian_dual(energy, x), same_way)
    same_way = {"jacrev(jacrev)": lambda: reverse(x)}
    yield "hessian_reverse", (lambda: tz.hessian_reverse(energy, x), same_way)
    three: dict[str, Contender | None] = {
        "value, grad and hessian apart": lambda: (energy(x), grad_by_hand(energy, x)(), reverse(x))
    }
    yield "withhessian", (lambda: tz.withhessian(energy, x), three)
    diagonal: dict[str, Contender | None] = {"diagonal of jacrev(jacrev)": lambda: reverse(x).diagonal()}
    yield "diaghessian", (lambda: tz.diaghessian(energy, x), diagonal)
    yield "hessian, sparse=True", (lambda: tz.hessian(energy, x, sparse=True), peers)
    plan = plan_hessian(energy, x)
    yield "a Hessian plan, called", (lambda: plan(x), peers)


def in_place(tensors: list[Tensor], values: list[Tensor]) -> Iterator[tuple[str, Case]]:
    """Sums, of zeros: what is added up many times must stay finite."""
    ps = tz.Params(tensors)
    total, zeros = tz.Grads(ps, [v.clone() for v in values]), tz.Grads(ps, [v * 0 for v in values])
    mine, nothing = [v.clone() for v in values], list(zeros.values())
    add: dict[str, Contender | None] = {"_foreach_add_": lambda: torch._foreach_add_(mine, nothing)}
    yield "Grads, g += h", (lambda: total.__iadd__(zeros), add)
    own, other = [t.clone() for t in tensors], [t.clone() for t in tensors]
    for p, q, v in zip(own, other, values, strict=True):
        p.grad, q.grad = v.clone(), v.clone()
    theirs: dict[str, Contender | None] = {
        "_foreach_add_": lambda: torch._foreach_add_([q.grad for q in other], nothing)  # type: ignore[arg-type] # none is None
    }
    yield "Grads.accumulate_", (tz.Grads(tz.Params(own), nothing).accumulate_, theirs)


def mappings(n: int) -> Iterator[tuple[str, Case]]:
    tensors = [torch.randn(n, 16) for _ in range(50)]
    grads = tz.gradient(lambda: sum((t.square().sum() for t in tensors), torch.zeros(())), tz.Params(tensors))
    values = list(grads.values())
    yield "Grads, g * 2", (lambda: grads * 2, {"_foreach_mul": lambda: torch._foreach_mul(values, 2)})
    yield from in_place(tensors, values)
    looped: dict[str, Contender | None] = {"a loop": lambda: [v.square() for v in values]}
    yield "Grads.map", (lambda: grads.map(torch.square), looped)
    held = [t.clone() for t in tensors]
    for t, v in zip(held, values, strict=True):
        t.grad = v.clone()
    norm: dict[str, Contender | None] = {
        "nn.utils.get_total_norm": lambda: torch.nn.utils.get_total_norm(values)
    }
    yield "Grads.norm", (grads.norm, norm)
    clip: dict[str, Contender | None] = {
        "nn.utils.clip_grad_value_": lambda: torch.nn.utils.clip_grad_value_(held, 10.0)
    }
    yield "Grads.clip_value_", (lambda: grads.clip_value_(10.0), clip)
    flat: dict[str, Contender | None] = {
        "nn.utils.parameters_to_vector": lambda: torch.nn.utils.parameters_to_vector(values)
    }
    yield "Grads.to_vector", (grads.to_vector, flat)


def utilities(n: int) -> Iterator[tuple[str, Case]]:
    x = torch.randn(n)
    identity = lambda g: None

    def registered() -> Tensor:
        t = leaf(x)
        y = t * 1
        y.register_hook(identity)
        return torch.autograd.grad(y.square().sum(), t)[0]

    hooked = lambda: tz.gradient(lambda x: tz.hook(identity, x * 1).square().sum(), x)
    yield "gradient through hook", (hooked, {"register_hook": registered})

    f = lambda x: x.sin().exp().tanh()

    def theirs() -> Tensor:
        t = leaf(x)
        return torch.autograd.grad(checkpoint(f, t, use_reentrant=False).sum(), t)[0]

    ours = lambda: tz.gradient(lambda x: tz.checkpointed(f, x).sum(), x)
    yield "gradient through checkpointed", (ours, {"torch.utils.checkpoint": theirs})

    rows = max(n // 16, 1)
    values = torch.randn(rows, 16)

    def buffered(values: Tensor) -> Tensor:
        buf = tz.Buffer(values, rows, 16)
        for i in range(rows):
            buf[i] = values[i] * 2
        return copy.copy(buf).square().sum()

    def in_place() -> Tensor:
        t = leaf(values)
        out = torch.zeros(rows, 16)
        for i in range(rows):
            out[i] = t[i] * 2
        return torch.autograd.grad(out.square().sum(), t)[0]

    yield "gradient through Buffer", (lambda: tz.gradient(buffered, values), {"in-place writes": in_place})
    p = torch.randn(4)
    wide = lambda p: (p.sum() * x.sin() + p[0] * x).square().sum()
    plain: dict[str, Contender | None] = {"reverse mode by hand": grad_by_hand(wide, p)}
    yield "gradient through forwarddiff", (lambda: tz.gradient(lambda p: tz.forwarddiff(wide, p), p), plain)


# Sizes small enough that the whole part takes a minute or two on two cores.
GROUPS: list[tuple[Callable[[int], Iterator[tuple[str, Case]]], tuple[int, ...]]] = [
    (gradients, (100, 10_000, 1_000_000)),
    (jacobians, (10, 100, 1000)),
    (hessians, (10, 100, 1000)),
    (mappings, (10, 100, 1000)),
    (utilities, (100, 1000, 10_000)),
]


def rows(full: bool = False) -> Iterator[Row]:
    """Three sizes of each; ``full`` measures longer."""
    for group, sizes in GROUPS:
        named: dict[str, dict[int, Any]] = {}
        for n in sizes:
            for name, case in group(n):
                named.setdefault(name, {})[n] = case
        for name, cases in named.items():
            times: dict[int, float] = {}
            for n, (ours, peers) in cases.items():
                row = compare(f"{name}, n = {n}", ours, peers, seconds=1.0 if full else 0.2, rounds=5)
                times[n] = row["ours_ms"] or 0.0
                if len(times) == len(cases):
                    row["note"] = f"time grows with exponent {exponent(times):.2f}"
                yield row
