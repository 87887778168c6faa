"""Pushes of one pushforward: each runs ``f`` anew, or two pullbacks have recorded it once.

Compared with ``torch.func.jvp`` in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from needs_torch import grid_sample_derived_twice
from torch import Tensor, func, nn
from torch.autograd.function import once_differentiable

from torchzygote import pullback, pushforward
from torchzygote._torch_private import in_forward_ad, in_functorch, jvp_flat

D = torch.float64
X = torch.tensor([0.3, -1.2, 2.0], dtype=D)
V = torch.tensor([1.0, 0.5, -2.0], dtype=D)
Z, W = torch.complex(X, V), torch.complex(V, X.exp())


def coupled(x: Tensor) -> Tensor:
    return x.sin() * x.roll(1)


# ---------------------------------------------------------------------------------------------------------
# the level of forward mode

Several = Callable[..., tuple[Tensor, ...]]

FLAT: dict[str, Several] = {
    "one": lambda x: (coupled(x),),
    "several": lambda x: (x.exp(), x.sum(), x[:2] ** 3),
    "a constant": lambda x: (x.new_ones(2), x.detach() * 2, x.sin()),
    "its input": lambda x: (x, x.view(3, 1)),
    "integers": lambda x: (x.argsort(), x > 0, x.cos()),
    "writes in place": lambda x: (x.clone().mul_(x),),
    "a derivative inside": lambda x: (func.grad(lambda x: coupled(x).sum())(x),),
    "forward mode inside": lambda x: (func.jvp(coupled, (x,), (V,))[1],),
    "vmap inside": lambda x: (func.vmap(torch.sin)(x),),
}

AROUND: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "jvp": lambda g: lambda x: func.jvp(g, (x,), (V.flip(0),)),
    "jacrev": func.jacrev,
    "vmap": lambda g: lambda x: func.vmap(g)(torch.stack([x, x.exp()])),
}


@pytest.mark.parametrize("case", FLAT)
def test_the_level_gives_what_the_public_function_gives(case: str) -> None:
    f = FLAT[case]
    found, expected = jvp_flat(f, (X,), (V,)), func.jvp(f, (X,), (V,))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)
    assert not any(x.requires_grad for part in found for x in part)


def test_the_level_is_right_for_complex_numbers_and_several_inputs() -> None:
    f = lambda z, x: (z.conj() * x + z**2, z.abs())
    found, expected = jvp_flat(f, (Z, X), (W, V)), func.jvp(f, (Z, X), (W, V))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("around", AROUND)
def test_the_level_composes(around: str) -> None:
    ours = AROUND[around](lambda x: jvp_flat(FLAT["one"], (x,), (V.to(x),))[1][0])
    plain = AROUND[around](lambda x: func.jvp(coupled, (x,), (V.to(x),))[1])
    torch.testing.assert_close(ours(X), plain(X))


def test_wrong_numbers_of_tangents_are_no_silence() -> None:
    with pytest.raises(ValueError, match="zip"):
        jvp_flat(lambda x, y: (x * y,), (X, X), (V,))
    assert not in_functorch()


def test_an_error_leaves_nothing_open_and_nothing_locked() -> None:
    def fails(x: Tensor) -> Tensor:
        raise KeyError("on its way")

    push = pushforward(fails, X)
    for _ in range(2):
        with pytest.raises(KeyError, match="on its way"):
            push(V)
        assert not in_functorch()
        assert not in_forward_ad()
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(pushforward(coupled, X)(V)), daemon=True)
    thread.start()
    thread.join(60)
    torch.testing.assert_close(found, [func.jvp(coupled, (X,), (V,))[1]])


# ---------------------------------------------------------------------------------------------------------
# each push runs f anew


def test_a_push_has_what_f_finds_as_it_is_then() -> None:
    w, state = torch.ones(3, dtype=D), {"power": 2.0}
    layer = nn.Linear(3, 2).to(D).requires_grad_(False)
    f = lambda x: layer(w * x ** state["power"]).tanh()
    push = pushforward(f, X)
    for change in range(5):
        torch.testing.assert_close(push(V), func.jvp(f, (X,), (V,))[1])
        if change == 0:
            w.mul_(3)
        elif change == 1:
            w.numpy()[0] = 7.0  # no version tells of that
        elif change == 2:
            state["power"] = 3.0
        elif change == 3:
            layer.weight = nn.Parameter(layer.weight.cos(), requires_grad=False)


def test_a_push_runs_f_once() -> None:
    calls = []
    push = pushforward(lambda x: (calls.append(1), coupled(x))[1], X)
    for _ in range(3):
        push(V)
    assert len(calls) == 3


# ---------------------------------------------------------------------------------------------------------
# recorded once, by two pullbacks


def recorded(f: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    y, back = pullback(f, *args, create_graph=True)
    push: Callable[..., Any] = pullback(back, y)[1]
    return lambda *xdots: push(xdots)[0]


RECORDED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Tensor, ...]]] = {
    "coupled": (coupled, (X,), (V,)),
    "two arguments": (lambda a, b: a * b.exp(), (X, V), (V, X)),
    "linear": (lambda x: 3 * x, (X,), (V,)),
    "a structure": (lambda x: {"a": x.sin(), "b": (x.sum(),)}, (X,), (V,)),
    "complex, not holomorphic": (lambda z: z**2 + z.conj() * z.abs(), (Z,), (W,)),
    "real to complex": (lambda x: x**2 * Z, (X,), (V,)),
    "complex to real": (lambda z: z.abs() + z.imag, (Z,), (W,)),
    "its input": (lambda x: (x, x[:1]), (X,), (V,)),
    "expanded": (lambda x: x**2, (X[:1].expand(3),), (V,)),
    "solves": (lambda x: torch.linalg.solve(torch.outer(x, x) + 9 * torch.eye(3, dtype=D), x), (X,), (V,)),
}


@pytest.mark.parametrize("case", RECORDED)
def test_two_pullbacks_push_forward(case: str) -> None:
    f, args, xdots = RECORDED[case]
    push = recorded(f, *args)
    for scale in (1.0, -2.0):
        given = tuple(scale * xdot for xdot in xdots)
        primals = tuple(x.clone(memory_format=torch.contiguous_format) for x in args)
        expected = func.jvp(f, primals, given)[1]
        torch.testing.assert_close(push(*given), expected)
        torch.testing.assert_close(pushforward(f, *args)(*given), expected)


def test_two_pullbacks_push_through_a_module() -> None:
    layer = nn.Linear(3, 2).to(D)
    xdots = {"weight": torch.ones(2, 3, dtype=D), "bias": None}
    found = recorded(lambda m, x: m(x).tanh(), layer, X)(xdots, V)
    torch.testing.assert_close(found, pushforward(lambda m, x: m(x).tanh(), layer, X)(xdots, V))


@grid_sample_derived_twice
def test_two_pullbacks_run_f_once_and_need_no_forward_derivative() -> None:
    calls = []
    grid = torch.tensor([[[[0.1, -0.3], [0.4, 0.2]]]], dtype=D)
    image = torch.arange(9.0, dtype=D).view(1, 1, 3, 3)

    def f(g: Tensor) -> Tensor:
        calls.append(1)
        return F.grid_sample(image, g, align_corners=True)

    push = recorded(f, grid)
    xdot = grid.cos()
    expected = func.jacrev(lambda g: F.grid_sample(image, g, align_corners=True))(grid).flatten(
        4
    ) @ xdot.view(-1)
    for _ in range(2):
        torch.testing.assert_close(push(xdot), expected)
    assert len(calls) == 1


def test_a_record_notices_what_is_written_to_in_place() -> None:
    w = torch.ones(3, dtype=D)
    push = recorded(lambda x: (w * x).sin() * w, X)
    push(V)
    w.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        push(V)


class Once(torch.autograd.Function):
    """A square whose backward can't be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 2 * x * g


def test_what_has_one_derivative_only_is_refused_a_record() -> None:
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        recorded(Once.apply, X)(V)
