"""eager_update: each parameter once, when its gradient is complete, and no gradients beside each other."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchzygote import (
    Params,
    checkpointed,
    diaghessian,
    eager_update,
    gradient,
    jacobian,
    pullback,
    withgradient,
)


def sgd(p: Tensor, g: Tensor) -> None:
    p -= 0.1 * g


class Watched:
    """Plain gradient descent that counts the gradients alive at a time."""

    def __init__(self) -> None:
        self.alive: set[int] = set()
        self.most = 0
        self.updated: list[Tensor] = []

    def __call__(self, p: Tensor, g: Tensor) -> None:
        assert not torch.is_grad_enabled()
        number = len(self.updated)
        self.updated.append(p)
        self.alive.add(number)
        weakref.finalize(g, self.alive.discard, number)
        self.most = max(self.most, len(self.alive))
        sgd(p, g)


def deep(count: int = 5) -> nn.Sequential:
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(count)]).double()


def by_backward(loss: Any, params: Params) -> None:
    loss().backward()


def by_gradient(loss: Any, params: Params) -> None:
    grads = gradient(loss, params)
    assert all(g is None for g in grads.values())


def by_withgradient(loss: Any, params: Params) -> None:
    grads = withgradient(loss, params).grad
    assert all(g is None for g in grads.values())


def by_pullback(loss: Any, params: Params) -> None:
    grads = pullback(loss, params)[1](1.0)
    assert all(g is None for g in grads.values())


ROUTES = [by_backward, by_gradient, by_withgradient, by_pullback]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("given", [lambda m: m, Params, lambda m: list(m.parameters())])
def test_a_step_is_the_same_as_after_the_backward_pass(route: Any, given: Any) -> None:
    model, x = deep(), torch.randn(4, 8, dtype=torch.float64)
    loss = lambda: (model(x) ** 2).sum()
    expected = [p.detach() - 0.1 * g for p, g in gradient(loss, Params(model)).items()]
    watched = Watched()
    with eager_update(watched, given(model)):
        route(loss, Params(model))
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)
    assert all(p.grad is None for p in model.parameters())
    assert len(watched.updated) == 10


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_are_never_all_in_memory(route: Any) -> None:
    gc.disable()  # freed at once, not some time
    try:
        model, x = deep(10), torch.randn(4, 8, dtype=torch.float64)
        watched = Watched()
        with eager_update(watched, model):
            route(lambda: (model(x) ** 2).sum(), Params(model))
        assert len(watched.updated) == 20
        assert watched.most <= 2  # weight and bias of a layer come together
    finally:
        gc.enable()


@pytest.mark.parametrize("route", ROUTES)
def test_a_parameter_used_in_two_places_is_updated_once_with_all_of_its_gradient(route: Any) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    v = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    seen: list[tuple[Tensor, Tensor]] = []
    with eager_update(lambda p, g: seen.append((p, g.clone())), [w, v]):
        route(lambda: ((w * v).sin() * w).sum() + (w**2).sum(), Params([w, v]))
    assert sorted(id(p) for p, _ in seen) == sorted([id(w), id(v)])
    expected = gradient(lambda w, v: ((w * v).sin() * w).sum() + (w**2).sum(), w.detach(), v.detach())
    for p, g in seen:
        torch.testing.assert_close(g, expected[0] if p is w else expected[1])


def test_params_need_not_require_grad_and_are_left_so() -> None:
    w = torch.ones(3)
    with eager_update(sgd, Params([w])):
        assert gradient(lambda: (w**2).sum(), Params([w]))[w] is None
    torch.testing.assert_close(w, torch.full((3,), 0.8))
    assert not w.requires_grad
    assert w.grad is None


@pytest.mark.parametrize("given", [lambda w: [w], lambda w: Params([w])])
def test_a_tensor_that_requires_grad_only_later_is_updated_by_backward(given: Any) -> None:
    w = torch.ones(3)
    with eager_update(sgd, given(w)) as handle:
        assert not w.requires_grad
        w.requires_grad_()
        (w**2).sum().backward()
        assert w.grad is None
        torch.testing.assert_close(w.detach(), torch.full((3,), 0.8))
        handle.remove()
        w.sum().backward()
        torch.testing.assert_close(w.grad, torch.ones(3))


def test_frozen_parameters_of_a_module_are_left_out() -> None:
    model = nn.Linear(2, 1)
    model.weight.requires_grad_(False)
    with eager_update(sgd, model) as handle:
        assert repr(handle) == "<eager update of 1 parameters>"
        assert not model.weight.requires_grad
        model.weight.requires_grad_()
        model(torch.ones(2)).sum().backward()
        assert model.weight.grad is not None
        assert model.bias.grad is None


def test_inside_a_transform_and_for_inference_tensors_nothing_is_switched_on() -> None:
    w = torch.ones(3)
    torch.func.grad(lambda x: (eager_update(sgd, [w]).remove(), x.sum())[1])(torch.ones(2))
    assert not w.requires_grad
    with torch.inference_mode():
        w = torch.ones(3)
    with eager_update(sgd, [w]), pytest.raises(RuntimeError, match="inference_mode"):
        gradient(lambda: w.sum(), Params([w]))


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: {"a": a, "b": b},
        lambda a, b: [{"a": a}, {"c": {"b": b}}],
        lambda a, b: {a: "a", b: "b"},
        lambda a, b: {"both": (a, [b])},
        lambda a, b: [iter([a]), {b: 1}],
        lambda a, b: (p for p in (a, Params([b]))),
    ],
)
def test_what_params_take_is_taken(pack: Any) -> None:
    a, b = torch.ones(2), torch.ones(1)
    params = Params(pack(a, b))
    assert [p is q for p, q in zip(params, (a, b), strict=True)] == [True, True]
    with eager_update(sgd, pack(a, b)):
        gradient(lambda: a.sum() + b.sum(), params)
    torch.testing.assert_close([a, b], [torch.full((2,), 0.9), torch.full((1,), 0.9)])


def test_parameters_without_an_update_get_their_gradient() -> None:
    model = deep(2)
    first, rest = Params(model[0]), Params(model[1])
    x = torch.randn(8, dtype=torch.float64)
    loss = lambda: model(x).sum()
    expected = gradient(loss, Params(model))
    with eager_update(lambda p, g: None, first):
        grads = gradient(loss, Params(model))
        assert all(grads[p] is None for p in first)
        for p in rest:
            torch.testing.assert_close(grads[p], expected[p])


def test_what_the_loss_does_not_use_is_not_updated() -> None:
    w, unused = torch.ones(2), torch.ones(2)
    seen: list[Tensor] = []
    with eager_update(lambda p, g: seen.append(p), Params([w, unused])):
        gradient(lambda: w.sum(), Params([w, unused]))
    assert [p is w for p in seen] == [True]


@pytest.mark.parametrize("route", ROUTES)
def test_sparse_gradients(route: Any) -> None:
    embedding = nn.Embedding(4, 2, sparse=True)
    before = embedding.weight.detach().clone()
    with eager_update(sgd, embedding):
        route(lambda: embedding(torch.tensor([1, 1, 3])).sum(), Params(embedding))
    expected = torch.tensor([[0.0], [0.2], [0.0], [0.1]]).expand(4, 2)
    torch.testing.assert_close(before - embedding.weight.detach(), expected)


def test_remove_ends_it_and_may_be_called_again() -> None:
    model = nn.Linear(2, 1)
    handle = eager_update(sgd, model)
    handle.remove()
    handle.remove()
    model(torch.ones(2)).sum().backward()
    assert model.weight.grad is not None
    assert gradient(lambda: model(torch.ones(2)).sum(), Params(model))[model.weight] is not None
    eager_update(sgd, model).remove()


def test_with_checkpoints_and_accumulated_gradients() -> None:
    model, x = deep(3), torch.randn(4, 8, dtype=torch.float64)

    def loss() -> Tensor:
        y = x
        for layer in model:
            y = checkpointed(layer, y)
        return (y**2).sum()

    grads = gradient(loss, Params(model))
    expected = [p.detach() - 0.1 * (g + 1) for p, g in grads.items()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with eager_update(sgd, model):
        loss().backward()
    torch.testing.assert_close([p.detach() for p in model.parameters()], expected)


def test_jacobians_and_second_derivatives_update_nothing() -> None:
    w = torch.ones(3, dtype=torch.float64)
    with eager_update(sgd, Params([w])):
        torch.testing.assert_close(jacobian(lambda: w**2, Params([w]))[w], 2 * torch.eye(3).double())
        torch.testing.assert_close(diaghessian(lambda: (w**3).sum(), Params([w]))[w], 6 * w)
    assert torch.equal(w, torch.ones(3, dtype=torch.float64))


def test_a_dropped_parameter_is_forgotten() -> None:
    from torchzygote import _updates

    before = len(_updates.registry)
    w = torch.ones(3)
    handle = eager_update(sgd, Params([w]))
    assert len(_updates.registry) == before + 1
    del handle, w
    gc.collect()
    assert len(_updates.registry) == before


# ---- refusals ----------------------------------------------------------------------


def test_shared_parameters_are_refused() -> None:
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are the same tensor"):
        eager_update(sgd, tied)
    twice = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="parameter 0 and parameter 1 are the same tensor"):
        eager_update(sgd, [twice.weight, twice.weight])
    with pytest.raises(ValueError, match=r"a\.weight and b\.0 are the same tensor"):
        eager_update(sgd, {"a": twice, "b": [twice.weight]})
    memory = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    memory[1].weight = nn.Parameter(memory[0].weight.data)
    with pytest.raises(ValueError, match=r"weight and \d\.weight share memory"):
        eager_update(sgd, memory)
    flat = torch.zeros(8)
    eager_update(
        sgd, [flat[:4].requires_grad_(), flat[4:].requires_grad_()]
    ).remove()  # neighbors share nothing


def test_a_second_eager_update_is_refused() -> None:
    model = nn.Linear(2, 1)
    with eager_update(sgd, model), pytest.raises(ValueError, match=r"weight has an eager update already"):
        eager_update(sgd, model)
    eager_update(sgd, model).remove()


@pytest.mark.parametrize(
    ("update", "source", "error", "message"),
    [
        (nn.Linear(1, 1), sgd, TypeError, "got Linear; the function comes first"),
        (sgd, sgd, TypeError, "expected a module, Params or an iterable"),
        (3, [torch.ones(1)], TypeError, r"update: expected a function update\(param, grad\), got int"),
        (sgd, torch.ones(1), TypeError, r"bare tensor; write \[tensor\]"),
        (sgd, [torch.arange(3)], TypeError, "Params"),
        (sgd, ["text"], TypeError, "Params"),
        (sgd, [torch.ones(2, requires_grad=True) * 2], ValueError, "expected a leaf tensor"),
        (sgd, nn.LazyLinear(3), ValueError, "got weight, which has none before its lazy module"),
    ],
)
def test_bad_arguments(update: Any, source: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eager_update(update, source)


def test_a_gradient_that_must_be_differentiable_is_refused_and_changes_nothing() -> None:
    w = torch.ones(3)
    ps = Params([w])
    loss = lambda: (w**2).sum()
    with eager_update(sgd, ps):
        with pytest.raises(RuntimeError, match=r"eager_update: .*remove\(\)"):
            gradient(loss, ps, create_graph=True)
        with pytest.raises(RuntimeError, match="eager_update"):
            gradient(lambda x: gradient(loss, ps)[w].sum() * x, 1.0)
    assert torch.equal(w, torch.ones(3))
    assert not w.requires_grad


def test_under_vmap_alone_it_is_refused_for_what_it_is() -> None:
    w = torch.ones(3)
    ps = Params([w])
    with (
        eager_update(sgd, ps),
        pytest.raises(RuntimeError, match=r"eager_update: .*inside torch\.func\.vmap.*remove\(\)"),
    ):
        torch.func.vmap(lambda x: gradient(lambda: (w * x).sum(), ps)[w])(torch.ones(2, 3))
    assert torch.equal(w, torch.ones(3))


def test_an_error_in_the_update_reaches_the_caller_and_leaves_no_hooks() -> None:
    w = torch.ones(3)
    with eager_update(lambda p, g: 1 // 0, Params([w])), pytest.raises(ZeroDivisionError):
        gradient(lambda: w.sum(), Params([w]))
    assert torch.equal(gradient(lambda: w.sum(), Params([w]))[w], torch.ones(3))


class Gate(torch.autograd.Function):
    """Gives no gradient by its second argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return 2 * g, None


@pytest.mark.parametrize("route", ROUTES)
def test_what_a_custom_function_gives_no_gradient_by_is_not_updated(route: Any) -> None:
    v, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with eager_update(sgd, [v, w]):
        route(lambda: Gate.apply(v, w).sum(), Params([v, w]))
        assert torch.equal(w, torch.ones(2))
        route(lambda: (Gate.apply(v, w) + w).sum(), Params([v, w]))
    assert torch.equal(v.detach(), torch.full((2,), 0.6))
    assert torch.equal(w.detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("inner", ["gradient", "backward"])
def test_an_update_may_differentiate_by_its_own_parameter(route: Any, inner: str) -> None:
    """Inside of an update gradients are given as usual."""
    v, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    loss = lambda: (v**2).sum() + (w**3).sum()
    updated: list[Tensor] = []

    def update(p: Tensor, g: Tensor) -> None:
        updated.append(p)
        if inner == "gradient":
            again = gradient(loss, Params([p]))[p]
        else:
            with torch.enable_grad():
                loss().backward()
            again = p.grad
            v.grad = w.grad = None
        assert again is not None
        p -= 0.1 * again

    with eager_update(update, [v, w]):
        route(loss, Params([v, w]))
    assert len(updated) == 2
    assert torch.equal(v.detach(), torch.full((2,), 0.8))
    assert torch.equal(w.detach(), torch.full((2,), 0.7))


@pytest.mark.parametrize("implicit", [False, True], ids=["backward", "gradient"])
def test_removed_in_the_midst_of_a_pass(implicit: bool) -> None:
    params = [torch.nn.Parameter(torch.ones(())) for _ in range(4)]
    updated: list[Tensor] = []

    def update(p: Tensor, gradient: Tensor) -> None:
        updated.append(p)
        handle.remove()

    def loss() -> Tensor:
        y = torch.ones(())
        for p in params:
            y = (y * p).sin()
        return y

    handle = eager_update(update, params)
    if implicit:
        grads = dict(gradient(loss, Params(params)).items())
    else:
        loss().backward()
        grads = {p: p.grad for p in params}
    assert len(updated) == 1
    assert [grads[p] is None for p in params] == [p is updated[0] for p in params]
