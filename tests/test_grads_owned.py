"""Results belong to the caller: what somebody else holds is handed out as a copy, anything else as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchzygote import Params, _cotangents, gradient, hook, jacobian, pullback, withgradient


class Times(torch.autograd.Function):
    """``(x * c).sum()`` whose backward hands out what it holds, as ``form`` of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, form: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.c, ctx.form = c, form
        return (x * c).sum()

    @staticmethod
    def backward(ctx: Any, ybar: Tensor) -> Any:
        return ctx.form(ctx.c), None, None


class Saved(torch.autograd.Function):
    """The same with what it saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(c)
        return (x * c).sum()

    @staticmethod
    def backward(ctx: Any, ybar: Tensor) -> Any:
        return *ctx.saved_tensors, None


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda c: c,
    "view": lambda c: c.view(2),
    "detached": lambda c: c.detach(),
    "data": lambda c: c.data,
    "reversed twice": lambda c: c.view(2, 1).T.reshape(2),
    "no copy": lambda c: torch.from_numpy(c.numpy()),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_a_backward_holds_is_not_handed_out(form: str) -> None:
    w, c = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    g = gradient(lambda: Times.apply(w, c, FORMS[form]), Params([w]))
    g *= 100
    (explicit,) = gradient(lambda w: Times.apply(w, c, FORMS[form]), w)
    explicit.zero_()
    J = jacobian(lambda: Times.apply(w, c, FORMS[form]), Params([w]))
    J *= 100
    assert c.tolist() == [5, 6]
    assert g[w].tolist() == [500, 600]


def test_what_a_backward_saved_is_not_handed_out() -> None:
    w, c = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    _, back = pullback(lambda: Saved.apply(w, c * 1), Params([w]))
    g = back(1.0)
    g *= 100
    assert back(1.0)[w].tolist() == [5, 6]


@pytest.mark.parametrize("form", FORMS)
def test_what_a_hook_returns_is_not_handed_out(form: str) -> None:
    w, c = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    g = gradient(lambda: hook(lambda _: FORMS[form](c), w).sum(), Params([w]))
    g.clip_norm_(1e-3)
    (explicit,) = gradient(lambda w: hook(lambda _: FORMS[form](c), w).sum(), w)
    explicit.zero_()
    assert c.tolist() == [5, 6]


@pytest.mark.parametrize("form", [*FORMS, "as an array"])
def test_what_a_hook_keeps_is_not_handed_out(form: str) -> None:
    w, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(1.0)
    factors = torch.tensor([5.0, 6.0, 7.0])
    kept: list[Any] = []

    def keep(xbar: Tensor) -> None:
        kept.append(np.asarray(xbar) if form == "as an array" else FORMS[form](xbar[:2])[:2])

    for watched in (lambda: hook(keep, w), lambda: hook(keep, w * 1)):
        for ps in (Params([w]), Params([w, b])):
            g = gradient(lambda watched=watched: (watched() * factors).sum() + 0 * b, ps)
            g *= 100
            assert kept.pop().tolist()[:2] == [5, 6]


def test_sparse_gradients_that_a_hook_keeps() -> None:
    layer = nn.Embedding(4, 2, sparse=True)
    kept: list[Tensor] = []
    handle = layer.weight.register_hook(kept.append)
    g = gradient(lambda: layer(torch.tensor([1, 3])).sum(), Params(layer))
    handle.remove()
    before = kept[0].to_dense()
    g *= 2
    g.clip_norm_(0.1)
    assert torch.equal(kept[0].to_dense(), before)


def test_gradients_that_tensor_hooks_keep() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    kept: list[Tensor] = []
    handle = w.register_hook(lambda xbar: kept.append(xbar.detach()))
    g = gradient(lambda: (w**2).sum(), Params([w]))
    handle.remove()
    g *= 100
    assert kept[0].tolist() == [2, 4]


def test_parts_of_one_gradient_are_apart_from_it() -> None:
    a, b, c = torch.ones(4), torch.ones(2), torch.ones(2)
    found = gradient(lambda a, b, c: ((a + torch.cat([b, c])) ** 2).sum(), a, b, c)
    ybar = torch.arange(4.0)
    back = pullback(lambda a, b, c: a + torch.cat([b, c]), a, b, c)[1]
    for results in (found, back(ybar)):
        kept = [x.clone() for x in results]
        for i, x in enumerate(results):
            x.fill_(i)
        assert [x.tolist() for x in results] == [[0] * 4, [1] * 2, [2] * 2]
        assert torch.equal(kept[0], torch.cat(kept[1:]))
    assert ybar.tolist() == [0, 1, 2, 3]


def test_the_value_is_apart_from_the_gradient() -> None:
    w = torch.tensor([1.0, 2.0])

    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.y = x**2
            return ctx.y.sum()

        @staticmethod
        def backward(ctx: Any, ybar: Tensor) -> Any:
            return ctx.y

    y, (g,) = withgradient(Squares.apply, w)
    g.zero_()
    assert y == 5


# ---- and nothing is copied without need --------------------------------------------------------------------


def squares(*xs: Tensor) -> Tensor:
    total = torch.zeros(())
    for x in xs:
        total = total + (x**2).sum()
    return total


LAYERS = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
LSTM = nn.LSTM(3, 4)
IMAGES = torch.rand(4, 2, 4, 4)

USUAL: dict[str, Callable[[], Any]] = {
    "one": lambda: gradient(squares, torch.rand(3)),
    "three": lambda: gradient(squares, torch.rand(3), torch.rand(()), torch.rand(2, 3)),
    "used twice": lambda: gradient(lambda x: squares(x, x * 3), torch.rand(3)),
    "a view": lambda: gradient(lambda x: squares(x.view(3, 2).T), torch.rand(6)),
    "products": lambda: gradient(lambda a, b: ((a @ b) ** 2).sum(), torch.rand(3, 4), torch.rand(4, 2)),
    "layers": lambda: gradient(lambda: LAYERS(IMAGES).sum(), Params(LAYERS)),
    "module": lambda: gradient(lambda m: m(IMAGES).sum(), LAYERS),
    "recurrent": lambda: gradient(lambda: LSTM(torch.rand(5, 3))[0].sum(), Params(LSTM)),
    "create_graph": lambda: gradient(squares, torch.rand(3), torch.rand(2), create_graph=True),
    "hooked": lambda: gradient(lambda x: squares(hook(lambda xbar: 2 * xbar, x)), torch.rand(3)),
    "pullback": lambda: pullback(lambda a, b: a.sin() * b, torch.rand(3), torch.rand(3))[1](torch.ones(3)),
    "jacobian": lambda: jacobian(lambda a, b: (a * b).sin(), torch.rand(3), torch.rand(3)),
    "jacobian, rows": lambda: jacobian(lambda a: a.cumsum(0).sin(), torch.rand(30), mode="reverse"),
    "jacobian, columns": lambda: jacobian(lambda a: a.sin() * a.sum(), torch.rand(3), mode="forward"),
    "jacobian, layers": lambda: jacobian(lambda: LAYERS(torch.rand(4, 2, 4, 4)), Params(LAYERS)),
    "jacobian, chunks": lambda: jacobian(
        lambda: LAYERS(torch.rand(4, 2, 4, 4)), Params(LAYERS), chunk_size=3
    ),
    "jacobian, structure": lambda: jacobian(lambda x: x[1:] * x[:-1], torch.rand(60)),
}


@pytest.mark.parametrize("usual", USUAL)
def test_what_nobody_else_holds_is_handed_out_as_it_is(usual: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    monkeypatch.setattr(_cotangents, "_copy", lambda x: copies.append(x) or x.clone())
    USUAL[usual]()
    assert copies == []
