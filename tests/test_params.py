"""Params: an ordered set of tensors, by identity; what it takes and refuses; names; implicit calls."""

from __future__ import annotations

import copy
import gc
import operator
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from noted_calls import noted_calls
from torch import Tensor, nn

import torchzygote
from torchzygote import Params, copy_, gradient, params, pullback


def tensors(n: int) -> list[Tensor]:
    return [torch.zeros(2) for _ in range(n)]


def test_members_go_by_identity_and_keep_their_order() -> None:
    a, b = tensors(2)
    ps = Params([b, a, b])
    assert [p is q for p, q in zip(ps, [b, a], strict=True)] == [True, True]
    assert len(ps) == 2
    assert a in ps
    assert a.clone() not in ps
    assert 3 not in ps
    assert [p is q for p, q in zip(reversed(ps), [a, b], strict=True)] == [True, True]


def test_indices_give_tensors_and_slices_lists() -> None:
    a, b, c = tensors(3)
    ps = Params([a, b, c])
    assert ps[0] is a
    assert ps[-1] is c
    assert isinstance(ps[0:2], list)
    assert ps[0:2][1] is b
    with pytest.raises(IndexError):
        ps[3]


def test_iterables_nest_and_hold_modules() -> None:
    a, b, c = tensors(3)
    layer = nn.Linear(2, 1)
    ps = Params([a, (b, [layer]), (x for x in [c, a])])
    expected = [a, b, layer.weight, layer.bias, c]
    assert [p is q for p, q in zip(ps, expected, strict=True)] == [True] * 5


def test_of_a_module_the_trainable_parameters_count() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    ps = Params(model)
    assert len(ps) == 5
    assert model[0].weight not in ps
    assert repr(ps).startswith("Params([0.bias: float32 (3,), 1.weight: float32 (3,)")


def test_the_dict_of_named_parameters_keeps_names() -> None:
    layer = nn.Linear(2, 1)
    assert repr(Params(dict(layer.named_parameters()))) == repr(Params(layer))
    assert "enc.weight" in repr(Params({"enc": layer}))


def test_names_that_two_modules_share_are_told_apart() -> None:
    first, second = nn.Linear(2, 1), nn.Linear(2, 1, bias=False)
    grads = gradient(
        lambda: first(torch.ones(2)).sum() + second(torch.ones(2)).sum(), Params([first, second])
    )
    assert list(grads.named()) == ["0.weight", "bias", "1.weight"]


def test_positions_that_read_like_names_stay_apart() -> None:
    ps = Params(
        [nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Sequential(nn.Linear(1, 1, bias=False))]
    )
    names = list(ps._names.values())
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.zeros(3), "bare tensor"),
        ([torch.zeros(3, dtype=torch.int64)], "int64.*derivative"),
        ([torch.zeros(3, dtype=torch.bool)], "bool.*derivative"),
        ([1.5], "the number 1.5.*identity"),
        (7, "the number 7"),
        ([np.float32(2)], "the number 2.0"),
        ([np.zeros(3)], "ndarray.*from_numpy"),
        ("weights", "a str"),
        (None, "a NoneType"),
        ([[torch.zeros(1)], [None]], "a NoneType"),
        (nn.Linear(1, 1).named_parameters(), "a str.*dict"),
        ([True], "a bool"),
    ],
)
def test_what_cannot_be_differentiated_by_is_refused(source: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"(?s)Params: expected .*{message}"):
        Params(source)


def test_equality_needs_the_same_order_and_issetequal_does_not() -> None:
    a, b = tensors(2)
    assert Params([a, b]) == Params([a, b])
    assert Params([a, b]) != Params([b, a])
    assert Params([a, b]) != Params([a])
    assert Params([a]) != Params([a.clone()])
    assert Params([a]) != [a]
    assert Params([a, b]).issetequal(Params([b, a]))
    assert Params([a, b]).issetequal([b, a])
    assert not Params([a, b]).issetequal([a])


def test_set_operations_keep_order_and_leave_both_sides_alone() -> None:
    a, b, c = tensors(3)
    left, right = Params([a, b]), Params([c, b])
    assert left | right == Params([a, b, c])
    assert left & right == Params([b])
    assert left - right == Params([a])
    assert left.union(right, [a]) == Params([a, b, c])
    assert left.intersection([b], [a, b]) == Params([b])
    assert left.difference([b], [c]) == Params([a])
    assert (left, right) == (Params([a, b]), Params([c, b]))
    assert left.union() == left
    assert left.union() is not left


def test_add_discard_remove() -> None:
    a, b = tensors(2)
    ps = Params([a])
    ps.add(b)
    ps.add(b)
    assert ps == Params([a, b])
    ps.discard(a)
    ps.discard(a)
    assert ps == Params([b])
    with pytest.raises(KeyError, match="expected a member"):
        ps.remove(a)
    ps.remove(b)
    assert len(ps) == 0
    with pytest.raises(TypeError, match="int64"):
        ps.add(torch.tensor(1))
    with pytest.raises(TypeError, match="expected a tensor"):
        ps.add(nn.Linear(1, 1))


def test_names_survive_set_operations() -> None:
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    both = Params(first) | Params(second)
    assert both._names == Params(first)._names  # second's are taken
    assert (Params(first) - [first.bias])._names == {id(first.weight): "weight"}
    assert (both & second)._names == {}
    assert Params(Params(first))._names == Params(first)._names


def test_a_copy_is_shallow_and_independent() -> None:
    a, b = tensors(2)
    ps = Params([a])
    for twin in (ps.copy(), copy.copy(ps)):
        assert twin == ps
        twin.add(b)
        assert ps == Params([a])


def test_deep_copies_and_pickles_stay_with_their_model() -> None:
    model = nn.Linear(2, 1)
    for again in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin, ps = again((model, Params(model)))
        assert ps == Params(twin)
        assert ps._names == Params(twin)._names
        assert model.weight not in ps


def test_params_are_not_hashable_and_hold_their_tensors() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(Params())
    a = torch.zeros(3)
    held = weakref.ref(a)
    ps = Params([a])
    del a
    gc.collect()
    assert held() is not None
    del ps
    gc.collect()
    assert held() is None


def test_to_vector_is_new_flat_and_without_a_graph() -> None:
    w = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    ps = Params([w.t(), torch.tensor(5.0, dtype=torch.float64)])
    vector = ps.to_vector()
    assert torch.equal(vector, torch.tensor([1.0, 3.0, 2.0, 4.0, 5.0], dtype=torch.float64))
    assert not vector.requires_grad
    assert Params().to_vector().shape == (0,)


def test_to_vector_is_differentiable_within_a_differentiation() -> None:
    w, b = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    ps = Params([w, b])
    grads = gradient(lambda: (ps.to_vector() ** 2).sum(), ps)
    assert torch.equal(grads[w], 2 * w)
    assert torch.equal(grads[b], 2 * b)


def test_flags_and_grads_are_left_alone_also_when_f_raises() -> None:
    w, frozen = torch.zeros(2), nn.Parameter(torch.zeros(2), requires_grad=False)
    ps = Params([w, frozen])
    gradient(lambda: (w * frozen).sum(), ps)
    with pytest.raises(ZeroDivisionError):
        gradient(lambda: 1 / 0, ps)
    for p in ps:
        assert not p.requires_grad
        assert p.grad is None


def test_no_parameters_at_all() -> None:
    assert len(gradient(lambda: torch.tensor(1.0), Params())) == 0


def test_parameters_of_lazy_modules() -> None:
    layer = nn.LazyLinear(2)
    ps = Params(layer)
    assert repr(ps) == "Params([weight: float32 (uninitialized), bias: float32 (uninitialized)])"
    with pytest.raises(ValueError, match="run the module once first"):
        gradient(lambda: layer(torch.ones(3)).sum(), ps)
    layer(torch.ones(3))
    assert gradient(lambda: layer(torch.ones(3)).sum(), ps)[layer.weight].shape == (2, 3)


# ---- changed while a call is under way ---------------------------------------------------------------------


def test_changed_before_the_pullback() -> None:
    a, b, c = tensors(3)
    ps = Params([a, b])
    _, back = pullback(lambda: 10 * a.sum() + 20 * b.sum(), ps)
    assert back(1.0).params is ps
    ps.remove(a)
    ps.add(c)
    g = back(1.0)
    assert g.params == Params([a, b])
    assert torch.equal(g[a], torch.full_like(a, 10.0))
    assert torch.equal(g[b], torch.full_like(b, 20.0))
    assert ps == Params([b, c])


@pytest.mark.parametrize("way", ["gradient", "withgradient", "jacobian", "withjacobian", "diaghessian"])
def test_changed_inside_f(way: str) -> None:
    a, b, c = tensors(3)
    layer = nn.Linear(1, 1)
    ps = Params([a, b, layer])

    def f() -> Tensor:
        ps.discard(a)
        ps.discard(layer.weight)
        ps.add(c)
        ps.add(a)
        return 5 * (a**2).sum() + 10 * (b**2).sum() + layer.weight.sum()

    a += 1
    b += 1
    found = getattr(torchzygote, way)(f, ps)
    g = found.grad if way.startswith("with") else found
    assert g.params == Params([a, b, layer])
    assert torch.equal(g[a].reshape(-1), torch.full((a.numel(),), 10.0))
    assert torch.equal(g[b].reshape(-1), torch.full((b.numel(),), 20.0))
    assert g._names[id(layer.weight)] == "weight"
    assert ps == Params([b, layer.bias, c, a])


def test_a_buffer_is_refused_as_a_bare_tensor_is() -> None:
    with pytest.raises(TypeError, match=r"got a Buffer, .* write Params\(\[buf.copy\(\)\]\)"):
        Params(torchzygote.Buffer(torch.ones(2, 3)))


def test_a_step_along_gradients_is_no_difference_of_sets() -> None:
    w, b = torch.ones(2), torch.ones(3)
    ps = Params([w, b])
    gs = gradient(lambda: (w.sum() * b).sum(), ps)
    for step in (lambda: ps - 0.1 * gs, lambda: gs - ps, lambda: operator.isub(ps, gs)):
        with pytest.raises(TypeError, match="expected sets of tensors, got a Grads beside Params"):
            step()
    assert len(ps) == 2
    assert len(ps.difference(gs)) == 0
    copy_(ps, ps.to_vector() - 0.5 * gs.to_vector())
    assert w.tolist() == [-0.5, -0.5]


class TwoNames(nn.Module):
    """Says twice what it holds, and once without a name."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        yield "first", self.w
        yield "second", self.w
        yield "", nn.Parameter(torch.zeros(1))


LAYER, FROZEN = nn.Linear(2, 3), nn.Linear(1, 1).requires_grad_(False)
A, B = torch.zeros(2), torch.ones(3, dtype=torch.complex64)
# Sources, their members' names, and how often they are gone through one by one.
SOURCES: dict[str, tuple[Callable[[], Any], list[str], int]] = {
    "a list": (lambda: [A, B], ["", ""], 0),
    "a tuple": (lambda: (B, A, B), ["", ""], 0),
    "nothing": (list, [], 0),
    "a module": (lambda: nn.Sequential(LAYER, LAYER), ["0.weight", "0.bias"], 0),
    "partly frozen": (
        lambda: nn.Sequential(nn.Linear(1, 1).requires_grad_(False), LAYER),
        ["1.weight", "1.bias"],
        0,
    ),
    "a module of several names": (TwoNames, ["first", ""], 1),
    "an iterator": (lambda: iter([A, B]), ["", ""], 1),
    "nested": (lambda: [A, [B]], ["", ""], 1),
    "a dict": (lambda: {"a": A, "b": B}, ["a", "b"], 1),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_lists_and_modules_are_taken_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, names, times = SOURCES[kind]
    calls = noted_calls(monkeypatch, params, "collected")
    ps = Params(make())
    assert len(calls) == times
    assert [ps._names.get(id(p), "") for p in ps] == names
    assert ps == Params([[p] for p in ps])


def test_members_of_a_list_are_checked() -> None:
    with pytest.raises(TypeError, match="floating or complex dtype, got a tensor int64"):
        Params([A, torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(TypeError, match="expected tensors, got the number 3"):
        Params([A, 3])
